"""Requests and replies of SGLang's HTTP API, typed; unknown fields of a reply are ignored."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from lightning_grpo.errors import ReplyError
from lightning_grpo.types import Sampling

ROUNDING = 1e-3
"""A logprob may be above 0 by so much."""
LEAST_LOGPROB = -1e3
"""No token is sampled at less: its probability is 0 in any precision."""
FINISHED = ("stop", "length", "abort")
"""Why a generation may end."""


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


class GenerateRequests(msgspec.Struct):
    """Several `GenerateRequest`s as one call: the same fields, a list of each."""

    input_ids: list[list[int]]
    sampling_params: list[dict[str, Any]]
    return_logprob: list[bool]
    rid: list[str]
    extra_key: list[str]


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


class Tokens(msgspec.Struct):
    """The answer of `/tokenize`."""

    tokens: list[int]


class ServerInfo(msgspec.Struct):
    """The part of `/server_info` that is used (of some 500 fields)."""

    version: str = ""
    context_length: int | None = None
    max_req_input_len: int | None = None
    max_running_requests: int | None = None
    enable_deterministic_inference: bool | None = None
    disable_radix_cache: bool | None = None
    enable_memory_saver: bool | None = None
    tp_size: int = 1
    vocab_size: int | None = None
    dtype: str = "unknown"
    device: str = "cuda"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"

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
