"""The requests of SGLang's native HTTP API, typed and checked.

Unknown keys beside `sampling_params` are ignored, as SGLang does. An unknown sampling key is an
error here (SGLang answers 500). What the engine lacks is refused rather than ignored.
"""

from __future__ import annotations

import difflib
import re
import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from lightning_grpo.engine.errors import BadRequestError

T = TypeVar("T")
D = TypeVar("D")

_SHOWN = 80
_UNKNOWN = re.compile(r"unknown field `(.*)`")
_AT = re.compile(r"^(?P<what>.*) - at `\$(?P<path>.*)`$")
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


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of `/generate`; null means the default everywhere."""

    max_new_tokens: int | None = 128
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_new_tokens: int | None = None
    n: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    sampling_seed: int | None = None
    stream_interval: int | None = None
    stop_regex: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    custom_params: Any = None
    logit_bias: Any = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """The body of `/generate`."""

    input_ids: list[int | list[int]] | None = None
    text: str | list[str] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    stream: bool = False
    input_embeds: Any = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    lora_path: Any = None
    token_ids_logprob: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    return_sampling_mask: Any = None
    custom_logit_processor: Any = None
    session_params: Any = None
    return_text_in_logprobs: Any = None


class PauseBody(msgspec.Struct, kw_only=True):
    """The body of `/pause_generation`."""

    mode: str = "abort"


class AbortBody(msgspec.Struct, kw_only=True):
    """The body of `/abort_request`."""

    rid: str | None = None
    abort_all: bool = False


class DiskUpdateBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weights_from_disk`."""

    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class InitGroupBody(msgspec.Struct, kw_only=True):
    """The body of `/init_weights_update_group`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroupBody(msgspec.Struct, kw_only=True):
    """The body of `/destroy_weights_update_group`."""

    group_name: str = "weight_update_group"


class DistributedUpdateBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weights_from_distributed`."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None


class VersionBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weight_version`."""

    new_version: str
    abort_all_requests: bool = True


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One completion to sample: one prompt, one index of `n`.

    Attributes:
        rid: Name of the request.
        input_ids: Token ids of the prompt.
        max_new_tokens: Longest completion; 0 only scores the prompt.
        temperature: What logits are divided by (1 when greedy).
        greedy: Take the likeliest token.
        top_p: Nucleus mass kept; 1 keeps all.
        top_k: Tokens kept; the vocabulary's size keeps all.
        min_p: Least probability kept, as a fraction of the likeliest token's.
        min_new_tokens: Tokens before which no end token is sampled.
        seed: Of the noise, a signed 64-bit number.
        sample_index: Which of the request's `n` samples this is.
        stop: Strings that end it.
        stop_ids: Tokens that end it, the model's own included.
        return_logprob: Whether logprobs are in the reply.
        logprob_start: First prompt token of `input_token_logprobs`; None for none.
        extra_key: Prompts are only shared under one key.
        skip_special_tokens: Whether the text leaves special tokens out.
        spaces_between_special_tokens: As transformers' `decode` understands it.
        no_stop_trim: Whether the text keeps what stopped it.
    """

    rid: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    greedy: bool
    top_p: float
    top_k: int
    min_p: float
    min_new_tokens: int
    seed: int
    sample_index: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    return_logprob: bool
    logprob_start: int | None
    extra_key: str | None
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    no_stop_trim: bool

    @property
    def num_positions(self) -> int:
        """Length of prompt and longest completion together."""
        return len(self.input_ids) + self.max_new_tokens


def decode(body: bytes, kind: type[T]) -> T:
    """Parse a request body; an empty one is an empty object.

    Raises:
        BadRequestError: Naming the field, the rule and the value.
    """
    try:
        raw = msgspec.json.decode(body) if body else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body must be JSON: {error}") from None
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise BadRequestError(_explain(str(error), raw)) from None


def _explain(message: str, raw: Any) -> str:
    match = _AT.match(message)
    if match is None:
        return f"bad request: {message}"
    path = match["path"].lstrip(".")
    value = raw
    for key in re.findall(r"[^.\[\]]+", path):
        if isinstance(value, list) and key.isdigit():
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return f"`{path}`: {match['what']}"
    shown = _nearest(match["what"]) if isinstance(value, dict) else f" ({_shorten(value)})"
    return f"`{path}`: {match['what']}{shown}"


def _nearest(what: str) -> str:
    unknown = _UNKNOWN.search(what)
    if unknown is None:
        return ""
    known = difflib.get_close_matches(unknown[1], SamplingBody.__struct_fields__, 1)
    return f"; did you mean `{known[0]}`?" if known else ""


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


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
    return body.input_ids is not None and not any(isinstance(i, list) for i in body.input_ids)


def refuse_unsupported(body: GenerateBody) -> None:
    """Refuse what would change the answer and isn't implemented."""
    for name in _UNSUPPORTED:
        value = getattr(body, name)
        if value not in (None, False):
            raise BadRequestError(
                f"`{name}` is not supported by the embedded engine, got {_shorten(value)}"
            )
    numbers = body.top_logprobs_num
    if any(numbers if isinstance(numbers, list) else [numbers or 0]):
        raise BadRequestError(
            f"`top_logprobs_num` is not supported by the embedded engine, got {numbers}"
        )


def check_prompt(ids: Sequence[Any], vocab_size: int, name: str) -> tuple[int, ...]:
    """Check the token ids of one prompt."""
    if not ids:
        raise BadRequestError(f"`{name}` must not be empty")
    for position, token in enumerate(ids):
        if not isinstance(token, int):
            raise BadRequestError(
                f"`{name}[{position}]` must be a token id; all entries must be numbers or all "
                f"lists, got {_shorten(token)}"
            )
        if not 0 <= token < vocab_size:
            raise BadRequestError(
                f"`{name}[{position}]` must be in [0, {vocab_size}) (the vocabulary), got {token}"
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
            f"in [0, max_new_tokens ({params.max_new_tokens})]",
        ),
        (
            "stop_token_ids",
            params.stop_token_ids,
            all(0 <= token < vocab_size for token in params.stop_token_ids or ()),
            f"token ids in [0, {vocab_size})",
        ),
        (
            "stop",
            params.stop,
            all(params.stop) if isinstance(params.stop, list) else params.stop != "",
            "a string or strings, none of them empty",
        ),
    ]
    for name, value, kept, rule in rules:
        if not kept:
            raise BadRequestError(f"`sampling_params.{name}` must be {rule}, got {value!r}")


def _refuse_unsupported_sampling(params: SamplingBody) -> None:
    for name, neutral in _UNSUPPORTED_SAMPLING.items():
        value = getattr(params, name)
        if value is not None and value != neutral:
            raise BadRequestError(
                f"`sampling_params.{name}` is not supported by the embedded engine, "
                f"got {_shorten(value)}"
            )


def new_rid() -> str:
    """A name for a request that has none."""
    return uuid.uuid4().hex
