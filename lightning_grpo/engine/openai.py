"""OpenAI's endpoints over the engine: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

Fields that would change the answer and aren't implemented are refused; other unknown ones are
ignored, and so is the model's name, as SGLang does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from aiohttp import web
from typing_extensions import override

from lightning_grpo.engine.batch import Output
from lightning_grpo.engine.http import event_stream, json_response, reply_text
from lightning_grpo.engine.requests import (
    BadRequestError,
    Count,
    GenerateBody,
    Intake,
    SamplingBody,
    unsupported,
)
from lightning_grpo.engine.scheduler import EngineThread
from lightning_grpo.templates import check_template

_DECIDED = {
    *("chat_template", "documents", "tools", "tokenizer_kwargs", "return_tensors", "padding"),
    *("truncation", "max_length", "return_assistant_tokens_mask", "continue_final_message"),
}
"""Arguments of transformers that are no variables of a template: another template is a program."""
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
"""Those of OpenAI's that are not SGLang's."""

# ---- bodies ------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True):
    """`stream_options`."""

    include_usage: bool = False


class OpenAIBody(
    SamplingBody, kw_only=True, frozen=True, forbid_unknown_fields=False, rename=_NAMES
):
    """What both kinds of request may say, and how both are answered."""

    # Repeated where the name is another.
    max_new_tokens: Count | None = None
    min_new_tokens: Count = 0
    sampling_seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: Any = None

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    part_object: ClassVar[str]

    def say(self, text: str, first: int | None = None) -> dict[str, Any]:
        """Word a whole text, or the part of it that begins with token `first`."""
        raise NotImplementedError

    def list_logprobs(self, tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
        """Word the texts of tokens and their logprobs."""
        raise NotImplementedError


class ChatBody(OpenAIBody, kw_only=True, frozen=True):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    tools: Any = None
    tool_choice: Any = None

    LACKS = SamplingBody.LACKS | {"top_logprobs": 0, "functions": None, "audio": None}

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    @override
    def say(self, text: str, first: int | None = None) -> dict[str, Any]:
        if first:
            return {"delta": {"content": text}}
        return {"message" if first is None else "delta": {"role": "assistant", "content": text}}

    @override
    def list_logprobs(self, tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
        content = [
            {"token": t, "bytes": list(t.encode()), "logprob": value, "top_logprobs": []}
            for t, value in zip(tokens, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


class CompletionBody(OpenAIBody, kw_only=True, frozen=True):
    """The body of `/v1/completions`."""

    prompt: str | list[str | int | list[int]]
    max_new_tokens: Count | None = 16
    logprobs: int | None = None

    LACKS = SamplingBody.LACKS | {"echo": False, "suffix": None, "best_of": None}

    id_prefix = "cmpl"
    whole_object = part_object = "text_completion"

    @override
    def say(self, text: str, first: int | None = None) -> dict[str, Any]:
        return {"text": text}

    @override
    def list_logprobs(self, tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": None,
            "text_offset": [],
        }


# ---- routes ------------------------------------------------------------------------------------


@dataclass(eq=False)
class OpenAIRoutes:
    """Words requests as the engine's own and its outputs as OpenAI's replies.

    Attributes:
        engine: Generates.
        intake: Checks requests.
        model: The name of the model that is served by now.
    """

    engine: EngineThread
    intake: Intake
    model: Callable[[], str]

    def __post_init__(self) -> None:
        self._started = int(time.time())

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._named)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._chat)

    def _about_model(self) -> dict[str, Any]:
        return {
            "id": self.model(),
            "object": "model",
            "created": self._started,
            "owned_by": "lightning_grpo",
            "max_model_len": self.intake.context_length,
        }

    async def _models(self, _: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._about_model()]})

    async def _named(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self.model():
            raise web.HTTPNotFound(text=f"the model {name!r} is not served, {self.model()!r} is")
        return json_response(self._about_model())

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.read(request, CompletionBody)
        _check_format(body)
        if body.logprobs:
            raise BadRequestError(
                "`logprobs` must be 0 (those of the sampled tokens): others are not supported by "
                f"the embedded engine, got {body.logprobs}"
            )
        several = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        is_text = all(isinstance(each, str) for each in several) and bool(several)
        prompt: dict[str, Any] = {"text" if is_text else "input_ids": body.prompt}
        asked = GenerateBody(
            sampling_params=body, return_logprob=body.logprobs is not None, **prompt
        )
        return await self._answer(request, body, asked)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.read(request, ChatBody)
        _check_format(body)
        if body.tools and body.tool_choice != "none":
            raise BadRequestError("`tools` are not supported by the embedded engine")
        if body.max_completion_tokens is not None:
            body = msgspec.structs.replace(body, max_new_tokens=body.max_completion_tokens)
        ids: Any = await self.intake.off_loop(lambda: self._rendered(body))
        asked = GenerateBody(input_ids=ids, sampling_params=body, return_logprob=body.logprobs)
        return await self._answer(request, body, asked)

    def _rendered(self, body: ChatBody) -> list[int]:
        tokenizer = self.intake.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise BadRequestError(
                "`messages` need a chat template, and the model's tokenizer has none: use "
                "/v1/completions"
            )
        messages = [_message(each, number) for number, each in enumerate(body.messages)]
        self.intake.check_length(sum(len(str(each.get("content"))) for each in messages))
        decided = sorted(_DECIDED & body.chat_template_kwargs.keys())
        if decided:
            raise BadRequestError(
                f"`chat_template_kwargs` must be variables of the model's template, got {decided}"
            )
        how: dict[str, Any] = {"add_generation_prompt": True} | body.chat_template_kwargs
        how |= {"tokenize": True, "return_dict": False}
        try:
            check_template(tokenizer, messages)
            return list(tokenizer.apply_chat_template(messages, **how))
        except Exception as error:  # whatever the template raises about these messages
            said = str(error)[:400]
            raise BadRequestError(f"`messages` don't suit the chat template: {said}") from error

    async def _answer(
        self, request: web.Request, body: OpenAIBody, asked: GenerateBody
    ) -> web.StreamResponse:
        generations, _ = await self.intake.checked(request, asked)
        head = {
            "id": f"{body.id_prefix}-{generations[0].rid}",
            "created": int(time.time()),
            "model": self.model(),
        }
        if body.stream:
            async with self.engine.sample(generations, stream=True) as outputs:
                events = self._events(body, outputs)
                return await event_stream(request, (head | event async for event in events))
        ended = await self.engine.finish(generations)
        choices = [
            self._choice(body, index, output, body.say(self._text(output)))
            for index, output in enumerate(ended)
        ]
        return json_response(
            {
                **head,
                "object": body.whole_object,
                "choices": choices,
                "usage": _usage(body, ended),
                "metadata": {"weight_version": ended[0].weight_version},
            }
        )

    async def _events(
        self, body: OpenAIBody, outputs: AsyncIterator[tuple[int, Output]]
    ) -> AsyncIterator[dict[str, Any]]:
        head = {"object": body.part_object}
        last: dict[int, Output] = {}
        told: dict[int, int] = {}  # characters of each
        async for index, output in outputs:
            first = last[index].num_tokens if index in last else 0
            text = _settled(self._text(output), output)
            said = body.say(text[told.get(index, 0) :], first)
            yield head | {"choices": [self._choice(body, index, output, said, first)]}
            told[index] = max(told.get(index, 0), len(text))
            last[index] = output
        if body.stream_options.include_usage:
            ended = [output for _, output in sorted(last.items())]
            yield head | {"choices": [], "usage": _usage(body, ended)}

    def _choice(
        self, body: OpenAIBody, index: int, output: Output, said: dict[str, Any], first: int = 0
    ) -> dict[str, Any]:
        """A choice around what is said, with the logprobs of its tokens from `first` on."""
        reason = None if output.finish_reason is None else output.finish_reason["type"]
        logprobs = None
        if output.request.generation.return_logprob:
            tokens = [self._token(token_id) for token_id in output.token_ids[first:]]
            logprobs = body.list_logprobs(tokens, output.logprobs[first:])
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _token(self, token_id: int) -> str:
        tokenizer = self.intake.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode([token_id]))

    def _text(self, output: Output) -> str:
        return reply_text(output, self.intake.tokenizer)


def _check_format(body: OpenAIBody) -> None:
    kind = body.response_format
    if kind and not (isinstance(kind, Mapping) and kind.get("type") == "text"):
        raise unsupported("response_format", kind)


def _message(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message with its parts of text joined, which is what templates read."""
    content = raw.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise BadRequestError(
                f"`messages[{number}].content` must be text: the embedded engine reads nothing else"
            )
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(raw.get("role"), str) or not isinstance(content, str | None):
        raise BadRequestError(f"`messages[{number}]` must have a `role` and a text as `content`")
    return {**raw, "content": content or ""}


def _settled(text: str, output: Output) -> str:
    """The text of a running completion without what may turn out to begin a stop string."""
    asked = output.request.generation
    if output.finish_reason is not None or asked.no_stop_trim:
        return text
    begun = [
        size
        for stop in asked.stop
        for size in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:size])
    ]
    return text[: len(text) - max(begun, default=0)]


def _usage(body: OpenAIBody, outputs: Sequence[Output]) -> dict[str, int]:
    """Tokens read and sampled; the samples of a prompt share its reading."""
    prompt = sum(len(output.request.generation.input_ids) for output in outputs[:: body.n])
    sampled = sum(output.num_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }
