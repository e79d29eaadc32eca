"""Sizes servers by what a run will ask of them: batch limits, graphs, context, memory.

SGLang's own defaults suit a service that knows nothing of its callers: it takes nearly all memory
for its cache and captures graphs for up to 256 or 512 requests, so that a small model on a large
GPU has no room left for its buffers, and a large batch is decoded kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30

SHARED_FRACTION = 0.4
"""What a server takes of a GPU that the trainer uses too, where the model's size is unknown."""
LARGEST_FRACTION = 0.88
"""The rest is left to activations, graphs and the driver, and to what is not foreseen."""
MIN_OVERHEAD = 3 * GIB
"""A server's memory beside weights and cache: context, kernels, workspaces."""
GRAPH_BYTES = MIB
"""What the graphs need for each request that they can hold."""
LOGIT_BYTES = 16
"""Of each logit of a decoding step: as the head gives them, in fp32, scaled, and their softmax."""
SPARE_TOKENS = 1.05
"""Pages are not always full."""
FEWEST_REQUESTS = 64
"""The least that the cache must hold at once."""
ENOUGH_REQUESTS = 256
"""One more server on the same GPU must have so many requests of its own to be worth it."""
SMALL_WEIGHTS, MOST_PER_GPU, CORES_PER_SERVER = 4 * GIB, 4, 4
"""A server's scheduler is one thread of Python, which takes some 15 microseconds for each token.
Below about 2B parameters a GPU waits for it, and serves several of them in turn."""
MAX_RUNNING = 4096
"""More requests in one decoding step than any server was measured with."""
PREFILL_TOKENS = 8192
SMALL_PREFILL_GRAPHS = 512
"""Prefills up to so many tokens, a proof's among them, are replayed as graphs."""
DELAY_RATIO, DELAY_MS, DELAY_PASSES = 0.1, 200, 10
"""New requests wait for one another, a tenth of those that run, but not for longer than this: a
trickle of prefills of one request each would leave hardly any time for decoding."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """What a run will ask of all its servers together.

    Attributes:
        in_flight: Requests at once, at most.
        batch: Of one rollout batch; 0: not known. More are not decoded side by side, so that the
            oldest batch is done first and batches don't all end together.
        context_tokens: Longest sequence, prompt and completion together; None: the model's own.
        weight_bytes: Of the model as servers hold it; 0: not known.
        kv_bytes_per_token: Of keys and values, as servers hold them; 0: not known.
        vocab_size: Logits of each token.
        trainer_bytes: What the trainer needs of a GPU that it shares with a server.
    """

    in_flight: int
    batch: int = 0
    context_tokens: int | None = None
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    vocab_size: int = 0
    trainer_bytes: int = 0


@dataclass(frozen=True)
class ServerSize:
    """How each server is started.

    Attributes:
        flags: Of `sglang.launch_server`, by name.
        memory_fraction: Of the GPU, for weights and cache; None: SGLang's own choice.
        notes: What was chosen and why, in words.
    """

    flags: Mapping[str, Any]
    memory_fraction: float | None
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One line."""
        return ", ".join(self.notes)


def servers_per_gpu(load: ServerLoad, num_gpus: int, cores: int) -> int:
    """How many servers of one GPU each are worth starting on each GPU."""
    if not 0 < load.weight_bytes <= SMALL_WEIGHTS:
        return 1
    at_once = (load.batch or load.in_flight) // num_gpus
    most = min(MOST_PER_GPU, cores // (CORES_PER_SERVER * num_gpus), at_once // ENOUGH_REQUESTS)
    return max(1, most)


def size_servers(
    load: ServerLoad,
    num_servers: int,
    gpu_bytes: int,
    *,
    tp: int = 1,
    per_gpu: int = 1,
    shared: bool = False,
    given: Mapping[str, Any] | None = None,
) -> ServerSize:
    """Choose the flags of servers that share a load evenly.

    Args:
        load: Of all of them.
        num_servers: How many.
        gpu_bytes: Memory of each GPU; 0: not known.
        tp: GPUs of each server, which divide weights and cache.
        per_gpu: Servers on each GPU, which divide its memory.
        shared: Whether the trainer uses the same GPU.
        given: The user's own flags, by name; what follows from one follows from it.

    Raises:
        ConfigError: The model and the least cache don't fit.
    """
    given = given or {}
    requests = -(-load.in_flight // num_servers)
    at_once = -(-min(load.batch or load.in_flight, load.in_flight) // num_servers)
    running = int(given.get("max-running-requests", min(max(at_once, 1), MAX_RUNNING)))
    context = given.get("context-length", load.context_tokens)
    flags, by_graphs = _flags(running, given)
    notes = [f"{requests:,} requests in flight", f"{running:,} decoded at once{by_graphs}"]
    if context is not None:
        flags["context-length"] = context
        notes.append(f"context {context:,}")
    if not (gpu_bytes and load.weight_bytes and load.kv_bytes_per_token and context):
        return ServerSize(flags, SHARED_FRACTION if shared else None, tuple(notes))

    weights, per_token = load.weight_bytes / tp, load.kv_bytes_per_token / tp
    overhead = max(MIN_OVERHEAD, weights // 8)
    overhead += running * (GRAPH_BYTES + load.vocab_size * LOGIT_BYTES)
    room = _room(load, gpu_bytes, shared) / per_gpu - weights - overhead
    wanted = int(running * context * SPARE_TOKENS)
    tokens = min(wanted, int(room // per_token))
    least = min(wanted, FEWEST_REQUESTS * context)
    if tokens < least:
        _refuse(load, weights, overhead, least * per_token, gpu_bytes, context, shared)
    # The cache is limited by its tokens. The fraction must only not limit it, also where another
    # server takes its memory meanwhile, or a server comes back beside a trainer that has its own.
    flags["max-total-tokens"] = tokens
    pool = f"cache for {tokens:,} tokens ({tokens * per_token / GIB:.1f} GiB a GPU"
    short = "" if tokens == wanted else f", {tokens / wanted:.0%} of what all requests may need"
    notes.append(f"{pool}{short})")
    notes.append(
        f"about {per_gpu * (weights + tokens * per_token + overhead) / GIB:.0f} GiB in all"
    )
    return ServerSize(flags, LARGEST_FRACTION, tuple(notes))


def _flags(running: int, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What follows from the number of requests, and a word on graphs; less what the user chose."""
    flags: dict[str, Any] = {
        "max-running-requests": running,
        "chunked-prefill-size": PREFILL_TOKENS,
    }
    words = ""
    if not any("cuda-graph" in name for name in given):
        flags["cuda-graph-bs-decode"] = graph_sizes(running)
        flags["cuda-graph-max-bs-prefill"] = SMALL_PREFILL_GRAPHS
        words = ", all by graphs"
    if not any("prefill-delayer" in name or "overlap" in name for name in given):
        flags["enable-prefill-delayer"] = True
        flags["prefill-delayer-queue-min-ratio"] = DELAY_RATIO
        flags["prefill-delayer-max-delay-ms"] = DELAY_MS
        flags["prefill-delayer-max-delay-passes"] = DELAY_PASSES
    return flags, words


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that are captured: each at most an eighth above the one before it.

    SGLang's own steps of 32 would be a hundred graphs for 2,048 requests, and minutes to capture.
    """
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        step = max(4, 1 << max(0, sizes[-1].bit_length() - 4))
        sizes.append(sizes[-1] + step)
    return [*(size for size in sizes if size < most), most]


def _room(load: ServerLoad, gpu_bytes: int, shared: bool) -> float:
    """What a server may take of a GPU altogether."""
    largest = LARGEST_FRACTION * gpu_bytes
    if not shared:
        return largest
    return min(largest, 0.96 * gpu_bytes - load.trainer_bytes)


def _refuse(
    load: ServerLoad,
    weights: float,
    overhead: float,
    least_cache: float,
    gpu_bytes: int,
    context: int,
    shared: bool,
) -> None:
    needs = f"{weights / GIB:.1f} GiB of weights, {overhead / GIB:.1f} of buffers and at least"
    needs += f" {least_cache / GIB:.1f} of cache ({FEWEST_REQUESTS} sequences of"
    needs += f" {context} tokens)"
    has = f"{gpu_bytes / GIB:.0f} GiB"
    if shared:
        has += f", of which the trainer needs about {load.trainer_bytes / GIB:.0f}"
    way_out = "Lower `max_new_tokens`, raise `tp`, or set `servers.memory_fraction` yourself."
    if shared:
        way_out = (
            "Lower `model.max_tokens_per_microbatch`, set `model.gradient_checkpointing: true`,"
            " `model.lora` or `FSDP2Strategy(cpu_offload=True)`, use a second GPU, or set"
            " `servers.memory_fraction` yourself."
        )
    raise ConfigError(
        f"`servers` must fit the GPU: a server needs {needs}, the GPU has {has}. {way_out}"
    )
