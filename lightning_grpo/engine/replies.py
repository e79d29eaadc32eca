"""SGLang's reply objects of `/generate`."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.protocol import Generation
from lightning_grpo.engine.request import Output
from lightning_grpo.engine.stopping import decode, trim


def generate_reply(
    generation: Generation,
    output: Output,
    tokenizer: PreTrainedTokenizerBase | None,
    started: float,
) -> dict[str, Any]:
    """The reply about one completion, finished or (in a stream) still running.

    Args:
        generation: What was asked.
        output: What it is by now.
        tokenizer: Makes the text; None leaves it empty.
        started: When the request came, by `time.perf_counter`.
    """
    meta: dict[str, Any] = {
        "id": generation.rid,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(generation.input_ids),
        "weight_version": output.weight_version,
        "num_retractions": output.num_retractions,
    }
    if generation.return_logprob:
        meta |= _logprobs(generation, output)
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(output.token_ids),
        "cached_tokens": output.cached_tokens,
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    if output.finish_reason is not None:
        meta["weight_versions"] = [
            {"version": s.version, "start": s.start, "end": s.end} for s in output.spans
        ]
    meta["e2e_latency"] = time.perf_counter() - started
    meta["response_sent_to_client_ts"] = time.time()
    text = "" if tokenizer is None else _text(generation, output, tokenizer)
    return {"text": text, "output_ids": output.token_ids, "meta_info": meta}


def _logprobs(generation: Generation, output: Output) -> dict[str, Any]:
    scored: list[list[Any]] = []
    if generation.logprob_start is not None and output.input_logprobs is not None:
        ids = generation.input_ids[generation.logprob_start :]
        # The first has nothing before it that was scored.
        values = [None, *output.input_logprobs]
        scored = [[value, token, None] for value, token in zip(values, ids, strict=True)]
    return {
        "input_token_logprobs": scored,
        "output_token_logprobs": [
            [value, token, None]
            for value, token in zip(output.logprobs, output.token_ids, strict=True)
        ],
        "output_token_logprobs_length": len(output.token_ids),
    }


def _text(generation: Generation, output: Output, tokenizer: PreTrainedTokenizerBase) -> str:
    matched = None if output.finish_reason is None else output.finish_reason.get("matched")
    if generation.no_stop_trim:
        matched = None
    ids = output.token_ids[:-1] if isinstance(matched, int) else output.token_ids
    text = decode(
        tokenizer,
        ids,
        skip_special_tokens=generation.skip_special_tokens,
        spaces_between_special_tokens=generation.spaces_between_special_tokens,
    )
    if output.finish_reason is None:
        # A character whose bytes are not all here is not told of yet.
        return text.rstrip("\ufffd")
    return trim(text, matched)
