"""What is said between this process and a server: SGLang's records, and the checks of replies.

A reply is read here or nowhere: what it contradicts, of the request or of itself, is a `ReplyError`
that names the server, the rule and what came instead.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from lightning_grpo.errors import ReplyError
from lightning_grpo.types import RouterShape, Routes, Sampling

ROUNDING = 1e-3
"""A logprob may be above 0 by so much."""

LEAST_LOGPROB = -1e3
"""No token is sampled at less: its probability is 0 in any precision."""

FINISHED = ("stop", "length", "abort")
"""Why a generation may end."""

VersionOf = Callable[[str], int]
"""A server's label of weights to the version that they are."""


class GenerateRequest(msgspec.Struct, omit_defaults=True):
    """One `/generate` call: token ids in.

    `return_logprob` has no default here, because the server's own default is false and a field
    left at its default is not sent.
    """

    input_ids: list[int]
    sampling_params: dict[str, Any]
    return_logprob: bool
    rid: str = ""
    extra_key: str = ""
    logprob_start_len: int = -1
    return_routed_experts: bool = False


class GenerateRequests(msgspec.Struct, omit_defaults=True):
    """Several `GenerateRequest`s as one call: the same fields, a list of each."""

    input_ids: list[list[int]]
    sampling_params: list[dict[str, Any]]
    return_logprob: list[bool]
    rid: list[str]
    extra_key: list[str]
    return_routed_experts: bool = False


class FinishReason(msgspec.Struct):
    """Why a generation ended: `stop`, `length` or `abort`."""

    type: str
    message: str | None = None


class Span(msgspec.Struct):
    """Output tokens `[start, end)` were sampled by the weights called `version`."""

    version: str
    start: int
    end: int


LogprobEntry = tuple[float | None, int, Any]
"""(logprob, token id, text or null) as the server lists them."""


class MetaInfo(msgspec.Struct):
    """The part of a `/generate` reply that is not tokens."""

    id: str | None = None
    prompt_tokens: int | None = None
    finish_reason: FinishReason | None = None
    weight_version: str | None = None
    weight_versions: list[Span] | None = None
    output_token_logprobs: list[LogprobEntry] | None = None
    input_token_logprobs: list[LogprobEntry] | None = None
    routed_experts: str | None = None


class GenerateReply(msgspec.Struct):
    """Token ids out, with logprobs and versions in `meta_info`."""

    meta_info: MetaInfo
    output_ids: list[int] = []


class UpdateReply(msgspec.Struct):
    """The answer to a weight operation; `success` false does not prove that nothing changed."""

    success: bool = True
    message: str = ""


class ModelInfo(msgspec.Struct):
    """The part of `/model_info` that is used."""

    model_path: str = ""
    tokenizer_path: str | None = None
    weight_version: str | None = None
    vocab_size: int | None = None
    architectures: list[str] | None = None
    preferred_sampling_params: Any = None


class Tokens(msgspec.Struct):
    """The answer of `/tokenize`."""

    tokens: list[int]


class ServerInfo(msgspec.Struct):
    """The part of `/server_info` that is used (of some 500 fields)."""

    version: str = ""
    context_length: int | None = None
    max_req_input_len: int | None = None
    max_running_requests: int | None = None
    disable_radix_cache: bool | None = None
    enable_memory_saver: bool | None = None
    tp_size: int = 1
    vocab_size: int | None = None
    dtype: str = "unknown"
    device: str = "cuda"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    enable_return_routed_experts: bool | None = None
    disable_overlap_schedule: bool | None = None
    enable_deterministic_inference: bool | None = None

    @property
    def precision(self) -> str:
        """The coarsest that it computes in: `float32`, `bfloat16`, `fp8`, ..."""
        cache = self.kv_cache_dtype if self.kv_cache_dtype.startswith("fp") else None
        return self.quantization or cache or self.dtype


def sampling_params(
    sampling: Sampling, *, max_new_tokens: int, min_new_tokens: int, seed: int | None
) -> dict[str, Any]:
    """SGLang's names for a `Sampling`, with the budget that is left of it."""
    params: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    if min_new_tokens > 0:
        params["min_new_tokens"] = min_new_tokens
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    if seed is not None:
        params["sampling_seed"] = seed
    return params


def check_reply(
    reply: GenerateReply, request: GenerateRequest, vocab_size: int | None, url: str
) -> None:
    """Refuses a reply that can't be the answer to a request; logprobs and versions are not read.

    Args:
        reply: What came.
        request: What was asked.
        vocab_size: Of the model; None: not checked.
        url: Of the server.

    Raises:
        ReplyError: Which rule it breaks, and by what.
    """
    meta, ids = reply.meta_info, reply.output_ids
    reason = meta.finish_reason and meta.finish_reason.type
    asked = request.sampling_params["max_new_tokens"]
    wrong = None
    if reason not in FINISHED:
        wrong = f"the finish reason {reason!r}, which is none of {', '.join(FINISHED)}"
    elif len(ids) > asked:
        wrong = f"{len(ids)} tokens where {asked} were asked for"
    elif ids and (min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size)):
        outside = min(ids) if min(ids) < 0 else max(ids)
        wrong = f"the token id {outside}, which is not in the model's vocabulary of {vocab_size}"
    elif not ids and reason == "stop":
        wrong = "a completion that has ended without a token"
    elif meta.id not in (None, request.rid):
        wrong = f"the answer to another request ({meta.id!r} instead of {request.rid!r})"
    elif meta.prompt_tokens not in (None, len(request.input_ids)):
        wrong = f"an answer to {meta.prompt_tokens} of the prompt's {len(request.input_ids)} tokens"
    if wrong is not None:
        raise ReplyError(f"{url} sent {wrong}")


def checked_routes(encoded: str, shape: RouterShape, num_tokens: int, url: str) -> Routes:
    """The experts that a sequence went through, but for its newest token.

    SGLang keeps them with keys and values: a prefix that it found in its cache has those of the
    pass that read it.

    Args:
        encoded: As a server sent it: int32 `[tokens - 1, layers, top_k]` in base64.
        shape: Of the model's routers.
        num_tokens: Of prompt and output.
        url: Of the server.

    Raises:
        ReplyError: They are those of other tokens, or of another model.
    """
    try:
        experts = np.frombuffer(base64.b64decode(encoded, validate=True), "<i4")
    except ValueError as error:
        raise ReplyError(f"{url} sent `routed_experts` that can't be read: {error}") from error
    wanted = max(0, num_tokens - 1) * shape.layers * shape.top_k
    if len(experts) != wanted:
        raise ReplyError(
            f"{url} sent {len(experts)} experts of {num_tokens} tokens, {wanted} are"
            f" {shape.top_k} in {shape.layers} layers for each but the last"
        )
    if wanted and not 0 <= experts.min() <= experts.max() < shape.experts:
        raise ReplyError(
            f"{url} sent experts {experts.min()} to {experts.max()} of {shape.experts}"
        )
    return Routes(experts.astype("u1" if shape.width == 1 else "<i2").tobytes(), shape)


def checked_logprobs(
    logprobs: Sequence[float | None], url: str, least: float = -sys.float_info.max
) -> list[float]:
    """The logprobs of tokens, each the logarithm of a probability.

    Args:
        logprobs: As a server sent them.
        url: Of the server.
        least: What none may be below.

    Raises:
        ReplyError: One is none.
    """
    checked = [x for x in logprobs if x is not None and least <= x <= ROUNDING]
    if len(checked) < len(logprobs):
        pairs = zip(logprobs, checked, strict=False)
        at = next((i for i, (one, kept) in enumerate(pairs) if one != kept), len(checked))
        sent = f"{logprobs[at]} as the logprob of token {at} of {len(logprobs)}"
        raise ReplyError(f"{url} sent {sent}")
    return checked


def matched_logprobs(
    ids: list[int], entries: list[LogprobEntry], reason: str, url: str
) -> tuple[list[int], list[float]]:
    """Ids with their logprobs; an aborted reply is cut where the two stop agreeing."""
    given, entry_ids, _ = zip(*entries, strict=True) if entries else ((), (), ())
    both = min(len(ids), len(entries))
    if reason == "abort" and None in given[:both]:
        both = given.index(None)
    if list(entry_ids[:both]) != ids[:both] or (len(ids) != len(entries) and reason != "abort"):
        raise ReplyError(
            f"{url} sent {len(ids)} token ids with {len(entries)} logprobs that are not theirs"
        )
    return ids[:both], checked_logprobs(given[:both], url, LEAST_LOGPROB)


def token_versions(
    meta: MetaInfo, num_tokens: int, pinned_version: int, version_of: VersionOf, url: str
) -> list[int]:
    """The version of the weights that sampled each token.

    From the spans where the server reports them. Elsewhere the version at submission is exact,
    because every update aborts and drains first; that the server still names the same weights at
    the end is checked.
    """
    if meta.weight_versions:
        versions = _versions_of(meta.weight_versions, num_tokens, version_of, url)
        if min(versions, default=pinned_version) < pinned_version:
            raise ReplyError(
                f"{url} went back from version {pinned_version} to {min(versions)}"
                " (was it restarted by someone else?)"
            )
        return versions
    if num_tokens and meta.weight_version is None:
        raise ReplyError(f"{url} does not say which weights sampled {num_tokens} tokens")
    if meta.weight_version is not None and num_tokens:
        at_finish = version_of(meta.weight_version)
        if at_finish != pinned_version:
            raise ReplyError(
                f"{url} went from version {pinned_version} to {at_finish} during a request"
            )
    return [pinned_version] * num_tokens


def _versions_of(
    spans: Sequence[Span], num_tokens: int, version_of: VersionOf, url: str
) -> list[int]:
    """Of spans that lie end to end over all tokens, in the order of the versions."""
    versions: list[int] = []
    for span in spans:
        version = version_of(span.version)
        in_order = span.start == len(versions) <= span.end <= num_tokens
        if not in_order or (versions and version < versions[-1]):
            raise ReplyError(
                f"{url} reports version {version} for the tokens {span.start} to {span.end}"
                f" of {num_tokens}, after {len(versions)} of others"
            )
        versions += [version] * (span.end - span.start)
    if len(versions) != num_tokens:
        raise ReplyError(f"{url} reports versions for {len(versions)} of {num_tokens} tokens")
    return versions


def bytes_of(num_tokens: int) -> int:
    """The longest answer about so many tokens: id, logprob and text of each take some 100."""
    return (1 << 20) + 512 * num_tokens
