"""OpenAI's endpoints over the engine: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

Fields that would change the answer and aren't implemented are refused; other unknown ones are
ignored, and so is the model's name, as SGLang does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.admission import Admission
from lightning_grpo.engine.intake import Intake
from lightning_grpo.engine.replies import Unread, generate_reply, json_response
from lightning_grpo.engine.requests import (
    BadRequestError,
    GenerateBody,
    Generation,
    Output,
    Request,
    SamplingBody,
    decode,
    shorten,
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
        intake: Checks requests.
        admission: Reads them.
        model: The name of the model that is served by now.
    """

    def __init__(
        self,
        engine: EngineThread,
        intake: Intake,
        admission: Admission,
        model: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._intake = intake
        self._admission = admission
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
        body = await self._admission.read(request, CompletionBody)
        _refuse(body, ("echo", "suffix", "best_of"))
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
        words = _CompletionWords(self._intake.tokenizer, body.logprobs is not None)
        return await self._answer(request, body, asked, words)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._admission.read(request, ChatBody)
        _refuse(body, ("top_logprobs", "functions", "audio"))
        if body.tools and body.tool_choice != "none":
            raise BadRequestError("`tools` are not supported by the embedded engine")
        limit = body.max_completion_tokens
        limit = body.max_tokens if limit is None else limit
        prompt = {"input_ids": await self._admission.off_loop(lambda: self._rendered(body))}
        asked = _asked(body, limit, prompt, return_logprob=bool(body.logprobs))
        words = _ChatWords(self._intake.tokenizer, bool(body.logprobs))
        return await self._answer(request, body, asked, words)

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
        self,
        request: web.Request,
        body: SharedBody,
        asked: GenerateBody,
        words: _Words,
    ) -> web.StreamResponse:
        generations, _ = await self._admission.checked(request, self._intake, asked)
        with self._admission.room(len(generations)):
            return await self._run(request, body, generations, words)

    async def _run(
        self,
        request: web.Request,
        body: SharedBody,
        generations: list[Generation],
        words: _Words,
    ) -> web.StreamResponse:
        head = {
            "id": f"{words.prefix}-{generations[0].rid}",
            "created": int(time.time()),
            "model": self._model(),
        }
        if body.stream:
            return await self._stream(request, body, generations, words, head)
        ended: dict[int, Output] = {}
        async with aclosing(self._outputs(generations, stream=False)) as outputs:
            async for index, output in outputs:
                ended[index] = output
        choices = [
            words.whole(index, self._text(generation, ended[index]), ended[index])
            for index, generation in enumerate(generations)
        ]
        return json_response(
            {
                **head,
                "object": words.whole_object,
                "choices": choices,
                "usage": _usage(generations, ended, body.n or 1),
                "metadata": {"weight_version": ended[0].weight_version},
            }
        )

    async def _stream(
        self,
        request: web.Request,
        body: SharedBody,
        generations: list[Generation],
        words: _Words,
        head: dict[str, Any],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        head = {**head, "object": words.part_object}
        told = [_Told() for _ in generations]
        last: dict[int, Output] = {}

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

        async with aclosing(self._outputs(generations, stream=True)) as outputs:
            await response.prepare(request)
            async for index, output in outputs:
                last[index] = output
                text = _settled(self._text(generations[index], output), generations[index], output)
                part = words.part(index, told[index].news(text, output), output)
                await send({**head, "choices": [part]})
        if body.stream_options is not None and body.stream_options.include_usage:
            await send({**head, "choices": [], "usage": _usage(generations, last, body.n or 1)})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _outputs(
        self, generations: list[Generation], *, stream: bool
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """Each output that is told of, until all have ended; leaving early aborts the others."""
        unread = Unread()

        def listener(index: int) -> Callable[[Output], None]:
            return lambda output: unread.put(index, output)

        requests = [Request(g, listener(i), stream=stream) for i, g in enumerate(generations)]
        running = {generation.rid for generation in generations}
        try:
            await self._engine.call(lambda s: s.submit(requests))
            while running:
                index, output = await unread.get()
                if output.finish_reason is not None:
                    running.discard(generations[index].rid)
                yield index, output
        finally:
            if running:
                self._engine.post(lambda s: s.abort(sorted(running)))

    def _text(self, generation: Generation, output: Output) -> str:
        reply = generate_reply(generation, output, self._intake.tokenizer, 0.0)
        return str(reply["text"])


class _Told:
    """What a stream has told of one completion."""

    def __init__(self) -> None:
        self.num_characters = 0
        self.num_tokens = 0

    def news(self, text: str, output: Output) -> tuple[str, int]:
        """The text that is new, and the first token that is."""
        found = text[self.num_characters :], self.num_tokens
        self.num_characters = max(self.num_characters, len(text))
        self.num_tokens = len(output.token_ids)
        return found


class _Words:
    """How one kind of reply is worded."""

    prefix: str
    whole_object: str
    part_object: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, with_logprobs: bool) -> None:
        self.tokenizer = tokenizer
        self.with_logprobs = with_logprobs

    def whole(self, index: int, text: str, output: Output) -> dict[str, Any]:
        """The choice of a finished completion."""
        return self.worded(index, self.body(text), output, 0, text)

    def part(self, index: int, news: tuple[str, int], output: Output) -> dict[str, Any]:
        """The choice of an event in a stream."""
        text, first = news
        return self.worded(index, self.delta(text, first), output, first, text)

    def worded(
        self, index: int, said: dict[str, Any], output: Output, first: int, text: str
    ) -> dict[str, Any]:
        """A choice around what is said."""
        reason = None if output.finish_reason is None else output.finish_reason["type"]
        pairs = list(zip(output.token_ids, output.logprobs, strict=True))[first:]
        logprobs = self.logprobs(pairs, text) if self.with_logprobs else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def body(self, text: str) -> dict[str, Any]:
        """What a finished completion says."""
        raise NotImplementedError

    def delta(self, text: str, first: int) -> dict[str, Any]:
        """What an event adds; `first` is the position of its first token."""
        raise NotImplementedError

    def logprobs(self, pairs: list[tuple[int, float]], text: str) -> dict[str, Any]:
        """Tokens with their logprobs."""
        raise NotImplementedError

    def token(self, token_id: int) -> str:
        """The text of one token."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode([token_id]))


class _ChatWords(_Words):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    def body(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, first: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if not first else {"content": text}}

    def logprobs(self, pairs: list[tuple[int, float]], text: str) -> dict[str, Any]:
        tokens = [(self.token(token_id), value) for token_id, value in pairs]
        content = [
            {"token": t, "bytes": list(t.encode()), "logprob": value, "top_logprobs": []}
            for t, value in tokens
        ]
        return {"content": content, "refusal": None}


class _CompletionWords(_Words):
    prefix = "cmpl"
    whole_object = part_object = "text_completion"

    def body(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, first: int) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, pairs: list[tuple[int, float]], text: str) -> dict[str, Any]:
        return {
            "tokens": [self.token(token_id) for token_id, _ in pairs],
            "token_logprobs": [value for _, value in pairs],
            "top_logprobs": None,
            "text_offset": [],
        }


def _refuse(body: SharedBody, names: tuple[str, ...]) -> None:
    """Refuse what would change the answer and isn't implemented."""
    for name in names:
        value = getattr(body, name)
        if value:
            raise BadRequestError(
                f"`{name}` is not supported by the embedded engine, got {shorten(value)}"
            )
    kind = body.response_format
    if kind and not (isinstance(kind, Mapping) and kind.get("type") == "text"):
        raise BadRequestError(
            f"`response_format` is not supported by the embedded engine, got {shorten(kind)}"
        )


def _asked(
    body: SharedBody, limit: int | None, prompt: dict[str, Any], *, return_logprob: bool
) -> GenerateBody:
    """The same request in the engine's own words."""
    sampling = SamplingBody(
        max_new_tokens=limit,
        n=body.n,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        min_new_tokens=body.min_tokens,
        sampling_seed=body.seed,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        regex=body.regex,
        ebnf=body.ebnf,
        logit_bias=body.logit_bias or None,
    )
    # Through its types once more: the prompt is whatever the client sent.
    whole = {**prompt, "sampling_params": msgspec.to_builtins(sampling)}
    return decode(msgspec.json.encode({**whole, "return_logprob": return_logprob}), GenerateBody)


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
