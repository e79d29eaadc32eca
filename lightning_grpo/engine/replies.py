"""What the engine answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.requests import Generation, Output
from lightning_grpo.engine.scheduler import EngineThread
from lightning_grpo.engine.slots import decode_text, trim
from lightning_grpo.engine.updates import WeightUpdates


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
    text = decode_text(
        tokenizer,
        ids,
        skip_special_tokens=generation.skip_special_tokens,
        spaces_between_special_tokens=generation.spaces_between_special_tokens,
    )
    if output.finish_reason is None:
        # A character whose bytes are not all here is not told of yet.
        return text.rstrip("\ufffd")
    return trim(text, matched)


class Unread:
    """What a stream has not told yet: the newest output of each completion, which holds the others.

    So a reader who is slow, or stops, costs no more memory than one who waits for the end.
    """

    def __init__(self) -> None:
        self._newest: dict[int, Output] = {}
        self._some = asyncio.Event()

    def put(self, index: int, output: Output) -> None:
        """What a completion is by now."""
        self._newest[index] = output
        self._some.set()

    async def get(self) -> tuple[int, Output]:
        """The completion that has waited longest to be told of, and what it is."""
        await self._some.wait()
        index = next(iter(self._newest))
        output = self._newest.pop(index)
        if not self._newest:
            self._some.clear()
        return index, output


SGLANG_VERSION = "0.5.19"
"""The version whose API this is."""


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


@dataclass(frozen=True)
class EngineFacts:
    """What never changes while it runs.

    Attributes:
        tokenizer_path: Where the tokenizer came from.
        model_type: As the model's config says.
        architectures: As the model's config says.
        vocab_size: Number of token ids.
        context_length: Prompt and completion together fit in this.
        max_running_requests: Most requests in slots.
        max_total_tokens: Tokens that the slots may hold.
        deterministic: Whether runs repeat bit for bit.
    """

    tokenizer_path: str
    model_type: str
    architectures: list[str]
    vocab_size: int
    context_length: int
    max_running_requests: int
    max_total_tokens: int
    deterministic: bool


class About:
    """Answers questions about the engine.

    Args:
        engine: Generates.
        updates: Knows where the weights came from.
        facts: What never changes.
    """

    def __init__(self, engine: EngineThread, updates: WeightUpdates, facts: EngineFacts) -> None:
        self._engine = engine
        self._updates = updates
        self._facts = facts
        self._started = time.time()

    async def model_info(self, _: web.Request) -> web.Response:
        """`/model_info`."""
        version = await self._engine.call(lambda s: s.weight_version)
        return json_response(
            {
                "model_path": self._updates.model_path,
                "served_model_name": self._updates.model_path,
                "tokenizer_path": self._facts.tokenizer_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": version,
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": self._facts.model_type,
                "architectures": self._facts.architectures,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        """`/server_info`: of SGLang's keys those that mean something here."""
        facts = self._facts
        state = await self._engine.call(
            lambda s: {
                "weight_version": s.weight_version,
                "paused": s.paused,
                "num_running_reqs": s.num_running,
                "num_waiting_reqs": s.num_waiting,
                "tokens_sampled": s.tokens_sampled,
            }
        )
        return json_response(
            {
                "engine": "lightning_grpo embedded CPU engine (SGLang's API, not SGLang)",
                "version": SGLANG_VERSION,
                "model_path": self._updates.model_path,
                "served_model_name": self._updates.model_path,
                "tokenizer_path": facts.tokenizer_path,
                "device": "cpu",
                "dtype": "float32",
                "context_length": facts.context_length,
                "vocab_size": facts.vocab_size,
                "max_running_requests": facts.max_running_requests,
                "max_total_num_tokens": facts.max_total_tokens,
                "max_req_input_len": facts.context_length - 1,
                "enable_memory_saver": True,
                "enable_deterministic_inference": facts.deterministic,
                "tp_size": 1,
                "dp_size": 1,
                "startup_time": self._started,
                "weight_version": state["weight_version"],
                "internal_states": [state],
            }
        )

    async def loads(self, _: web.Request) -> web.Response:
        """`/v1/loads`."""
        running, waiting = await self._engine.call(lambda s: (s.num_running, s.num_waiting))
        load = {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "max_total_num_tokens": self._facts.max_total_tokens,
        }
        return json_response({"timestamp": time.time(), "version": SGLANG_VERSION, "loads": [load]})
