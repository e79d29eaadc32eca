"""How large SGLang's servers are, by what a run asks of them: sums, and the flags they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.base import ServerLoad

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

BATCHES_AT_ONCE = 1.5
"""One alone leaves slots empty at its end, two end together: `benchmarks/running_requests.py`."""

MAX_RUNNING = 4096
"""More requests in one decoding step than any server was measured with."""

PREFILL_TOKENS = 8192
SMALL_PREFILL_GRAPHS = 512
"""Prefills up to so many tokens, a proof's among them, are replayed as graphs."""

DELAY_RATIO, DELAY_MS, DELAY_PASSES = 0.1, 200, 10
"""New requests wait for one another, a tenth of those that run, but not for longer than this: a
trickle of prefills of one request each would leave hardly any time for decoding."""


class ServersTooLargeError(ConfigError):
    """The model and the least cache don't fit the GPUs that serve."""


@dataclass(frozen=True)
class ServerSize:
    """How each server is started.

    Attributes:
        flags: Of `sglang.launch_server`, by name.
        memory_fraction: Of the GPU, for weights and cache; None: SGLang's own choice.
        notes: What was chosen and why, in words.
        running: Requests that are decoded at once.
        weight_bytes: Of the model on each of a server's GPUs; 0 where nothing was known.
        cache_bytes: Of keys and values there.
        overhead_bytes: Of graphs, logits, kernels and the context there.
    """

    flags: Mapping[str, Any]
    memory_fraction: float | None
    notes: tuple[str, ...]
    running: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    overhead_bytes: int = 0

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
        given: The user's own flags, by name; values that follow from one use the user's value.

    Raises:
        ServersTooLargeError: The model and the least cache don't fit.
    """
    given = given or {}
    requests = -(-load.in_flight // num_servers)
    context = given.get("context-length", load.context_tokens)
    known = gpu_bytes and load.weight_bytes and load.kv_bytes_per_token and context
    weights, per_token = load.weight_bytes / tp, load.kv_bytes_per_token / tp
    room = _room(load, gpu_bytes, shared) / per_gpu - weights
    for running in _running(load, num_servers, given):
        overhead = max(MIN_OVERHEAD, weights // 8)
        overhead += running * (GRAPH_BYTES + load.vocab_size * LOGIT_BYTES)
        wanted = int(running * (context or 0) * SPARE_TOKENS)
        tokens = min(wanted, int((room - overhead) // per_token)) if known else 0
        if not known or tokens == wanted:
            break
    flags, by_graphs = _flags(running, given)
    notes = [f"{requests:,} requests in flight", f"{running:,} decoded at once{by_graphs}"]
    if context is not None:
        flags["context-length"] = context
        notes.append(f"context {context:,}")
    if not known:
        return ServerSize(flags, SHARED_FRACTION if shared else None, tuple(notes), running)
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
    sizes = (int(weights), int(tokens * per_token), int(overhead))
    return ServerSize(flags, LARGEST_FRACTION, tuple(notes), running, *sizes)


@dataclass(frozen=True)
class ServerLayout:
    """Which GPUs serve, and how.

    Attributes:
        groups: GPUs of each server.
        shared: Whether the trainer uses them too.
        per_gpu: Servers on each GPU.
        size: What follows from the load; None where nobody said what it is.
    """

    groups: Sequence[tuple[int, ...]]
    shared: bool
    per_gpu: int
    size: ServerSize | None


def _running(load: ServerLoad, num_servers: int, given: Mapping[str, Any]) -> list[int]:
    """How many requests a server may decode at once: the best, then what needs less memory."""
    if "max-running-requests" in given:
        return [int(given["max-running-requests"])]
    batch = load.batch or load.in_flight
    shares = [min(k * batch, load.in_flight) / num_servers for k in (BATCHES_AT_ONCE, 1)]
    return [min(max(math.ceil(share), 1), MAX_RUNNING) for share in shares]


def _flags(running: int, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What follows from the number of requests, and a word on graphs; less what the user chose."""
    flags: dict[str, Any] = {
        "max-running-requests": running,
        "chunked-prefill-size": PREFILL_TOKENS,
    }
    by_graphs = not any("cuda-graph" in name for name in given)
    if by_graphs:
        flags["cuda-graph-bs-decode"] = graph_sizes(running)
        flags["cuda-graph-max-bs-prefill"] = SMALL_PREFILL_GRAPHS
    if not any("prefill-delayer" in name or "overlap" in name for name in given):
        flags["enable-prefill-delayer"] = True
        flags["prefill-delayer-queue-min-ratio"] = DELAY_RATIO
        flags["prefill-delayer-max-delay-ms"] = DELAY_MS
        flags["prefill-delayer-max-delay-passes"] = DELAY_PASSES
    return flags, ", all by graphs" if by_graphs else ""


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
    raise ServersTooLargeError(
        f"`servers` must fit the GPU: a server needs {needs}, the GPU has {has}. {way_out}"
    )
