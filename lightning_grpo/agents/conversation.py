"""The chat API that agents speak, and one episode recorded from its requests.

`Endpoint` serves `/v1/chat/completions` before the servers, on the event loop of the rollouts: one
server for all episodes that run, each of which has its own path and key. It opens with the first
episode and closes with the last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Literal

import anyio
from aiohttp import web

from lightning_grpo.agents.tools import ParsedReply, reply_parser, strip_specials
from lightning_grpo.agents.turns import EpisodeRecord, call_id, first_ids, next_ids
from lightning_grpo.engine.http import Door, room_for_connections
from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.keys import bears
from lightning_grpo.rollout.chat import Tokenizer, call_of, text_of
from lightning_grpo.rollout.workflow import EpisodeContext
from lightning_grpo.types import Completion, Sampling

MODEL = "policy"
_FINISH = {"stop": "stop", "length": "length"}
# What would change what is sampled, or promise what isn't done. Other unknown fields are ignored.
_REFUSED = ("logit_bias", "functions", "function_call", "prediction", "audio", "modalities")
_PENALTIES = ("frequency_penalty", "presence_penalty")


class BadRequest(Exception):
    """A request that can't be served as it is; told to the agent with status 400."""


@dataclass(frozen=True)
class ChatRequest:
    """What an agent asks for.

    Attributes:
        messages: The conversation, whole, as the agent has it.
        tools: Tools' schemas.
        sampling: The workflow's, with the request's limit and stops.
        stream: Whether the reply comes in events.
        include_usage: Whether the last event counts tokens.
        ignored: What it asks of the sampling that the run decides otherwise, in words.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    ignored: str = ""


def read_request(body: Any, sampling: Sampling) -> ChatRequest:
    """The request of a body.

    Temperature, top_p and the like are the run's: a request's are ignored, because the policy is
    trained as it was sampled.

    Args:
        body: Parsed JSON.
        sampling: The workflow's.

    Raises:
        BadRequest: What it asks for is not served.
    """
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
        raise BadRequest("`messages` must be a list.")
    messages = [_message(message) for message in body["messages"]]
    if not messages:
        raise BadRequest("`messages` must not be empty.")
    _refuse(body)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or sampling.max_new_tokens
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    chosen = replace(
        sampling,
        max_new_tokens=min(int(limit), sampling.max_new_tokens),
        stop=(*sampling.stop, *(s for s in stops if s not in sampling.stop)),
    )
    options = body.get("stream_options") or {}
    return ChatRequest(
        messages,
        list(body.get("tools") or ()) if body.get("tool_choice") != "none" else [],
        chosen,
        bool(body.get("stream")),
        bool(options.get("include_usage")),
        _ignored(body, sampling),
    )


def _ignored(body: Mapping[str, Any], sampling: Sampling) -> str:
    decided = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0,
        "repetition_penalty": 1,
    }
    asked = [name for name, own in decided.items() if body.get(name) not in (None, own)]
    return ", ".join(f"{name} {body[name]}" for name in asked)


def _refuse(body: Mapping[str, Any]) -> None:
    if body.get("n") not in (None, 1):
        raise BadRequest("`n` must be 1: a trajectory has one answer to each question.")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise BadRequest("`tool_choice` must be auto or none: forced tokens were not sampled.")
    form = body.get("response_format") or {}
    if form.get("type", "text") != "text":
        raise BadRequest("`response_format` must be text: a grammar changes the distribution.")
    if body.get("logprobs"):
        raise BadRequest("`logprobs` are not served.")
    if body.get("chat_template_kwargs"):
        raise BadRequest(
            "`chat_template_kwargs` are the run's, for every turn alike. Set "
            "`Prompts.template_kwargs`."
        )
    asked = [name for name in _REFUSED if body.get(name)]
    asked += [name for name in _PENALTIES if body.get(name)]
    if asked:
        raise BadRequest(f"`{asked[0]}` is not served.")


def _message(message: Any) -> dict[str, Any]:
    """One message without what says nothing, its text as one string."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRequest("every message must be an object with a `role`.")
    kept = {k: v for k, v in message.items() if v is not None and v != []}
    try:
        kept["content"] = text_of(message.get("content"))
        if "tool_calls" in kept:
            kept["tool_calls"] = [call_of(call) for call in kept["tool_calls"]]
    except ConfigError as error:
        raise BadRequest(str(error)) from None
    if kept["role"] == "developer":
        kept["role"] = "system"
    return kept


def assistant_message(reply: ParsedReply, number: int) -> dict[str, Any]:
    """A reply as the message that the agent gets, and is expected to send back.

    A call that can't be read stays in the text: the agent sees what was said.
    """
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.calls:
        message["tool_calls"] = [
            {
                "id": call_id(number, i),
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for i, call in enumerate(reply.calls)
        ]
    return message


def same_message(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two messages say the same; keys that only clients add don't count."""
    names = ("role", "content", "tool_calls", "tool_call_id")
    return all((a.get(name) or "") == (b.get(name) or "") for name in names)


def completion_body(
    request_id: str,
    message: Mapping[str, Any],
    completion: Completion,
    num_prompt_tokens: int,
) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {**message, **_calls_as_sent(message)},
                "finish_reason": _finish_reason(message, completion),
                "logprobs": None,
            }
        ],
        "usage": _usage(num_prompt_tokens, completion),
    }


def completion_events(
    request_id: str,
    message: Mapping[str, Any],
    completion: Completion,
    num_prompt_tokens: int,
    include_usage: bool,
) -> Iterator[bytes]:
    """The events of a streamed reply: who speaks, what is said in one piece, why it ended."""
    calls = _calls_as_sent(message).get("tool_calls", [])
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": ""}, None)]
    if message["content"]:
        deltas.append(({"content": message["content"]}, None))
    if calls:
        numbered = [{"index": i, **call} for i, call in enumerate(calls)]
        deltas.append(({"tool_calls": numbered}, None))
    deltas.append(({}, _finish_reason(message, completion)))
    shared = {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": MODEL,
    }
    for delta, reason in deltas:
        yield _event({**shared, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
    if include_usage:
        yield _event({**shared, "choices": [], "usage": _usage(num_prompt_tokens, completion)})
    yield b"data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _calls_as_sent(message: Mapping[str, Any]) -> dict[str, Any]:
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", ())
    if not calls:
        return {}
    sent = []
    for call in calls:
        arguments = json.dumps(call["function"]["arguments"])
        sent.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {"tool_calls": sent}


def _finish_reason(message: Mapping[str, Any], completion: Completion) -> str:
    if message.get("tool_calls"):
        return "tool_calls"
    return _FINISH.get(completion.finish_reason, "stop")


def _usage(num_prompt_tokens: int, completion: Completion) -> dict[str, int]:
    sampled = len(completion.token_ids)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": num_prompt_tokens + sampled,
    }


Conversations = Literal["one", "last"]
_SHOWN = 160


class HistoryError(RolloutError):
    """A request's history is not what was said: its ids could only be made anew from text."""


@dataclass(frozen=True)
class Reached:
    """A point of a conversation: what was said until then, and its token ids.

    Attributes:
        messages: Until then, the last being the assistant's.
        record: The token ids.
    """

    messages: tuple[dict[str, Any], ...]
    record: EpisodeRecord


class Recorder:
    """Turns requests into ids to continue, and completions into messages.

    Token ids of what was said are kept, and those of what is new are appended. A request is matched
    to the longest recorded history that it begins with, message by message. Sending a request
    once more (a client's retry) starts from where it started before.

    Args:
        tokenizer: Of the policy.
        conversations: `one`: every request must continue what was recorded. `last`: a request that
            begins anew starts another conversation; the one that got the last answer is trained.
    """

    def __init__(self, tokenizer: Tokenizer, conversations: Conversations = "one") -> None:
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._reached: list[Reached] = []
        self._begun: ChatRequest | None = None

    @property
    def num_answers(self) -> int:
        """Calls that were answered."""
        return len(self._reached)

    @property
    def num_discarded(self) -> int:
        """Answers that are no part of the conversation that got the last one."""
        return len(self._reached) - len(self.last.record.completions)

    @property
    def last(self) -> Reached:
        """Where the agent got its last answer."""
        if not self._reached:
            raise RolloutError("the agent ended without a call of the policy.")
        return self._reached[-1]

    def begin(self, request: ChatRequest) -> EpisodeRecord:
        """The ids that the request asks to continue.

        Raises:
            HistoryError: It changes what was said.
        """
        known = self._longest(request.messages)
        if known is not None:
            new = request.messages[len(known.messages) :]
            if not new:
                raise HistoryError("the last message is the policy's own: nothing was said to it.")
            self._refuse_foreign(request, new)
            calls = known.messages[-1].get("tool_calls", ())
            ids = next_ids(self._tokenizer, known.record.last, new, calls)
            return known.record.told(ids)
        if self._begun is not None:
            self._refuse(request.messages)
        self._begun = request
        return EpisodeRecord().told(first_ids(self._tokenizer, request.messages, request.tools))

    def end(
        self, request: ChatRequest, record: EpisodeRecord, completion: Completion
    ) -> dict[str, Any]:
        """The message of a completion; it is recorded."""
        reply = self._parse(request, record, completion)
        message = assistant_message(reply, len(self._reached))
        said = (*request.messages, message)
        self._reached.append(Reached(said, record.sampled(completion)))
        return message

    def _parse(
        self, request: ChatRequest, record: EpisodeRecord, completion: Completion
    ) -> ParsedReply:
        if not request.tools or completion.truncated:
            return ParsedReply(completion.text)
        decode = self._tokenizer.decode
        prefix = decode(list(record.input_ids), skip_special_tokens=False)
        text = decode(list(completion.token_ids), skip_special_tokens=False)
        reply = reply_parser(self._tokenizer, request.tools, prefix)(
            strip_specials(self._tokenizer, text)
        )
        if any(call.error for call in reply.calls):
            return ParsedReply(completion.text)  # an agent has no words for half a call
        return reply

    def _longest(self, messages: Sequence[Mapping[str, Any]]) -> Reached | None:
        fitting = [
            reached
            for reached in self._reached
            if len(reached.messages) <= len(messages)
            and all(map(same_message, reached.messages, messages))
        ]
        # Of equals the latest: the answer that the agent last saw.
        return max(reversed(fitting), key=lambda reached: len(reached.messages), default=None)

    def _refuse_foreign(self, request: ChatRequest, new: Sequence[Mapping[str, Any]]) -> None:
        if any(message["role"] == "assistant" for message in new):
            raise HistoryError(
                "the history holds an answer that the policy did not give. Send its answers as "
                "they came, and none besides."
            )
        if self._begun is not None and request.tools and request.tools != self._begun.tools:
            raise HistoryError("`tools` changed, but the conversation began with others.")

    def _refuse(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what continues nothing, unless it may begin anew (or is sent once more)."""
        begun = self._begun.messages if self._begun else []
        if list(messages) == begun:
            return
        begins = not any(message["role"] == "assistant" for message in messages)
        if begins and self._conversations == "last":
            return
        said = self._reached[-1].messages if self._reached else tuple(begun)
        pairs = enumerate(zip(said, messages, strict=False))
        place = next((i for i, (a, b) in pairs if not same_message(a, b)), len(messages))
        was = said[place] if place < len(said) else None
        got = messages[place] if place < len(messages) else None
        raise HistoryError(
            f"message {place} is not what was said: recorded {_shown(was)}, got {_shown(got)}. Its "
            "token ids would have to be made anew from text, and the policy would be trained on "
            "what it never sampled. Send the history as it was"
            + (", or set `conversations: last` for agents that begin anew." if begins else ".")
        )


def _shown(message: Mapping[str, Any] | None) -> str:
    if message is None:
        return "nothing"
    text = repr({k: message[k] for k in ("role", "content", "tool_calls") if message.get(k)})
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def require_known(conversations: str) -> None:
    """Refuse an unknown choice."""
    if conversations not in ("one", "last"):
        raise ConfigError("conversations", "must be 'one' or 'last'", conversations)


logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_MAX_BODY_BYTES = 64 * 2**20


@dataclass
class AgentSession:
    """One episode as its agent sees it.

    Attributes:
        base_url: To give to a client.
        api_key: To give to a client.
        recorder: What was said.
        failure: Why a call failed; the episode fails with it, whatever the agent made of it.
    """

    base_url: str
    api_key: str
    recorder: Recorder
    context: EpisodeContext
    sampling: Sampling
    failure: Exception | None = None
    running: set[asyncio.Task[Any]] = field(default_factory=set)


class Endpoint:
    """Serves the sessions that are open.

    Args:
        sampling: Of every request; a request may only stop earlier.
        conversations: See `Recorder`.
    """

    def __init__(self, sampling: Sampling, conversations: Conversations = "one") -> None:
        self._sampling = sampling
        self._conversations: Conversations = conversations
        self._sessions: dict[str, AgentSession] = {}
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._listener: asyncio.Server | None = None
        self._url = ""
        self._opening = anyio.Lock()
        self._users = 0
        self._told_ignored = False

    @asynccontextmanager
    async def session(self, context: EpisodeContext) -> AsyncIterator[AgentSession]:
        """A place for one agent; its calls in flight are cancelled on the way out."""
        name = secrets.token_hex(8)
        self._users += 1
        session: AgentSession | None = None
        try:
            url = await self._open()
            recorder = Recorder(context.tokenizer, self._conversations)
            session = AgentSession(
                f"{url}/{name}/v1", secrets.token_hex(16), recorder, context, self._sampling
            )
            self._sessions[name] = session
            yield session
        finally:
            self._sessions.pop(name, None)
            self._users -= 1
            with anyio.CancelScope(shield=True):
                if session is not None:
                    await _cancel(session.running)
                await self._close_unused()

    async def _open(self) -> str:
        async with self._opening:
            if self._runner is None:
                app = web.Application(client_max_size=_MAX_BODY_BYTES)
                app.router.add_post("/{session}/v1/chat/completions", self._chat)
                app.router.add_get("/{session}/v1/models", self._models)
                runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
                await runner.setup()
                assert runner.server is not None
                # The run's other files, connections to servers first, need their room.
                self._door = Door(runner.server, room_for_connections() // 2)
                self._listener = await self._door.listen(_HOST, 0)
                self._runner = runner
                self._url = f"http://{_HOST}:{self._listener.sockets[0].getsockname()[1]}"
            return self._url

    async def _close_unused(self) -> None:
        async with self._opening:
            runner = self._runner
            if not self._users and runner is not None:
                self._runner = None
                if self._listener is not None:
                    self._listener.close()
                await runner.cleanup()
        if not self._users:
            self._opening = anyio.Lock()  # the next use may be on another event loop

    async def _models(self, request: web.Request) -> web.Response:
        self._find(request)
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._find(request)
        task = asyncio.current_task()
        assert task is not None
        session.running.add(task)
        try:
            asked = read_request(await _json(request), session.sampling)
            return await self._answer(request, session, asked)
        except (BadRequest, HistoryError) as error:
            return _refused(session, error, HTTPStatus.BAD_REQUEST)
        except Exception as error:  # noqa: BLE001 - kept, and raised as the episode's failure
            return _refused(session, error, HTTPStatus.INTERNAL_SERVER_ERROR)
        finally:
            session.running.discard(task)

    async def _answer(
        self, request: web.Request, session: AgentSession, asked: ChatRequest
    ) -> web.StreamResponse:
        if asked.ignored and not self._told_ignored:
            self._told_ignored = True
            logger.warning(
                "the agent asks for %s, which is ignored: the policy is trained as it is sampled, "
                "by the workflow's `sampling`",
                asked.ignored,
            )
        record = session.recorder.begin(asked)
        completion = await session.context.generate(list(record.input_ids), asked.sampling)
        message = session.recorder.end(asked, record, completion)
        told = (f"chatcmpl-{secrets.token_hex(8)}", message, completion, len(record.input_ids))
        if not asked.stream:
            return web.json_response(completion_body(*told))
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        for event in completion_events(*told, include_usage=asked.include_usage):
            await response.write(event)
        await response.write_eof()
        return response

    def _find(self, request: web.Request) -> AgentSession:
        session = self._sessions.get(request.match_info["session"])
        if session is None:
            raise web.HTTPNotFound(text="this episode has ended")
        if not bears(request.headers.get("Authorization"), session.api_key):
            raise web.HTTPUnauthorized(text="the key is not this episode's")
        if self._door is not None:
            self._door.heard(request.transport)
        return session


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def _refused(session: AgentSession, error: Exception, status: HTTPStatus) -> web.Response:
    session.failure = session.failure or error
    body = {"error": {"message": str(error), "type": type(error).__name__, "code": None}}
    # The package would send it twice more.
    return web.json_response(body, status=status, headers={"x-should-retry": "false"})


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        await asyncio.wait(waiting)
