"""Requests and replies of SGLang's HTTP API, typed; unknown fields of a reply are ignored."""

from __future__ import annotations

from typing import Any

import msgspec

from lightning_grpo.types import Sampling


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
