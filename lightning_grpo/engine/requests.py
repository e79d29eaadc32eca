"""What the engine is asked: bodies of SGLang's HTTP API, bounded, checked and split by completion.

`decode` parses a body into its struct. `Intake` checks it against the model and makes a
`Generation` for each completion of it.

Unknown keys beside `sampling_params` are ignored, as SGLang does. An unknown sampling key is an
error here (SGLang answers 500). What the engine lacks is refused rather than ignored.
"""

from __future__ import annotations

import asyncio
import difflib
import re
import reprlib
import secrets
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from lightning_grpo.errors import GRPOError
from lightning_grpo.templates import num_marks_behind


class BadRequestError(GRPOError, ValueError):
    """A request that can't be served; answered with status 400 and this message."""


class WeightUpdateError(GRPOError, RuntimeError):
    """New weights that can't be taken; the old ones stay. Answered with status 400."""


class UnservableError(GRPOError, RuntimeError):
    """A model with a part that the engine doesn't have."""


T = TypeVar("T")
D = TypeVar("D")

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
DETERMINISTIC_SEED = 42
"""The seed of requests without one in deterministic mode, as SGLang's deterministic inference."""

_MAX_PARTS = 1 << 16
"""Most lists and objects in a body: each takes many times its bytes once it is parsed."""
_BODY_S = 60.0
"""How long a body may take to come."""
_SMALL = 64 << 10
"""Bodies up to here are read on the event loop, longer ones on a thread, a few at a time."""
_LARGE_AT_ONCE = 4
_GREEDY_BELOW = 1e-6
_NULLABLE = "max_new_tokens"
"""Null is what the context leaves; of every other field it is the default."""

# ---- bodies ------------------------------------------------------------------------------------

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
"""Of weights or a group: it is kept, and told again."""
Address = Annotated[str, msgspec.Meta(max_length=4096)]
"""A path or a host."""
Count = Annotated[int, msgspec.Meta(ge=0)]


class SamplingBody(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`sampling_params` of `/generate`."""

    LACKS: ClassVar[dict[str, Any]] = {
        **{"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0},
        **dict.fromkeys(("stop_regex", "json_schema", "regex", "ebnf", "structural_tag")),
        **dict.fromkeys(("custom_params", "logit_bias")),
    }
    """What the engine doesn't have, and the value that asks for nothing, as null and empty do."""

    max_new_tokens: Count | None = 128  # null: what the context leaves
    min_new_tokens: Count = 0
    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = -1
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None
    stream_interval: int | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a completion."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop


class GenerateBody(msgspec.Struct, kw_only=True):
    """The body of `/generate`; a list has one entry for each prompt."""

    LACKS: ClassVar[dict[str, Any]] = dict.fromkeys(
        (
            *("input_embeds", "image_data", "audio_data", "video_data", "lora_path"),
            *("token_ids_logprob", "return_hidden_states"),
            *("return_sampling_mask", "custom_logit_processor", "session_params"),
            *("return_text_in_logprobs", "top_logprobs_num"),
        ),
        False,
    )

    input_ids: list[int | list[int]] | None = None
    text: str | list[str] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    return_routed_experts: bool = False
    stream: bool = False


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
    load_format: Literal["flattened_bucket"] | None = None


class VersionBody(msgspec.Struct, kw_only=True):
    """The body of `/update_weight_version`."""

    new_version: Name
    abort_all_requests: bool = True


# ---- one completion ----------------------------------------------------------------------------


class Generation(SamplingBody, kw_only=True, frozen=True):
    """One completion to sample: a prompt, and its sampling with every default put in.

    A temperature below 1e-6 has become `top_k=1` at temperature 1.

    Attributes:
        rid: Name of the request.
        input_ids: Token ids of the prompt.
        max_new_tokens: Longest completion; 0 only scores the prompt.
        sampling_seed: Of the noise, shared by the samples of a prompt.
        sample: Which of the `n` samples.
        stop: Strings that end it.
        stop_ids: Tokens that end it, the model's own included.
        return_logprob: Whether logprobs are in the reply.
        logprob_start: First prompt token of `input_token_logprobs`; None for none.
        extra_key: Prompts are only shared under one key.
        return_routed_experts: Whether the experts of each token are in the reply.
    """

    rid: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    sampling_seed: int
    sample: int = 0
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    return_logprob: bool
    logprob_start: int | None
    extra_key: str | None
    return_routed_experts: bool = False

    @property
    def num_positions(self) -> int:
        """Length of prompt and longest completion together."""
        return len(self.input_ids) + self.max_new_tokens


# ---- parsing -----------------------------------------------------------------------------------


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
        return msgspec.convert(_asked(raw, kind), kind)
    except msgspec.ValidationError as error:
        raise BadRequestError(_explain(str(error), raw)) from None


def _asked(raw: Any, kind: Any, path: str = "") -> Any:
    """A body without what asks for nothing; what asks for something that is lacking is refused."""
    if isinstance(raw, list):
        return [_asked(each, kind, path) for each in raw]
    lacks: dict[str, Any] | None = getattr(kind, "LACKS", None)
    if lacks is None or not isinstance(raw, dict):
        return raw
    for name in sorted(raw.keys() & lacks.keys()):
        values = raw[name] if isinstance(raw[name], list) else [raw[name]]
        if any(value not in (lacks[name], None, "", [], {}) for value in values):
            raise unsupported(path + name, raw[name])
    asked = {k: v for k, v in raw.items() if k not in lacks and (v is not None or k == _NULLABLE)}
    if "sampling_params" in asked:
        asked["sampling_params"] = _asked(
            asked["sampling_params"], SamplingBody, "sampling_params."
        )
    return asked


def _explain(message: str, raw: Any) -> str:
    """What msgspec says, with the value that it says it of."""
    match = re.match(r"^(?P<what>.*) - at `\$(?P<path>.*)`$", message)
    if match is None:
        return f"bad request: {message}"
    path, value = match["path"].lstrip("."), raw
    try:
        for key in re.findall(r"[^.\[\]]+", path):
            value = value[int(key) if isinstance(value, list) else key]
    except (LookupError, TypeError, ValueError):
        return f"`{path}`: {match['what']}"
    shown = _nearest(match["what"]) if isinstance(value, dict) else f" ({shorten(value)})"
    return f"`{path}`: {match['what']}{shown}"


def _nearest(what: str) -> str:
    unknown = re.search(r"unknown field `(.*)`", what)
    known = difflib.get_close_matches(unknown[1] if unknown else "", SamplingBody.__struct_fields__)
    return f"; did you mean `{known[0]}`?" if known else ""


def unsupported(name: str, value: Any) -> BadRequestError:
    """The refusal of a field that would change the answer and isn't implemented."""
    return BadRequestError(
        f"`{name}` is not supported by the embedded engine, got {shorten(value)}"
    )


class _Repr(reprlib.Repr):
    """Bounded in length, depth and digits."""

    def repr_int(self, value: int, _: int) -> str:
        bits = value.bit_length()
        return f"a number of {bits} bits" if bits > self.maxlong else repr(value)


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong = 4, 24, 12, 80, 128


def shorten(value: Any) -> str:
    """A value as it stands in a message, however large or deep it is."""
    text = _REPR.repr(value)
    return text if len(text) <= _REPR.maxstring else text[: _REPR.maxstring] + "..."


# ---- intake ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Intake:
    """Reads the requests of all routes and checks them against a model.

    Attributes:
        vocab_size: Token ids are below this.
        context_length: Prompt and completion together fit in this.
        end_ids: Tokens that end a completion unless `ignore_eos`.
        tokenizer: For prompts given as text and for stop strings; None if the model has none.
        deterministic: Whether requests without a seed get a fixed one.
        has_routers: Whether the model is a mixture whose experts can be told.
    """

    vocab_size: int
    context_length: int
    end_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None
    deterministic: bool = False
    has_routers: bool = False

    def __post_init__(self) -> None:
        known = self.tokenizer.get_vocab() if self.tokenizer else {}
        self._longest_token = max(map(len, known), default=1)
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        # One thread: tokenizers don't like two.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="intake")

    async def read(self, request: web.Request, kind: type[T]) -> T:
        """A request's body, if it comes in time and is one of this kind."""
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

    def generations(self, body: GenerateBody) -> tuple[list[Generation], bool]:
        """The completions of a request, in the order of the reply, and whether it is a list."""
        if (body.text is None) == (body.input_ids is None):
            raise BadRequestError("exactly one of `text` and `input_ids` must be given")
        name = "text" if body.input_ids is None else "input_ids"
        given: Any = body.text if body.input_ids is None else body.input_ids
        if not given:
            raise BadRequestError(f"`{name}` must not be empty")
        single = isinstance(given, str) or isinstance(given[0], int)
        names = [name] if single else [f"{name}[{i}]" for i in range(len(given))]
        params = per_prompt(body.sampling_params, SamplingBody(), len(names), "sampling_params")
        num_samples = check_size(params)
        for field in ("rid", "extra_key"):
            check_name(field, getattr(body, field))
        asked = zip(
            [given] if single else given,
            names,
            params,
            _rids(body, len(names)),
            per_prompt(body.return_logprob, False, len(names), "return_logprob"),
            per_prompt(body.logprob_start_len, -1, len(names), "logprob_start_len"),
            per_prompt(body.extra_key, None, len(names), "extra_key"),
            strict=True,
        )
        firsts = [self._generation(*each) for each in asked]
        if body.return_routed_experts:
            if not self.has_routers:
                raise BadRequestError("`return_routed_experts` needs a mixture of experts")
            told = {"return_routed_experts": True}
            firsts = [msgspec.structs.replace(each, **told) for each in firsts]
        if len({first.rid for first in firsts}) < len(firsts):
            raise BadRequestError(f"`rid` must name each prompt once, got {shorten(body.rid)}")
        if num_samples == 1:
            return firsts, not single
        replace = msgspec.structs.replace
        return [
            replace(first, rid=f"{first.rid}_{sample}", sample=sample)
            for first in firsts
            for sample in range(num_samples)
        ], True

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text that may fit in the context."""
        if self.tokenizer is None:
            raise BadRequestError("a text needs a tokenizer and the model has none")
        self.check_length(len(text))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def check_length(self, num_characters: int) -> None:
        """Refuse a text that not even the longest tokens could spell within the context."""
        if num_characters > self.context_length * self._longest_token:
            raise BadRequestError(
                f"the text must fit in the context of {self.context_length} tokens, got one of "
                f"{num_characters} characters"
            )

    def _generation(
        self,
        prompt: str | list[int],
        name: str,
        params: SamplingBody,
        rid: str,
        return_logprob: bool,
        start: int,
        extra_key: str | None,
    ) -> Generation:
        """The first sample of a prompt, which is called `name` in messages."""
        ids = self._token_ids(prompt, name)
        self._check_sampling(params, len(ids))
        if not -1 <= start < len(ids):
            raise BadRequestError(
                f"`logprob_start_len` must be in [-1, {len(ids)}) (the prompt), got "
                f"{shorten(start)}"
            )
        seed, budget = params.sampling_seed, params.max_new_tokens
        if seed is None:
            seed = DETERMINISTIC_SEED if self.deterministic else secrets.randbits(63)
        ends = self.end_ids.union(params.stop_token_ids)
        frozen = params.temperature < _GREEDY_BELOW
        resolved = {
            "rid": rid,
            "input_ids": ids,
            "max_new_tokens": self.context_length - len(ids) if budget is None else budget,
            "sampling_seed": seed,
            "temperature": 1.0 if frozen else params.temperature,
            "top_k": 1 if frozen else params.top_k,
            "stop": params.stops,
            "stop_ids": frozenset() if params.ignore_eos else ends,
            "return_logprob": return_logprob,
            "logprob_start": start if return_logprob and start >= 0 else None,
            "extra_key": extra_key,
        }
        sampling = {each: getattr(params, each) for each in SamplingBody.__struct_fields__}
        return Generation(**sampling | resolved)

    def _token_ids(self, prompt: str | list[int], name: str) -> tuple[int, ...]:
        """Check one prompt."""
        ids: Any = prompt
        if isinstance(prompt, str):
            ids = self.tokenize(prompt, True)
            ids = ids[: len(ids) - num_marks_behind(self.tokenizer)]
        if not isinstance(ids, list):
            raise BadRequestError(
                f"`{name}` must be token ids; all entries must be numbers or all lists, got {ids}"
            )
        if not ids:
            raise BadRequestError(f"`{name}` must not be empty")
        if len(ids) > self.context_length:
            raise BadRequestError(
                f"`{name}` must fit in the context of {self.context_length} tokens, got {len(ids)}"
            )
        for position, token in enumerate(ids):
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise BadRequestError(
                    f"`{name}[{position}]` must be a token id in [0, {self.vocab_size}) (the "
                    f"vocabulary), got {shorten(token)}"
                )
        return tuple(ids)

    def _check_sampling(self, params: SamplingBody, num_read: int) -> None:
        """Check the rules on sampling that a field's type can't state."""
        ids, stops, most = params.stop_token_ids, params.stops, params.max_new_tokens
        rules: dict[str, tuple[bool, str]] = {
            "top_k": (params.top_k != 0, "-1 (off) or at least 1"),
            "min_new_tokens": (
                most is None or params.min_new_tokens <= most,
                f"in [0, max_new_tokens ({shorten(most)})]",
            ),
            "stop_token_ids": (
                len(ids) <= self.vocab_size and all(0 <= token < self.vocab_size for token in ids),
                f"at most {self.vocab_size} token ids in [0, {self.vocab_size})",
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
        if stops and self.tokenizer is None:
            raise BadRequestError("`sampling_params.stop` needs a tokenizer and the model has none")
        if most is not None and num_read + most > self.context_length:
            raise BadRequestError(
                f"the prompt and `sampling_params.max_new_tokens` must fit in the context of "
                f"{self.context_length} tokens, got {num_read} + {shorten(most)}"
            )


def per_prompt(value: T | list[T] | None, default: D, count: int, name: str) -> Sequence[T | D]:
    """A parameter of each prompt, which is one for all or a list with one for each."""
    if value is None:
        return [default] * count
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequestError(
            f"`{name}` must be one value or one for each of the {count} prompts, "
            f"got {len(value)} values"
        )
    return value


def check_name(field: str, names: str | list[str] | None) -> None:
    """Refuse names that are texts."""
    longest = max(map(len, names if isinstance(names, list) else [names or ""]), default=0)
    if longest > MAX_NAME:
        raise BadRequestError(f"`{field}` must be at most {MAX_NAME} characters, got {longest}")


def check_size(params: Sequence[SamplingBody]) -> int:
    """Samples of each prompt; refuses more than one may ask for before any prompt is read."""
    sizes = sorted({each.n for each in params})
    if len(params) * sizes[-1] > MAX_COMPLETIONS:
        raise BadRequestError(
            f"the prompts times `sampling_params.n` must be at most {MAX_COMPLETIONS}, got "
            f"{len(params)} x {shorten(sizes[-1])}. Way out: several requests"
        )
    if len(sizes) > 1:
        raise BadRequestError(
            f"`sampling_params.n` must be the same for all prompts, got {shorten(sizes)}"
        )
    return sizes[0]


def _rids(body: GenerateBody, count: int) -> list[str]:
    if isinstance(body.rid, str) and count > 1:
        return [f"{body.rid}_{index}" for index in range(count)]
    return [rid or uuid.uuid4().hex for rid in per_prompt(body.rid, None, count, "rid")]


def _is_small(request: web.Request) -> bool:
    return request.content_length is not None and request.content_length <= _SMALL


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {_BODY_S:g} s") from None
