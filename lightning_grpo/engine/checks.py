"""The rules on generation requests that types alone can't say."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

from lightning_grpo.engine.errors import BadRequestError
from lightning_grpo.engine.protocol import (
    MAX_COMPLETIONS,
    MAX_NAME,
    MAX_STOP,
    MAX_STOPS,
    GenerateBody,
    SamplingBody,
    shorten,
)

T = TypeVar("T")
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


def per_item(value: T | list[T] | None, default: D, index: int, count: int, name: str) -> T | D:
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
