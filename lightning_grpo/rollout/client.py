"""One inference server over HTTP: typed calls, and errors that name the server.

Every call of the package to a server goes through here. A 4xx answer is a `RequestError` with the
server's own message; a connection error, a time-out or a 5xx answer is a `ServerError` that names
the URL. The API key travels in a header and is in no message. Only calls that may safely be sent
twice are retried: control calls and scores. A generation is never retried here, because what to do
with its partial tokens is the pool's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
import msgspec
import stamina

from lightning_grpo.errors import RequestError, ServerError
from lightning_grpo.rollout import wire

T = TypeVar("T")
MESSAGE_LIMIT = 500
RETRIES = stamina.AsyncRetryingCaller(attempts=3, wait_initial=0.05, wait_max=0.5, timeout=10.0).on(
    lambda error: isinstance(error, ServerError) and not isinstance(error, RequestError)
)


def new_session(api_key: str | None = None) -> aiohttp.ClientSession:
    """The one session of a pool; no time-out but those of the calls.

    Must be called on the event loop that will use it; the caller closes it.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        # No limit: the pool bounds generations by server, and behind them an abort or a health
        # check would wait for a connection until it counts as failed. The time is shorter than
        # uvicorn's 5 s: the server never closes a connection that is being reused.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=headers,
    )


class ServerClient:
    """Calls of SGLang's native HTTP API on one server.

    Args:
        url: `http://host:port`.
        session: From `new_session`; shared by all clients of a pool and not closed here.
        request_timeout_s: Longest generation.
        control_timeout_s: Longest control call; weight operations take their own.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        request_timeout_s: float = 600.0,
        control_timeout_s: float = 30.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._request_timeout_s = request_timeout_s
        self._control_timeout_s = control_timeout_s

    async def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers its health check in time; never raises for a sick server."""
        return await self._answers("/health", timeout_s)

    async def listens(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers what takes no token, so also while it is paused."""
        return await self._answers("/model_info", timeout_s)

    async def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            await self._call("GET", path, timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    async def model_info(self) -> wire.ModelInfo:
        """Path and weight version of the loaded model."""
        return await self._control("GET", "/model_info", None, wire.ModelInfo)

    async def server_info(self) -> wire.ServerInfo:
        """Version and limits of the server."""
        return await self._control("GET", "/server_info", None, wire.ServerInfo)

    async def has_endpoint(self, path: str) -> bool:
        """Whether the server knows a path; asked in a way that does nothing."""
        try:
            await RETRIES(self._call, "OPTIONS", path, None, self._control_timeout_s)
        except RequestError as error:
            return error.status != HTTPStatus.NOT_FOUND
        return True

    async def tokenize(self, text: str) -> list[int]:
        """The ids of a text, by the server's own tokenizer.

        Raises:
            RequestError: It has none (started without, or too old to be asked).
        """
        body = {"prompt": text, "add_special_tokens": False}
        return (await self._control("POST", "/tokenize", body, wire.Tokens)).tokens

    async def generate(self, request: wire.GenerateRequest) -> wire.GenerateReply:
        """Samples one completion; an aborted one returns what it has."""
        body = await self._call("POST", "/generate", request, self._request_timeout_s)
        return self._decode(body, wire.GenerateReply)

    async def generate_together(
        self, requests: Sequence[wire.GenerateRequest]
    ) -> list[wire.GenerateReply]:
        """Samples several completions in one exchange, which lasts as long as the longest."""
        if len(requests) == 1:
            return [await self.generate(requests[0])]
        body = wire.GenerateRequests(
            input_ids=[request.input_ids for request in requests],
            sampling_params=[request.sampling_params for request in requests],
            return_logprob=[request.return_logprob for request in requests],
            rid=[request.rid for request in requests],
            extra_key=[request.extra_key for request in requests],
        )
        data = await self._call("POST", "/generate", body, self._request_timeout_s)
        replies = self._decode(data, list[wire.GenerateReply])
        if len(replies) != len(requests):
            raise ServerError(f"{self.url} answered {len(replies)} of {len(requests)} requests")
        return replies

    async def score(
        self, input_ids: Sequence[int], *, extra_key: str = "", timeout_s: float | None = None
    ) -> list[float]:
        """Logprob of every token given those before it, raw (temperature 1), `[tokens]`.

        Entry 0 is 0.0: nothing comes before the first token.
        """
        request = wire.GenerateRequest(
            input_ids=list(input_ids),
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=0,
            extra_key=extra_key,
        )
        timeout_s = timeout_s or self._request_timeout_s
        body = await RETRIES(self._call, "POST", "/generate", request, timeout_s)
        entries = self._decode(body, wire.GenerateReply).meta_info.input_token_logprobs or []
        if len(entries) != len(input_ids):
            raise ServerError(
                f"{self.url} scored {len(entries)} of {len(input_ids)} tokens"
                " (logprob_start_len=0 asks for all)"
            )
        return [0.0 if logprob is None else logprob for logprob, *_ in entries]

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
            await RETRIES(self._call, "POST", "/flush_cache", None, self._control_timeout_s)
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
        await self._call("POST", "/release_memory_occupation", {}, self._control_timeout_s)

    async def resume_memory(self) -> None:
        """Takes it again; the weights are undefined until an update."""
        await self._call("POST", "/resume_memory_occupation", {}, self._control_timeout_s)

    async def update(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0
    ) -> wire.UpdateReply:
        """A weight operation: sent once, its refusal (400 or success false) returned as data.

        Raises:
            ServerError: The server can't be reached, fell over, or answered nothing in time.
        """
        data = await self._call("POST", path, body or {}, timeout_s, refusal_is_data=True)
        return self._decode(data, wire.UpdateReply)

    async def _control(
        self,
        method: str,
        path: str,
        body: Any = None,
        reply_type: type[T] | None = None,
    ) -> T:
        data = await RETRIES(self._call, method, path, body, self._control_timeout_s)
        return self._decode(data, reply_type) if reply_type else None  # type: ignore[return-value]

    async def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout_s: float = 30.0,
        *,
        refusal_is_data: bool = False,
    ) -> bytes:
        data = msgspec.json.encode(body) if body is not None else None
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=data,
                headers={"Content-Type": "application/json"} if data is not None else None,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                content = await response.read()
                status = response.status
        except TimeoutError as error:
            raise ServerError(f"{self.url}{path} did not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if status < HTTPStatus.MULTIPLE_CHOICES or (
            refusal_is_data and status == HTTPStatus.BAD_REQUEST
        ):
            return content
        refused = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
        message = f"{self.url}{path} answered {status}: {error_message(content)}"
        raise RequestError(message, status) if refused else ServerError(message)

    def _decode(self, content: bytes, reply_type: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=reply_type)
        except msgspec.MsgspecError as error:
            raise ServerError(
                f"{self.url} sent what is no {reply_type.__name__}: {error}:"
                f" {error_message(content)}"
            ) from error


def error_message(content: bytes) -> str:
    """The readable part of an error body: SGLang's `error.message`, `message`, or the text."""
    text = content.decode("utf-8", "replace").strip()[:MESSAGE_LIMIT]
    try:
        body = msgspec.json.decode(content)
    except msgspec.MsgspecError:
        return text
    if not isinstance(body, dict):
        return text
    inner = body.get("error")
    message = inner.get("message") if isinstance(inner, dict) else inner or body.get("message")
    return str(message)[:MESSAGE_LIMIT] if message else text
