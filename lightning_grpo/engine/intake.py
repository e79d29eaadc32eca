"""Which requests come in: bounded in size, time and number, checked and tokenized off the loop."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.requests import (
    MAX_COMPLETIONS,
    MAX_NAME,
    MAX_STOP,
    MAX_STOPS,
    BadRequestError,
    GenerateBody,
    Generation,
    SamplingBody,
    decode,
    refuse_unsupported,
    shorten,
    unsupported,
)
from lightning_grpo.engine.sampling import as_int64, sample_seed

T = TypeVar("T")
Item = TypeVar("Item")
D = TypeVar("D")

_DEFAULT_SAMPLING = SamplingBody()
_GREEDY_BELOW = 1e-6
_BODY_S = 60.0
"""How long a body may take to come."""
_SMALL = 64 << 10
"""Bodies up to here are read on the event loop, longer ones on a thread, a few at a time."""
_LARGE_AT_ONCE = 4
_MOST_COMPLETIONS = 1 << 16
"""In flight, of all requests together; more are sent away for a moment."""

DETERMINISTIC_SEED = 42
"""The seed of requests without one in deterministic mode, as SGLang's deterministic inference."""


class Intake:
    """Reads the requests of all routes and checks them against a model.

    Args:
        vocab_size: Token ids are below this.
        context_length: Prompt and completion together fit in this.
        end_ids: Tokens that end a completion unless `ignore_eos`.
        tokenizer: For prompts given as text and for stop strings; None if the model has none.
        deterministic: Whether requests without a seed get a fixed one.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        end_ids: frozenset[int],
        tokenizer: PreTrainedTokenizerBase | None,
        deterministic: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.deterministic = deterministic
        self._end_ids = end_ids
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1) if tokenizer else 1
        self._num_open = 0
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        # One thread: tokenizers don't like two.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="intake")

    # ---- reading -------------------------------------------------------------------------------

    async def read(self, request: web.Request, kind: type[T]) -> T:
        """A request's body.

        Raises:
            BadRequestError: It is not one of this kind.
            HTTPRequestTimeout: It does not come.
        """
        if not request.can_read_body or _is_small(request):
            return decode(await _body(request), kind)
        async with self._large:
            body = await _body(request)
            return await self.off_loop(lambda: decode(body, kind))

    async def checked(
        self, request: web.Request, body: GenerateBody
    ) -> tuple[list[Generation], bool]:
        """What `generations` says of a request's body; texts are tokenized off the loop."""
        if body.text is None and _is_small(request):
            return self.generations(body)
        return await self.off_loop(lambda: self.generations(body))

    async def off_loop(self, function: Callable[[], T]) -> T:
        """The result of something that takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    @contextmanager
    def room(self, num_completions: int) -> Iterator[None]:
        """Place for completions among those in flight.

        Raises:
            HTTPServiceUnavailable: There is none now.
        """
        if self._num_open + num_completions > _MOST_COMPLETIONS:
            raise web.HTTPServiceUnavailable(
                text=f"{self._num_open} completions are in flight, of at most {_MOST_COMPLETIONS}"
            )
        self._num_open += num_completions
        try:
            yield
        finally:
            self._num_open -= num_completions

    # ---- checking ------------------------------------------------------------------------------

    def generations(self, body: GenerateBody) -> tuple[list[Generation], bool]:
        """The completions of a request, in the order of the reply, and whether it is a list.

        Raises:
            BadRequestError: Naming the field, the rule and the value.
        """
        refuse_unsupported(body)
        numbers = body.top_logprobs_num
        if any(numbers if isinstance(numbers, list) else [numbers or 0]):
            raise unsupported("top_logprobs_num", numbers)
        if (body.text is None) == (body.input_ids is None):
            raise BadRequestError("exactly one of `text` and `input_ids` must be given")
        single = _is_single(body)
        check_size(1 if single else len(body.text or body.input_ids or ()), body.sampling_params)
        check_names(body)
        prompts = self._prompts(body, single)
        params = [
            per_item(body.sampling_params, _DEFAULT_SAMPLING, i, len(prompts), "sampling_params")
            for i in range(len(prompts))
        ]
        sizes = {p.n or 1 for p in params}
        if len(sizes) > 1:
            raise BadRequestError(
                f"`sampling_params.n` must be the same for all prompts, "
                f"got {shorten(sorted(sizes))}"
            )
        generations: list[Generation] = []
        for index, prompt in enumerate(prompts):
            generations += self._samples(body, index, len(prompts), prompt, params[index])
        if len({g.rid for g in generations}) != len(generations):
            raise BadRequestError(f"`rid` must name each prompt once, got {shorten(body.rid)}")
        return generations, not (single and sizes == {1})

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text.

        Raises:
            BadRequestError: The model has no tokenizer, or the text can't fit in its context.
        """
        if self.tokenizer is None:
            raise BadRequestError("a text needs a tokenizer and the model has none")
        self.check_length(len(text))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def check_length(self, num_characters: int) -> None:
        """Refuse a text that is too long for the context whatever its tokens are.

        Raises:
            BadRequestError: It has more characters than the longest tokens could spell.
        """
        if num_characters > self.context_length * self._longest_token:
            raise BadRequestError(
                f"the text must fit in the context of {self.context_length} tokens, got one of "
                f"{num_characters} characters"
            )

    def _prompts(self, body: GenerateBody, single: bool) -> list[tuple[int, ...]]:
        given = body.text if body.input_ids is None else body.input_ids
        if not given:
            name = "text" if body.input_ids is None else "input_ids"
            raise BadRequestError(f"`{name}` must not be empty")
        if body.input_ids is None:
            texts = [body.text] if isinstance(body.text, str) else body.text or []
            return [self._prompt(self.tokenize(text, True), "text") for text in texts]
        if single:
            return [self._prompt(body.input_ids, "input_ids")]
        return [
            self._prompt(ids if isinstance(ids, list) else [[]], f"input_ids[{i}]")
            for i, ids in enumerate(body.input_ids)
        ]

    def _prompt(self, ids: Sequence[Any], name: str) -> tuple[int, ...]:
        """Check the token ids of one prompt."""
        if not ids:
            raise BadRequestError(f"`{name}` must not be empty")
        if len(ids) > self.context_length:
            raise BadRequestError(
                f"`{name}` must fit in the context of {self.context_length} tokens, got {len(ids)}"
            )
        for position, token in enumerate(ids):
            if not isinstance(token, int):
                raise BadRequestError(
                    f"`{name}[{position}]` must be a token id; all entries must be numbers or all "
                    f"lists, got {shorten(token)}"
                )
            if not 0 <= token < self.vocab_size:
                raise BadRequestError(
                    f"`{name}[{position}]` must be in [0, {self.vocab_size}) (the vocabulary), "
                    f"got {shorten(token)}"
                )
        return tuple(ids)

    def _samples(
        self,
        body: GenerateBody,
        index: int,
        count: int,
        prompt: tuple[int, ...],
        params: SamplingBody,
    ) -> list[Generation]:
        check_sampling(params, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise BadRequestError("`sampling_params.stop` needs a tokenizer and the model has none")
        start = per_item(body.logprob_start_len, -1, index, count, "logprob_start_len")
        if not -1 <= start < len(prompt):
            raise BadRequestError(
                f"`logprob_start_len` must be in [-1, {len(prompt)}) (the prompt), got "
                f"{shorten(start)}"
            )
        seed = params.sampling_seed
        if seed is None:
            seed = DETERMINISTIC_SEED if self.deterministic else secrets.randbits(63)
        return_logprob = per_item(body.return_logprob, False, index, count, "return_logprob")
        temperature = 1.0 if params.temperature is None else params.temperature
        frozen = temperature < _GREEDY_BELOW
        top_k = self.vocab_size if params.top_k in (None, -1) else params.top_k or 0
        ends = self._end_ids | frozenset(params.stop_token_ids or ())
        first = Generation(
            rid=_rid(body, index, count),
            input_ids=prompt,
            max_new_tokens=self._budget(prompt, params),
            temperature=1.0 if frozen else temperature,
            greedy=frozen or top_k == 1,
            top_p=1.0 if params.top_p is None else params.top_p,
            top_k=top_k,
            min_p=params.min_p or 0.0,
            min_new_tokens=params.min_new_tokens or 0,
            seed=as_int64(seed),
            stop=_stops(params),
            stop_ids=frozenset() if params.ignore_eos else ends,
            return_logprob=return_logprob,
            logprob_start=start if return_logprob and start >= 0 else None,
            extra_key=per_item(body.extra_key, None, index, count, "extra_key"),
            skip_special_tokens=params.skip_special_tokens is not False,
            spaces_between_special_tokens=params.spaces_between_special_tokens is not False,
            no_stop_trim=bool(params.no_stop_trim),
        )
        if (params.n or 1) == 1:
            return [first]
        return [
            msgspec.structs.replace(
                first, rid=f"{first.rid}_{sample}", seed=sample_seed(first.seed, sample)
            )
            for sample in range(params.n or 1)
        ]

    def _budget(self, prompt: tuple[int, ...], params: SamplingBody) -> int:
        room = self.context_length - len(prompt)
        budget = room if params.max_new_tokens is None else params.max_new_tokens
        if budget > room:
            raise BadRequestError(
                f"the prompt and `sampling_params.max_new_tokens` must fit in the context of "
                f"{self.context_length} tokens, got {len(prompt)} + {shorten(budget)}"
            )
        return budget


def per_item(
    value: Item | list[Item] | None, default: D, index: int, count: int, name: str
) -> Item | D:
    """Entry `index` of a parameter that is one for all or a list with one for each."""
    if value is None:
        return default
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise BadRequestError(
            f"`{name}` must be one value or one for each of the {count} prompts, "
            f"got {len(value)} values"
        )
    return value[index]


def check_size(num_prompts: int, params: SamplingBody | list[SamplingBody] | None) -> None:
    """Refuse a request for more completions than one may ask for, before any is made."""
    each = params if isinstance(params, list) else [params or _DEFAULT_SAMPLING]
    most = max([p.n or 1 for p in each], default=1)
    if num_prompts * most > MAX_COMPLETIONS:
        raise BadRequestError(
            f"the prompts times `sampling_params.n` must be at most {MAX_COMPLETIONS}, got "
            f"{num_prompts} x {shorten(most)}. Way out: several requests"
        )


def check_names(body: GenerateBody) -> None:
    """Refuse names that are texts."""
    for name, value in (("rid", body.rid), ("extra_key", body.extra_key)):
        for each in value if isinstance(value, list) else [value or ""]:
            if len(each) > MAX_NAME:
                raise BadRequestError(
                    f"`{name}` must be at most {MAX_NAME} characters, got {len(each)}"
                )


def check_sampling(params: SamplingBody, vocab_size: int) -> None:
    """Check the rules on sampling that a field's type can't state."""
    refuse_unsupported(params, "sampling_params.")
    ids, stops = params.stop_token_ids or (), _stops(params)
    most = params.max_new_tokens
    rules: dict[str, tuple[bool, str]] = {
        "top_k": (params.top_k != 0, "-1 (off) or at least 1"),
        "min_new_tokens": (
            most is None or (params.min_new_tokens or 0) <= most,
            f"in [0, max_new_tokens ({shorten(most)})]",
        ),
        "stop_token_ids": (
            len(ids) <= vocab_size and all(0 <= token < vocab_size for token in ids),
            f"at most {vocab_size} token ids in [0, {vocab_size})",
        ),
        "stop": (
            len(stops) <= MAX_STOPS and all(0 < len(each) <= MAX_STOP for each in stops),
            f"a string or up to {MAX_STOPS}, none empty or longer than {MAX_STOP}",
        ),
    }
    for name, (kept, rule) in rules.items():
        if not kept:
            value = shorten(getattr(params, name))
            raise BadRequestError(f"`sampling_params.{name}` must be {rule}, got {value}")


def _stops(params: SamplingBody) -> tuple[str, ...]:
    return (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())


def _is_single(body: GenerateBody) -> bool:
    """Whether the request has one prompt, not a list of them."""
    if isinstance(body.text, str):
        return True
    return bool(body.input_ids) and not isinstance((body.input_ids or [0])[0], list)


def _rid(body: GenerateBody, index: int, count: int) -> str:
    if isinstance(body.rid, str) and count > 1:
        return f"{body.rid}_{index}"
    return per_item(body.rid, None, index, count, "rid") or uuid.uuid4().hex


def _is_small(request: web.Request) -> bool:
    return request.content_length is not None and request.content_length <= _SMALL


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {_BODY_S:g} s") from None
