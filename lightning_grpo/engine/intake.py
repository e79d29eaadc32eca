"""Requests are checked, bounded and tokenized before anything is made for them."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    shorten,
)
from lightning_grpo.engine.sampling import as_int64, sample_seed

Item = TypeVar("Item")
D = TypeVar("D")

_UNSUPPORTED_SAMPLING: dict[str, Any] = {
    "stop_regex": None,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "custom_params": None,
    "logit_bias": None,
}
_UNSUPPORTED = (
    "input_embeds",
    "image_data",
    "audio_data",
    "video_data",
    "lora_path",
    "token_ids_logprob",
    "return_hidden_states",
    "return_routed_experts",
    "return_sampling_mask",
    "custom_logit_processor",
    "session_params",
    "return_text_in_logprobs",
)


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


def is_single(body: GenerateBody) -> bool:
    """Whether the request has one prompt, not a list of them."""
    if isinstance(body.text, str):
        return True
    ids = body.input_ids
    return ids is not None and bool(ids) and not isinstance(ids[0], list)


def refuse_unsupported(body: GenerateBody) -> None:
    """Refuse what would change the answer and isn't implemented."""
    for name in _UNSUPPORTED:
        value = getattr(body, name)
        if value not in (None, False):
            raise BadRequestError(
                f"`{name}` is not supported by the embedded engine, got {shorten(value)}"
            )
    numbers = body.top_logprobs_num
    if any(numbers if isinstance(numbers, list) else [numbers or 0]):
        raise BadRequestError(
            f"`top_logprobs_num` is not supported by the embedded engine, got {shorten(numbers)}"
        )


def check_size(num_prompts: int, params: SamplingBody | list[SamplingBody] | None) -> None:
    """Refuse a request for more completions than one may ask for, before any is made."""
    each = params if isinstance(params, list) else [params or SamplingBody()]
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


def check_prompt(
    ids: Sequence[Any], vocab_size: int, context_length: int, name: str
) -> tuple[int, ...]:
    """Check the token ids of one prompt."""
    if not ids:
        raise BadRequestError(f"`{name}` must not be empty")
    if len(ids) > context_length:
        raise BadRequestError(
            f"`{name}` must fit in the context of {context_length} tokens, got {len(ids)}"
        )
    for position, token in enumerate(ids):
        if not isinstance(token, int):
            raise BadRequestError(
                f"`{name}[{position}]` must be a token id; all entries must be numbers or all "
                f"lists, got {shorten(token)}"
            )
        if not 0 <= token < vocab_size:
            raise BadRequestError(
                f"`{name}[{position}]` must be in [0, {vocab_size}) (the vocabulary), "
                f"got {shorten(token)}"
            )
    return tuple(ids)


def check_sampling(params: SamplingBody, vocab_size: int) -> None:
    """Check the rules on each sampling parameter that needs no prompt."""
    _refuse_unsupported_sampling(params)
    temperature = params.temperature
    rules: list[tuple[str, Any, bool, str]] = [
        (
            "temperature",
            temperature,
            temperature is None or 0 <= temperature < float("inf"),
            "finite and >= 0 (0 is greedy)",
        ),
        ("top_p", params.top_p, params.top_p is None or 0 < params.top_p <= 1, "in (0, 1]"),
        (
            "top_k",
            params.top_k,
            params.top_k is None or params.top_k == -1 or params.top_k >= 1,
            "-1 (off) or at least 1",
        ),
        ("min_p", params.min_p, params.min_p is None or 0 <= params.min_p <= 1, "in [0, 1]"),
        ("n", params.n, params.n is None or params.n >= 1, "at least 1"),
        (
            "max_new_tokens",
            params.max_new_tokens,
            params.max_new_tokens is None or params.max_new_tokens >= 0,
            "at least 0",
        ),
        (
            "min_new_tokens",
            params.min_new_tokens,
            params.min_new_tokens is None
            or (
                params.min_new_tokens >= 0
                and (
                    params.max_new_tokens is None or params.min_new_tokens <= params.max_new_tokens
                )
            ),
            f"in [0, max_new_tokens ({shorten(params.max_new_tokens)})]",
        ),
        (
            "stop_token_ids",
            params.stop_token_ids,
            len(params.stop_token_ids or ()) <= vocab_size
            and all(0 <= token < vocab_size for token in params.stop_token_ids or ()),
            f"at most {vocab_size} token ids in [0, {vocab_size})",
        ),
        (
            "stop",
            params.stop,
            _are_stops(params.stop),
            f"a string or up to {MAX_STOPS}, none empty or longer than {MAX_STOP}",
        ),
    ]
    for name, value, kept, rule in rules:
        if not kept:
            raise BadRequestError(f"`sampling_params.{name}` must be {rule}, got {shorten(value)}")


def _are_stops(stop: str | list[str] | None) -> bool:
    several = stop if isinstance(stop, list) else [] if stop is None else [stop]
    return len(several) <= MAX_STOPS and all(0 < len(each) <= MAX_STOP for each in several)


def _refuse_unsupported_sampling(params: SamplingBody) -> None:
    for name, neutral in _UNSUPPORTED_SAMPLING.items():
        value = getattr(params, name)
        if value is not None and value != neutral:
            raise BadRequestError(
                f"`sampling_params.{name}` is not supported by the embedded engine, "
                f"got {shorten(value)}"
            )


def new_rid() -> str:
    """A name for a request that has none."""
    return uuid.uuid4().hex


DETERMINISTIC_SEED = 42
"""The seed of requests without one in deterministic mode, as SGLang's deterministic inference."""

_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Intake:
    """Checks requests against a model.

    Attributes:
        vocab_size: Token ids are below this.
        context_length: Prompt and completion together fit in this.
        end_ids: Tokens that end a completion unless `ignore_eos`.
        tokenizer: For prompts given as text and for stop strings; None if the model has none.
        deterministic: Whether requests without a seed get a fixed one.
        longest_token: Characters of the longest token: a text longer than as many of them as fit
            in the context is refused before it is tokenized.
    """

    vocab_size: int
    context_length: int
    end_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None
    deterministic: bool = False
    longest_token: int = 256

    def generations(self, body: GenerateBody) -> tuple[list[Generation], bool]:
        """The completions of a request, in the order of the reply, and whether it is a list.

        Raises:
            BadRequestError: Naming the field, the rule and the value.
        """
        refuse_unsupported(body)
        check_size(self._num_prompts(body), body.sampling_params)
        check_names(body)
        prompts = self._prompts(body)
        count = len(prompts)
        params = [
            per_item(body.sampling_params, SamplingBody(), i, count, "sampling_params")
            for i in range(count)
        ]
        sizes = {p.n or 1 for p in params}
        if len(sizes) > 1:
            raise BadRequestError(
                f"`sampling_params.n` must be the same for all prompts, "
                f"got {shorten(sorted(sizes))}"
            )
        num_samples = sizes.pop()
        generations: list[Generation] = []
        for index, prompt in enumerate(prompts):
            check_sampling(params[index], self.vocab_size)
            generations += self._samples(body, index, count, prompt, params[index])
        rids = {g.rid for g in generations}
        if len(rids) != len(generations):
            raise BadRequestError(f"`rid` must name each prompt once, got {shorten(body.rid)}")
        return generations, not (is_single(body) and num_samples == 1)

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
            BadRequestError: It is.
        """
        if num_characters > self.context_length * self.longest_token:
            raise BadRequestError(
                f"the text must fit in the context of {self.context_length} tokens, got one of "
                f"{num_characters} characters"
            )

    @staticmethod
    def _num_prompts(body: GenerateBody) -> int:
        if (body.text is None) == (body.input_ids is None):
            raise BadRequestError("exactly one of `text` and `input_ids` must be given")
        return 1 if is_single(body) else len(body.text or body.input_ids or ())

    def _prompts(self, body: GenerateBody) -> list[tuple[int, ...]]:
        single = is_single(body)
        if body.input_ids is not None:
            if not body.input_ids:
                raise BadRequestError("`input_ids` must not be empty")
            if single:
                return [self._checked(body.input_ids, "input_ids")]
            return [
                self._checked(ids if isinstance(ids, list) else [[]], f"input_ids[{i}]")
                for i, ids in enumerate(body.input_ids)
            ]
        texts = [body.text] if isinstance(body.text, str) else body.text or []
        if not texts:
            raise BadRequestError("`text` must not be empty")
        return [
            self._checked(self.tokenize(text, add_special_tokens=True), "text") for text in texts
        ]

    def _checked(self, ids: Sequence[Any], name: str) -> tuple[int, ...]:
        return check_prompt(ids, self.vocab_size, self.context_length, name)

    def _samples(
        self,
        body: GenerateBody,
        index: int,
        count: int,
        prompt: tuple[int, ...],
        params: SamplingBody,
    ) -> list[Generation]:
        budget = self._budget(prompt, params)
        rid = self._rid(body, index, count)
        seed = params.sampling_seed
        if seed is None:
            seed = DETERMINISTIC_SEED if self.deterministic else secrets.randbits(63)
        return_logprob = per_item(body.return_logprob, False, index, count, "return_logprob")
        start = per_item(body.logprob_start_len, -1, index, count, "logprob_start_len")
        if not -1 <= start < len(prompt):
            raise BadRequestError(
                f"`logprob_start_len` must be in [-1, {len(prompt)}) (the prompt), got "
                f"{shorten(start)}"
            )
        shared: dict[str, Any] = self._shared(params) | {
            "input_ids": prompt,
            "max_new_tokens": budget,
            "return_logprob": return_logprob,
            "logprob_start": start if return_logprob and start >= 0 else None,
            "extra_key": per_item(body.extra_key, None, index, count, "extra_key"),
        }
        num_samples = params.n or 1
        return [
            Generation(
                rid=rid if num_samples == 1 else f"{rid}_{sample}",
                seed=sample_seed(as_int64(seed), sample),
                sample_index=sample,
                **shared,
            )
            for sample in range(num_samples)
        ]

    def _shared(self, params: SamplingBody) -> dict[str, Any]:
        stop = params.stop or ()
        if stop and self.tokenizer is None:
            raise BadRequestError("`sampling_params.stop` needs a tokenizer and the model has none")
        temperature = 1.0 if params.temperature is None else params.temperature
        frozen = temperature < _GREEDY_BELOW
        top_k = self.vocab_size if params.top_k in (None, -1) else params.top_k
        ends = set() if params.ignore_eos else self.end_ids | set(params.stop_token_ids or ())
        return {
            "temperature": 1.0 if frozen else temperature,
            "greedy": frozen or top_k == 1,
            "top_p": 1.0 if params.top_p is None else params.top_p,
            "top_k": top_k,
            "min_p": params.min_p or 0.0,
            "min_new_tokens": params.min_new_tokens or 0,
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "stop_ids": tuple(sorted(ends)),
            "skip_special_tokens": params.skip_special_tokens is not False,
            "spaces_between_special_tokens": params.spaces_between_special_tokens is not False,
            "no_stop_trim": bool(params.no_stop_trim),
        }

    def _budget(self, prompt: tuple[int, ...], params: SamplingBody) -> int:
        room = self.context_length - len(prompt)
        budget = room if params.max_new_tokens is None else params.max_new_tokens
        if room < 0 or budget > room:
            raise BadRequestError(
                f"the prompt and `sampling_params.max_new_tokens` must fit in the context of "
                f"{self.context_length} tokens, got {len(prompt)} + {shorten(budget)}"
            )
        return budget

    @staticmethod
    def _rid(body: GenerateBody, index: int, count: int) -> str:
        if isinstance(body.rid, str) and count > 1:
            return f"{body.rid}_{index}"
        return per_item(body.rid, None, index, count, "rid") or new_rid()
