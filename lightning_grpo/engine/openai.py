"""OpenAI's endpoints over the engine: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

Fields that would change the answer and aren't implemented are refused; other unknown ones are
ignored, and so is the model's name, as SGLang does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from lightning_grpo.engine.intake import Intake
from lightning_grpo.engine.replies import event_stream, json_response, reply_text, sampled
from lightning_grpo.engine.requests import (
    BadRequestError,
    GenerateBody,
    Generation,
    Output,
    decode,
    unsupported,
)
from lightning_grpo.engine.scheduler import EngineThread
from lightning_grpo.templates import check_template

_COMPLETION_TOKENS = 16
"""OpenAI's default length of a completion; a chat's is what the context leaves."""
_DECIDED = {
    *("chat_template", "documents", "tools", "tokenizer_kwargs", "return_tensors", "padding"),
    *("truncation", "max_length", "return_assistant_tokens_mask", "continue_final_message"),
}
"""Arguments of transformers that are no variables of a template: another template is a program."""


_SAMPLING = {"min_new_tokens": "min_tokens", "sampling_seed": "seed"} | {
    name: name
    for name in (
        *("n", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos"),
        *("skip_special_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("regex", "ebnf"),
    )
}
"""The engine's sampling parameters that OpenAI's body has, and their names in it."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`."""

    include_usage: bool = False


class SharedBody(msgspec.Struct, kw_only=True):
    """What both kinds of request may say; null means the default."""

    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    regex: Any = None
    ebnf: Any = None
    logit_bias: Any = None
    response_format: Any = None


class ChatBody(SharedBody, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    audio: Any = None


class CompletionBody(SharedBody, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: Any  # text, token ids, or a list of either
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class OpenAIRoutes:
    """Words requests as the engine's own and its outputs as OpenAI's replies.

    Args:
        engine: Generates.
        intake: Reads and checks requests.
        model: The name of the model that is served by now.
    """

    def __init__(self, engine: EngineThread, intake: Intake, model: Callable[[], str]) -> None:
        self._engine = engine
        self._intake = intake
        self._model = model
        self._started = int(time.time())

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._named)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._chat)

    def _about_model(self) -> dict[str, Any]:
        return {
            "id": self._model(),
            "object": "model",
            "created": self._started,
            "owned_by": "lightning_grpo",
            "max_model_len": self._intake.context_length,
        }

    async def _models(self, _: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._about_model()]})

    async def _named(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self._model():
            raise web.HTTPNotFound(text=f"the model {name!r} is not served, {self._model()!r} is")
        return json_response(self._about_model())

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._intake.read(request, CompletionBody)
        _refuse(body, "echo", "suffix", "best_of")
        if body.logprobs:
            raise BadRequestError(
                "`logprobs` must be 0 (those of the sampled tokens): others are not supported by "
                f"the embedded engine, got {body.logprobs}"
            )
        limit = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        prompt: dict[str, Any] = {"input_ids": body.prompt}
        several = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if several and all(isinstance(each, str) for each in several):
            prompt = {"text": body.prompt}
        asked = _asked(body, limit, prompt, return_logprob=body.logprobs is not None)
        return await self._answer(request, body, asked, _COMPLETION)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._intake.read(request, ChatBody)
        _refuse(body, "top_logprobs", "functions", "audio")
        if body.tools and body.tool_choice != "none":
            raise BadRequestError("`tools` are not supported by the embedded engine")
        limit = body.max_completion_tokens
        limit = body.max_tokens if limit is None else limit
        prompt = {"input_ids": await self._intake.off_loop(lambda: self._rendered(body))}
        asked = _asked(body, limit, prompt, return_logprob=bool(body.logprobs))
        return await self._answer(request, body, asked, _CHAT)

    def _rendered(self, body: ChatBody) -> list[int]:
        tokenizer = self._intake.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise BadRequestError(
                "`messages` need a chat template, and the model's tokenizer has none: use "
                "/v1/completions"
            )
        messages = [_message(each, number) for number, each in enumerate(body.messages)]
        self._intake.check_length(sum(len(str(each.get("content"))) for each in messages))
        decided = sorted(_DECIDED & (body.chat_template_kwargs or {}).keys())
        if decided:
            raise BadRequestError(
                f"`chat_template_kwargs` must be variables of the model's template, got {decided}"
            )
        how: dict[str, Any] = {"add_generation_prompt": True} | (body.chat_template_kwargs or {})
        how |= {"tokenize": True, "return_dict": False}
        try:
            check_template(tokenizer, messages)
            ids: Any = tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # whatever the template raises about these messages
            said = str(error)[:400]
            raise BadRequestError(f"`messages` don't suit the chat template: {said}") from error
        return list(ids)

    async def _answer(
        self, request: web.Request, body: SharedBody, asked: GenerateBody, words: _Words
    ) -> web.StreamResponse:
        generations, _ = await self._intake.checked(request, asked)
        head = {
            "id": f"{words.prefix}-{generations[0].rid}",
            "created": int(time.time()),
            "model": self._model(),
        }
        streams = bool(body.stream)
        with self._intake.room(len(generations)):
            async with sampled(self._engine, generations, stream=streams) as outputs:
                if streams:
                    events = self._events(body, generations, words, outputs)
                    return await event_stream(request, (head | event async for event in events))
                ended = {index: output async for index, output in outputs}
        choices = []
        for index, generation in enumerate(generations):
            said = words.whole(self._text(generation, ended[index]))
            choices.append(self._choice(words, index, generation, ended[index], said))
        return json_response(
            {
                **head,
                "object": words.whole_object,
                "choices": choices,
                "usage": _usage(generations, ended, body.n or 1),
                "metadata": {"weight_version": ended[0].weight_version},
            }
        )

    async def _events(
        self,
        body: SharedBody,
        generations: list[Generation],
        words: _Words,
        outputs: AsyncIterator[tuple[int, Output]],
    ) -> AsyncIterator[dict[str, Any]]:
        head = {"object": words.part_object}
        last: dict[int, Output] = {}
        told = [0] * len(generations)  # characters of each
        async for index, output in outputs:
            generation = generations[index]
            first = len(last[index].token_ids) if index in last else 0
            text = _settled(self._text(generation, output), generation, output)
            said = words.part(text[told[index] :], first)
            choice = self._choice(words, index, generation, output, said, first)
            yield head | {"choices": [choice]}
            told[index] = max(told[index], len(text))
            last[index] = output
        if body.stream_options is not None and body.stream_options.include_usage:
            yield head | {"choices": [], "usage": _usage(generations, last, body.n or 1)}

    def _choice(
        self,
        words: _Words,
        index: int,
        generation: Generation,
        output: Output,
        said: dict[str, Any],
        first: int = 0,
    ) -> dict[str, Any]:
        """A choice around what is said, with the logprobs of its tokens from `first` on."""
        reason = None if output.finish_reason is None else output.finish_reason["type"]
        logprobs = None
        if generation.return_logprob:
            tokens = [self._token(token_id) for token_id in output.token_ids[first:]]
            logprobs = words.logprobs(tokens, output.logprobs[first:])
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _token(self, token_id: int) -> str:
        tokenizer = self._intake.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode([token_id]))

    def _text(self, generation: Generation, output: Output) -> str:
        tokenizer = self._intake.tokenizer
        return "" if tokenizer is None else reply_text(generation, output, tokenizer)


@dataclass(frozen=True)
class _Words:
    """How one kind of reply is worded.

    Attributes:
        prefix: Start of the reply's id.
        whole_object: `object` of a whole reply.
        part_object: `object` of an event in a stream.
        whole: Words the text of a finished completion.
        part: Words new text of a stream, given the position of its first token.
        logprobs: Words the texts of tokens and their logprobs.
    """

    prefix: str
    whole_object: str
    part_object: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str, int], dict[str, Any]]
    logprobs: Callable[[list[str], list[float]], dict[str, Any]]


def _chat_delta(text: str, first: int) -> dict[str, Any]:
    return {"delta": {"content": text} if first else {"role": "assistant", "content": text}}


def _chat_logprobs(tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
    content = [
        {"token": t, "bytes": list(t.encode()), "logprob": value, "top_logprobs": []}
        for t, value in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": None,
        "text_offset": [],
    }


_CHAT = _Words(
    *("chatcmpl", "chat.completion", "chat.completion.chunk"),
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    part=_chat_delta,
    logprobs=_chat_logprobs,
)
_COMPLETION = _Words(
    *("cmpl", "text_completion", "text_completion"),
    whole=lambda text: {"text": text},
    part=lambda text, _: {"text": text},
    logprobs=_completion_logprobs,
)


def _refuse(body: SharedBody, *names: str) -> None:
    """Refuse what would change the answer and isn't implemented."""
    kind = body.response_format
    if not (isinstance(kind, Mapping) and kind.get("type") == "text"):
        names = (*names, "response_format")
    for name in names:
        if value := getattr(body, name):
            raise unsupported(name, value)


def _asked(
    body: SharedBody, limit: int | None, prompt: dict[str, Any], *, return_logprob: bool
) -> GenerateBody:
    """The same request in the engine's own words."""
    sampling = {name: getattr(body, theirs) for name, theirs in _SAMPLING.items()}
    sampling |= {"max_new_tokens": limit, "logit_bias": body.logit_bias or None}
    # Through its types: the prompt is whatever the client sent.
    whole = {**prompt, "sampling_params": sampling, "return_logprob": return_logprob}
    return decode(msgspec.json.encode(whole), GenerateBody)


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


def _settled(text: str, generation: Generation, output: Output) -> str:
    """The text of a running completion without what may turn out to begin a stop string."""
    if output.finish_reason is not None or generation.no_stop_trim:
        return text
    begun = [
        size
        for stop in generation.stop
        for size in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:size])
    ]
    return text[: len(text) - max(begun, default=0)]


def _usage(
    generations: list[Generation], outputs: Mapping[int, Output], num_samples: int
) -> dict[str, int]:
    """Tokens read and sampled; the samples of a prompt share its reading."""
    prompt = sum(len(generation.input_ids) for generation in generations[::num_samples])
    sampled = sum(len(output.token_ids) for output in outputs.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }
