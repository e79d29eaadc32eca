"""What the engine says of itself: `/model_info`, `/server_info` and `/v1/loads`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from lightning_grpo.engine.loop import EngineThread
from lightning_grpo.engine.updates import WeightUpdates

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
