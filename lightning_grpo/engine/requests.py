"""What the engine is asked: the protocol, errors and one request at work.

The requests of SGLang's native HTTP API, typed and checked.

Unknown keys beside `sampling_params` are ignored, as SGLang does. An unknown sampling key is an
error here (SGLang answers 500). What the engine lacks is refused rather than ignored.
"""

from __future__ import annotations

import difflib
import functools
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec

from lightning_grpo.errors import GRPOError


class BadRequestError(GRPOError, ValueError):
    """A request that can't be served; answered with status 400 and this message."""


class WeightUpdateError(GRPOError, RuntimeError):
    """New weights that can't be taken; the old ones stay. Answered with status 400."""


class UnservableError(GRPOError, RuntimeError):
    """A model with a part that the engine doesn't have."""


T = TypeVar("T")

MAX_BODY_BYTES = 8 << 20
"""Longest body of a request; more is answered 413."""
MAX_COMPLETIONS = 4096
"""Most completions of one request."""
MAX_NAME = 256
"""Longest name of a request (`rid`, `extra_key`), of weights or a group."""
MAX_STOPS = 64
"""Most strings that end a completion, and most tokens beside the model's own."""
MAX_STOP = 1024
"""Longest string that ends a completion."""

_MAX_PARTS = 1 << 16
"""Most lists and objects in a body: each takes many times its bytes once it is parsed."""
_SHOWN = 80
_MOST_BITS = 128
_UNKNOWN = re.compile(r"unknown field `(.*)`")
_AT = re.compile(r"^(?P<what>.*) - at `\$(?P<path>.*)`$")


Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
"""Of weights or a group: it is kept, and told again."""
Address = Annotated[str, msgspec.Meta(max_length=4096)]
"""A path or a host."""


Count = Annotated[int, msgspec.Meta(ge=0)]
Unsupported = Annotated[Any, msgspec.Meta(extra={"supported": False})]
"""A field that the engine doesn't have; its default, as null, asks for nothing."""


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of `/generate`; null means the default everywhere."""

    max_new_tokens: Count | None = 128
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    min_new_tokens: Count | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    sampling_seed: int | None = None
    stream_interval: int | None = None
    stop_regex: Unsupported = None
    frequency_penalty: Unsupported = 0.0
    presence_penalty: Unsupported = 0.0
    repetition_penalty: Unsupported = 1.0
    json_schema: Unsupported = None
    regex: Unsupported = None
    ebnf: Unsupported = None
    structural_tag: Unsupported = None
    custom_params: Unsupported = None
    logit_bias: Unsupported = None


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
    input_embeds: Unsupported = False
    image_data: Unsupported = False
    audio_data: Unsupported = False
    video_data: Unsupported = False
    lora_path: Unsupported = False
    token_ids_logprob: Unsupported = False
    return_hidden_states: Unsupported = False
    return_routed_experts: Unsupported = False
    return_sampling_mask: Unsupported = False
    custom_logit_processor: Unsupported = False
    session_params: Unsupported = False
    return_text_in_logprobs: Unsupported = False


class TokenizeBody(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`."""

    prompt: str
    add_special_tokens: bool = True


class PauseBody(msgspec.Struct, kw_only=True):
    """The body of `/pause_generation`."""

    mode: str = "abort"


class AbortBody(msgspec.Struct, kw_only=True):
    """The body of `/abort_request`."""

    rid: Name | None = None
    abort_all: bool = False


class DiskUpdateBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weights_from_disk`."""

    model_path: Address
    weight_version: Name | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class InitGroupBody(msgspec.Struct, kw_only=True):
    """The body of `/init_weights_update_group`."""

    master_address: Address
    master_port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
    rank_offset: Annotated[int, msgspec.Meta(ge=1)]
    world_size: int
    group_name: Name = "weight_update_group"
    backend: str = "nccl"


class DestroyGroupBody(msgspec.Struct, kw_only=True):
    """The body of `/destroy_weights_update_group`."""

    group_name: Name = "weight_update_group"


class DistributedUpdateBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weights_from_distributed`."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[Count]]
    group_name: Name = "weight_update_group"
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: Name | None = None
    load_format: str | None = None


class VersionBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weight_version`."""

    new_version: Name
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
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
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
    if body.count(b"[") + body.count(b"{") > _MAX_PARTS:
        raise BadRequestError(f"the body must have at most {_MAX_PARTS} lists and objects")
    try:
        raw = msgspec.json.decode(body) if body else {}
    except RecursionError:
        raise BadRequestError("the body must be JSON: it is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: of text, or of endless digits
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
    shown = _nearest(match["what"]) if isinstance(value, dict) else f" ({shorten(value)})"
    return f"`{path}`: {match['what']}{shown}"


def _nearest(what: str) -> str:
    unknown = _UNKNOWN.search(what)
    if unknown is None:
        return ""
    known = difflib.get_close_matches(unknown[1], SamplingBody.__struct_fields__, 1)
    return f"; did you mean `{known[0]}`?" if known else ""


def unsupported(name: str, value: Any) -> BadRequestError:
    """The refusal of a field that would change the answer and isn't implemented."""
    return BadRequestError(
        f"`{name}` is not supported by the embedded engine, got {shorten(value)}"
    )


def refuse_unsupported(body: msgspec.Struct, prefix: str = "") -> None:
    """Refuse a body that asks for something in an `Unsupported` field.

    Args:
        body: Of any kind.
        prefix: Put before the field's name in the message.

    Raises:
        BadRequestError: Naming the first.
    """
    for name, nothing in _unsupported_fields(type(body)):
        value = getattr(body, name)
        if value is not None and value != nothing:
            raise unsupported(prefix + name, value)


@functools.cache
def _unsupported_fields(kind: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    fields = msgspec.structs.fields(kind)
    return [(field.name, field.default) for field in fields if field.type == Unsupported]


def shorten(value: Any) -> str:
    """A value as it stands in a message, however large or deep it is."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length()} bits"
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class _Repr(reprlib.Repr):
    def repr_int(self, value: int, _: int) -> str:
        return shorten(value) if value.bit_length() > _MOST_BITS else repr(value)


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 4, 24, 12, _SHOWN


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `start` to `end` of a completion were sampled by the weights called `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Output:
    """What a completion is by now.

    Attributes:
        token_ids: Sampled ids.
        logprobs: Their logprobs.
        finish_reason: SGLang's object; None while it runs.
        spans: Which weights sampled which tokens.
        weight_version: The weights' name when this was written.
        input_logprobs: Logprobs of the prompt's tokens behind `logprob_start`, if asked for.
        cached_tokens: Prompt tokens that were not read again.
        num_retractions: How often it lost its slot.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: dict[str, Any] | None
    spans: tuple[VersionSpan, ...]
    weight_version: str
    input_logprobs: list[float] | None
    cached_tokens: int
    num_retractions: int


@dataclass(eq=False)
class Request:
    """A completion in the engine's hands; only its thread touches it.

    Attributes:
        generation: What was asked.
        listener: Called on the server's thread with each output that is told of.
        stream: Whether every token is told of, or only the end.
        output_ids: Sampled ids.
        output_logprobs: Their logprobs.
        starts: (weights' name, first token sampled by them), oldest first.
        input_logprobs: Scores of the prompt, if asked for.
        cached_tokens: Prompt tokens that were not read again.
        num_retractions: How often it lost its slot.
    """

    generation: Generation
    listener: Callable[[Output], None]
    stream: bool = False
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[str, int]] = field(default_factory=list)
    input_logprobs: list[float] | None = None
    cached_tokens: int = 0
    num_retractions: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.generation.input_ids) + len(self.output_ids)

    @property
    def only_scores(self) -> bool:
        """Whether it wants no token, only what the model thinks of its prompt."""
        return not self.generation.max_new_tokens

    def note_version(self, version: str, num_sampled: int) -> None:
        """Say that tokens from `num_sampled` on come from the weights called `version`."""
        while self.starts and self.starts[-1][1] >= num_sampled:
            self.starts.pop()
        if not self.starts or self.starts[-1][0] != version:
            self.starts.append((version, num_sampled))

    def output(self, reason: dict[str, Any] | None, version: str) -> Output:
        """What it is now: why it ended (None: it runs), and the name of the weights now."""
        ids, logprobs = list(self.output_ids), list(self.output_logprobs)
        return Output(
            *(ids, logprobs, reason, self.spans(len(ids)), version),
            *(self.input_logprobs, self.cached_tokens, self.num_retractions),
        )

    def spans(self, num_sampled: int) -> tuple[VersionSpan, ...]:
        """Which weights sampled which of the first `num_sampled` tokens."""
        # A request that still waits for a slot has none of either.
        ends = [*(start for _, start in self.starts[1:]), num_sampled][: len(self.starts)]
        return tuple(
            VersionSpan(version, start, end)
            for (version, start), end in zip(self.starts, ends, strict=True)
            if end > start
        )
