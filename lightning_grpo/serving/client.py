"""One inference server over SGLang's HTTP API: typed calls, and errors that name the server.

Every call of the package to a server goes through here. A 4xx answer is a `RequestError` with the
server's own message; a connection error, a time-out or a 5xx answer is a `ServerError` that names
the URL; a body that is not what was asked for is a `ReplyError`. The API key travels in a header
and is in no message. Only calls that may safely be sent twice are retried: control calls and
scores. A generation is never retried here, because what to do with its partial tokens is the pool's
business.

A server that asks to wait (429, 503) is waited for, and so is a descriptor or a port that this
process lacks: neither counts as an attempt.

Requests for one prompt that leave at the same moment travel as one. One exchange for a group of
eight instead of eight took the client's CPU time in a step of the quickstart from 98 to 62 ms and
the server's, sampling aside, from 48 to 18. The replies come back together, when the longest is
done, so this is for workflows that ask the policy once an episode.
"""

from __future__ import annotations

import asyncio
import email.utils
import errno
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
import msgspec

from lightning_grpo.errors import BusyError, OwnLimitError, ReplyError, RequestError, ServerError
from lightning_grpo.serving.event_loop import FairTurns, seen
from lightning_grpo.serving.wire import (
    GenerateReply,
    GenerateRequest,
    GenerateRequests,
    ModelInfo,
    ServerInfo,
    Tokens,
    UpdateReply,
    bytes_of,
    checked_logprobs,
)
from lightning_grpo.types import RouterShape

logger = logging.getLogger(__name__)

T = TypeVar("T")
MESSAGE_LIMIT = 500
ATTEMPTS = 3
"""Of a call that may be sent twice."""

LONGEST_WAIT_S = 60.0
"""A server that asks for more is asked again after this."""

BUSY_LIMIT_S = 120.0
"""A control call that a server puts off for longer has failed."""

UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What decoding raises: for JSON of another form, too deep, or not in UTF-8."""

BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
OWN_LIMITS = {
    errno.EMFILE: "this process may open no more than {soft} files (`ulimit -n`): requests wait for"
    " one to be closed. Raise it before the start, or lower `limits.max_in_flight`",
    errno.ENFILE: "this machine can open no more files (`fs.file-max`): requests wait",
    errno.EADDRNOTAVAIL: "no port is left for another connection"
    " (`net.ipv4.ip_local_port_range`): requests wait",
    errno.ENOMEM: "the kernel has no memory for another connection: requests wait",
    errno.ENOBUFS: "the kernel has no memory for another connection: requests wait",
}
"""What is said where a connection can't be made, and no server is to blame."""


def new_session(api_key: str | None = None) -> aiohttp.ClientSession:
    """The one session of a pool; no time-out but those of the calls.

    Must be called on the event loop that will use it; the caller closes it.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        # Nothing is unpacked: of a packed body nobody knows how large it is.
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        # No limit: the pool bounds generations by server, and behind them an abort or a health
        # check would wait for a connection until it counts as failed. The time is shorter than
        # uvicorn's 5 s: the server never closes a connection that is being reused.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Accept-Encoding": "identity", **headers},
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a server.

    Attributes:
        method: Of HTTP.
        path: Of the URL.
        body: Sent as JSON; None sends none.
        timeout_s: Of each attempt; None: no limit.
        most_bytes: A longer answer is none.
        refusal_is_data: Whether a 400 is an answer like another.
    """

    method: str
    path: str
    body: Any = None
    timeout_s: float | None = 30.0
    most_bytes: int = 16 << 20
    refusal_is_data: bool = False


class ServerClient:
    """Calls of SGLang's native HTTP API on one server.

    Args:
        url: `http://host:port`.
        session: From `new_session`; shared by all clients of a pool and not closed here.
        routes: What the model's routers choose, where completions come with it.
        request_timeout_s: Longest generation; None: whoever asks sees to it.
        control_timeout_s: Longest control call; weight operations take their own.
        told: What was said already of this process's own limits; clients may share it.
        turns: Taken before a completion is read; clients may share them.

    Attributes:
        trouble: Why it failed the last check of `healthy` or `listens` that it did.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        routes: RouterShape | None = None,
        *,
        request_timeout_s: float | None = 600.0,
        control_timeout_s: float = 30.0,
        told: set[str] | None = None,
        turns: FairTurns | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self.trouble = ""
        self._turns = turns or FairTurns()
        self._told = set() if told is None else told
        self._request_timeout_s = request_timeout_s
        self._control_timeout_s = control_timeout_s
        # int32 in base64
        self._route_bytes = 6 * routes.layers * routes.top_k if routes is not None else 0

    async def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers its health check in time; never raises for a sick server.

        Raises:
            OwnLimitError: It could not even be asked.
        """
        return await self._answers("/health", timeout_s)

    async def listens(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers what takes no token, so also while it is paused.

        Raises:
            OwnLimitError: It could not even be asked.
        """
        return await self._answers("/model_info", timeout_s)

    async def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            await self._call(Call("GET", path, timeout_s=timeout_s), patient=False)
        except OwnLimitError:
            raise
        except BusyError as error:
            # Without a time to wait, SGLang says by 503 that it is sick.
            self.trouble = str(error)
            return error.wait_s is not None
        except ServerError as error:
            self.trouble = str(error)
            return False
        return True

    async def model_info(self) -> ModelInfo:
        """Path and weight version of the loaded model."""
        return await self._control("GET", "/model_info", None, ModelInfo)

    async def server_info(self) -> ServerInfo:
        """Version and limits of the server."""
        return await self._control("GET", "/server_info", None, ServerInfo)

    async def has_endpoint(self, path: str) -> bool:
        """Whether the server knows a path; asked in a way that does nothing."""
        try:
            await self._control("OPTIONS", path)
        except RequestError as error:
            return error.status != HTTPStatus.NOT_FOUND
        return True

    async def tokenize(self, text: str) -> list[int]:
        """The ids of a text, by the server's own tokenizer.

        Raises:
            RequestError: It has none (started without, or too old to be asked).
        """
        body = {"prompt": text, "add_special_tokens": False}
        return (await self._control("POST", "/tokenize", body, Tokens)).tokens

    async def generate(
        self, request: GenerateRequest, arrived: Callable[[], object] = bool
    ) -> GenerateReply:
        """Samples one completion; an aborted one returns what it has.

        `arrived` is called when the answer is there, before it is read: many are read in turns.

        Raises:
            BusyError: The server wants it later.
        """
        data = await self._generate(request, self._bytes_of(request), arrived)
        return self._decode(data, GenerateReply)

    async def generate_together(
        self, requests: Sequence[GenerateRequest], arrived: Callable[[], object] = bool
    ) -> list[GenerateReply]:
        """Samples several completions in one exchange, which lasts as long as the longest."""
        if len(requests) == 1:
            return [await self.generate(requests[0], arrived)]
        body = GenerateRequests(
            input_ids=[request.input_ids for request in requests],
            sampling_params=[request.sampling_params for request in requests],
            return_logprob=[request.return_logprob for request in requests],
            rid=[request.rid for request in requests],
            extra_key=[request.extra_key for request in requests],
            return_routed_experts=any(request.return_routed_experts for request in requests),
        )
        data = await self._generate(body, sum(map(self._bytes_of, requests)), arrived)
        replies = self._decode(data, list[GenerateReply])
        if len(replies) != len(requests):
            raise ReplyError(f"{self.url} answered {len(replies)} of {len(requests)} requests")
        return replies

    def _bytes_of(self, request: GenerateRequest) -> int:
        """The longest answer to a request."""
        num_tokens = int(request.sampling_params["max_new_tokens"])
        routed = len(request.input_ids) + num_tokens if request.return_routed_experts else 0
        return bytes_of(num_tokens) + routed * self._route_bytes

    async def _generate(self, body: Any, most: int, arrived: Callable[[], object]) -> bytes:
        call = Call("POST", "/generate", body, self._request_timeout_s, most)
        data = await self._call(call, patient=False)
        arrived()
        await self._turns.take()
        return data

    async def score(
        self, input_ids: Sequence[int], *, extra_key: str = "", timeout_s: float | None = None
    ) -> list[float]:
        """Logprob of every token given those before it, raw (temperature 1), `[tokens]`.

        Entry 0 is 0.0: nothing comes before the first token.
        """
        request = GenerateRequest(
            input_ids=list(input_ids),
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=0,
            extra_key=extra_key,
        )
        limit_s = timeout_s or self._request_timeout_s
        call = Call("POST", "/generate", request, limit_s, bytes_of(len(input_ids)))
        body = await self._call(call, attempts=ATTEMPTS)
        entries = self._decode(body, GenerateReply).meta_info.input_token_logprobs or []
        if [token for _, token, _ in entries] != request.input_ids:
            raise ReplyError(
                f"{self.url} scored {len(entries)} of {len(input_ids)} tokens, or others"
                " (logprob_start_len=0 asks for all)"
            )
        return [0.0, *checked_logprobs([logprob for logprob, *_ in entries[1:]], self.url)]

    async def abort(self, rid: str | None = None) -> None:
        """Aborts one request, or all where no name is given. Unknown names are no error."""
        await self._control("POST", "/abort_request", {"rid": rid or "", "abort_all": rid is None})

    async def pause(self, mode: str = "abort") -> None:
        """Holds new requests back until `resume`."""
        await self._control("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Runs what was held back (`/continue_generation`)."""
        await self._control("POST", "/continue_generation", {})

    async def flush_cache(self) -> bool:
        """Empties the prefix cache; False while the server still holds requests: ask again."""
        try:
            await self._control("POST", "/flush_cache")
        except RequestError:
            return False
        return True

    async def update_weight_version(self, label: str) -> None:
        """Renames the loaded weights. Aborts nothing, though the server's default would."""
        await self._control(
            "POST", "/update_weight_version", {"new_version": label, "abort_all_requests": False}
        )

    async def release_memory(self) -> None:
        """Gives GPU memory back; only an idle server can."""
        await self._call(self._post("/release_memory_occupation"))

    async def resume_memory(self) -> None:
        """Takes it again; the weights are undefined until an update."""
        await self._call(self._post("/resume_memory_occupation"))

    def _post(self, path: str) -> Call:
        return Call("POST", path, {}, self._control_timeout_s)

    async def update(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0
    ) -> UpdateReply:
        """A weight operation: sent once, its refusal (400 or success false) returned as data.

        Raises:
            ServerError: The server can't be reached, fell over, or answered nothing in time.
        """
        call = Call("POST", path, body or {}, timeout_s, refusal_is_data=True)
        data = await self._call(call)
        return self._decode(data, UpdateReply)

    async def _control(
        self,
        method: str,
        path: str,
        body: Any = None,
        reply_type: type[T] | None = None,
    ) -> T:
        call = Call(method, path, body, self._control_timeout_s)
        data = await self._call(call, attempts=ATTEMPTS)
        return self._decode(data, reply_type) if reply_type else None  # type: ignore[return-value]

    async def _call(self, call: Call, *, attempts: int = 1, patient: bool = True) -> bytes:
        """The body of the answer to a call, which is repeated where that is safe.

        Args:
            call: What to ask.
            attempts: How often it may be sent, if it fails.
            patient: Whether to wait for a server that asks for it, and for a connection.
        """
        data = msgspec.json.encode(call.body) if call.body is not None else None
        repeats = _Repeats(attempts, patient, call.timeout_s)
        while True:
            try:
                return await self._send(call, data)
            except ServerError as error:
                wait_s = repeats.wait_after(error)
                if isinstance(error, OwnLimitError) and str(error) not in self._told:
                    self._told.add(str(error))
                    logger.warning("%s", error)
                else:
                    logger.info("%s; asked again in %.3g s", error, wait_s)
            await asyncio.sleep(wait_s)

    async def _send(self, call: Call, data: bytes | None) -> bytes:
        url = self.url + call.path
        try:
            async with self._session.request(
                call.method,
                url,
                data=data,
                headers={"Content-Type": "application/json"} if data is not None else None,
                timeout=aiohttp.ClientTimeout(total=call.timeout_s),
                allow_redirects=False,
            ) as response:
                content = await _read(response, call.most_bytes)
                status = response.status
        except TimeoutError as error:
            limit = "in time" if call.timeout_s is None else f"within {call.timeout_s:.3g} s"
            raise ServerError(f"{url} did not answer {limit}") from error
        except (aiohttp.ClientError, OSError) as error:
            message = f"{url}: {type(error).__name__}: {error}"
            raise (own_limit(error) or ServerError(message)) from error
        if status < HTTPStatus.MULTIPLE_CHOICES or (
            call.refusal_is_data and status == HTTPStatus.BAD_REQUEST
        ):
            return content
        message = f"{url} answered {status}: {error_message(content)}"
        if status in BUSY:
            raise BusyError(message, seconds_to_wait(response.headers.get("Retry-After")))
        refused = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
        raise RequestError(message, status) if refused else ServerError(message)

    def _decode(self, content: bytes, reply_type: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=reply_type)
        except UNREADABLE as error:
            raise ReplyError(
                f"{self.url} sent what is no {getattr(reply_type, '__name__', reply_type)}:"
                f" {error}: {error_message(content)}"
            ) from error


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The body of an answer.

    Raises:
        ReplyError: It is longer than any that was asked for.
    """
    told = response.content_length
    if told is not None and told <= most_bytes:
        return await response.read()
    parts, size = [], told or 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            response.close()
            raise ReplyError(f"{response.url} answers with more than {most_bytes} bytes")
    return b"".join(parts)


class _Repeats:
    """Whether and when a call that failed is sent again."""

    def __init__(self, attempts: int, patient: bool, timeout_s: float | None) -> None:
        self._left, self._patient, self._timeout_s = attempts, patient, timeout_s
        self._began, self._waits = time.monotonic(), growing(0.05, LONGEST_WAIT_S)

    def wait_after(self, error: ServerError) -> float:
        """Seconds until the next attempt; raises the error if there is to be none."""
        wait_s, limit_s = next(self._waits), math.inf
        if isinstance(error, OwnLimitError):
            wait_s = min(wait_s, 1.0)  # others give back what is wanted
            limit_s = (self._timeout_s or math.inf) if self._patient else 0.0
        elif isinstance(error, BusyError):
            wait_s = error.wait_s or wait_s
            limit_s = BUSY_LIMIT_S if self._patient else 0.0
        else:
            self._left -= 1
            wait_s = min(wait_s, 0.5)
            limit_s = math.inf if self._left and not isinstance(error, RequestError) else 0.0
        if time.monotonic() + wait_s - self._began > limit_s:
            raise error
        return wait_s


def growing(first_s: float, longest_s: float) -> Iterator[float]:
    """Pauses, each twice the one before."""
    while True:
        yield first_s
        first_s = min(longest_s, 2 * first_s)


def seconds_to_wait(retry_after: str | None) -> float | None:
    """What a `Retry-After` header asks for, in seconds or as a date; None where it is neither.

    Between 0 and `LONGEST_WAIT_S`: clocks differ, and headers lie.
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(LONGEST_WAIT_S, max(0.0, seconds))


def own_limit(error: BaseException) -> OwnLimitError | None:
    """What a connection that failed says of this process, if it was not the server that failed."""
    number = getattr(error, "errno", None) or 0
    if number < 0:  # a name was not found: maybe for want of a descriptor
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as cause:
            number = cause.errno or 0
    message = OWN_LIMITS.get(number)
    if message is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OwnLimitError(message.format(soft=soft))


def error_message(content: bytes) -> str:
    """The readable part of an error body: SGLang's `error.message`, `message`, or the text."""
    text = content.decode("utf-8", "replace").strip()[:MESSAGE_LIMIT]
    try:
        body = msgspec.json.decode(content)
    except UNREADABLE:
        return text
    if not isinstance(body, dict):
        return text
    inner = body.get("error")
    message = inner.get("message") if isinstance(inner, dict) else inner or body.get("message")
    return str(message)[:MESSAGE_LIMIT] if message else text


# -- requests that travel together ----------------------------------------------------------------


class Together:
    """Gathers requests for the length of a turn of the event loop, then sends them."""

    def __init__(self) -> None:
        self._gathering: dict[Hashable, Exchange] = {}

    def join(self, client: ServerClient, request: GenerateRequest) -> Exchange:
        """The exchange with those of this moment for the same prompt; for `Exchange.reply`."""
        key = (client, request.extra_key, tuple(request.input_ids))
        exchange = self._gathering.get(key)
        if exchange is None or exchange.is_left:
            exchange = self._gathering[key] = Exchange()
            exchange.task = asyncio.create_task(self._send(key, client, exchange))
            exchange.task.add_done_callback(seen)
        return exchange

    async def _send(
        self, key: Hashable, client: ServerClient, exchange: Exchange
    ) -> list[GenerateReply]:
        try:
            await asyncio.sleep(0)  # whoever was ready before this task has joined by now
        finally:
            if self._gathering.get(key) is exchange:
                del self._gathering[key]
        return await client.generate_together(exchange.requests, exchange.arrived)


class Exchange:
    """Requests that travel as one; ends with the last who waits for it.

    Attributes:
        requests: All of them.
        rids: Their names.
    """

    task: asyncio.Task[list[GenerateReply]]

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.rids: list[str] = []
        self._on_arrival: list[Callable[[], object]] = []
        self._num_waiting = 0

    @property
    def is_left(self) -> bool:
        """Whether nobody waits for it any more: it is being cancelled."""
        return not self._num_waiting and bool(self.requests)

    def arrived(self) -> None:
        """The answer to all of them is there."""
        for tell in self._on_arrival:
            tell()

    async def reply(self, request: GenerateRequest, arrived: Callable[[], object]) -> GenerateReply:
        """Travel with the others.

        Args:
            request: One more of them.
            arrived: Called when the answer is there, before it is read.

        Raises:
            RequestError: The server refuses one of them.
            ServerError: It does not answer; all of them are lost with it.
        """
        index = len(self.requests)
        self.requests.append(request)
        self.rids.append(request.rid)
        self._on_arrival.append(arrived)
        self._num_waiting += 1
        try:
            return (await asyncio.shield(self.task))[index]
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self.task.cancel()  # the server then ends what nobody waits for
