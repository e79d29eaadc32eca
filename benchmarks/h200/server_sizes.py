"""Rollout throughput with no flag set, against what hand-tuning finds; three loads.

Each load is a number of requests at once, in groups that share a prompt, and of new tokens each,
all of which are sampled. `chosen` are the servers as the package sizes them; the others are set by
hand. Each has the GPU to itself and is measured `--rounds` times (the first is slower: kernels
warm up) through the package's own client. `share` is that of `chosen` over the best by hand.
The rule: at least 0.95 on each load.

    python -m benchmarks.h200.server_sizes --small MODEL --out sizes.json
    python -m benchmarks.h200.server_sizes --loads small --variants chosen twice --out sizes.json
    python -m benchmarks.h200.server_sizes --smoke --out sizes.json
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.h200.serving import (
    hardware,
    model_of,
    parse_arguments,
    server_python,
    write_report,
)
from lightning_grpo.policy.size import HALF, model_size
from lightning_grpo.servers.base import ServerLoad
from lightning_grpo.servers.process import EmbeddedServers, OwnedServers
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.pool import PoolLimits, ServerPool
from lightning_grpo.shipped import resolve_path
from lightning_grpo.types import Sampling

GROUP, PROMPT_TOKENS = 16, 100


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        model: `small` (a folder that is given) or `large` (1.5B, random weights).
        in_flight: Requests at once.
        new_tokens: Of each.
    """

    model: str
    in_flight: int
    new_tokens: int


LOADS = {
    "small": Load("small", 2048, 320),
    "large": Load("large", 3072, 512),
    "long": Load("large", 256, 4096),
}
# What a user would try: one server and all requests at once, by graphs; without what spaces
# prefills; larger prefills; longer waits; more servers on the GPU.
ONE = {"enable-prefill-delayer": False, "cuda-graph-max-bs-prefill": 512}
ALL = {"max-running-requests": 4096, "cuda-graph-max-bs-decode": 4096}
HALF_OF_THEM = {"max-running-requests": 1024, "cuda-graph-max-bs-decode": 1024}
VARIANTS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "chosen": (None, {}),
    "no delay": (None, {"enable-prefill-delayer": False}),
    "one": (1, ONE | ALL),
    "one, half at once": (1, ONE | HALF_OF_THEM),
    "two": (2, {}),
    "three": (3, {}),
    "six": (6, {}),
    "large prefills": (None, {"chunked-prefill-size": 32768, "max-prefill-tokens": 32768}),
}


def servers_of(
    name: str, load: Load, model: Path, work: Path, args: argparse.Namespace
) -> OwnedServers:
    """One variant's servers, not started yet."""
    count, flags = VARIANTS[name]
    if args.smoke:
        return EmbeddedServers(count or 1, max_running_requests=64)
    base: dict[str, Any] = {"sampling-backend": "pytorch"} | args.flags.get(load.model, {})
    config = AutoConfig.from_pretrained(model)
    size = model_size(config)
    assert size is not None
    servers = SGLangServers(
        count, devices=[args.serve_device], python=server_python(work), flags=base | flags
    )
    servers.load = ServerLoad(
        load.in_flight,
        load.in_flight,
        -(-(PROMPT_TOKENS + load.new_tokens) // 64) * 64,
        weight_bytes=size.parameters * HALF,
        kv_bytes_per_token=size.kv_bytes_per_token,
        vocab_size=config.vocab_size,
    )
    return servers


async def generate(pool: ServerPool, load: Load, vocab: int, seed: int) -> float:
    """All requests at once; tokens/s."""
    noise = random.Random(seed)
    sampling = Sampling(max_new_tokens=load.new_tokens, min_new_tokens=load.new_tokens)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(load.in_flight // GROUP):
            prompt = [noise.randrange(5, vocab) for _ in range(PROMPT_TOKENS)]
            for _ in range(GROUP):
                tasks.create_task(pool.generate(prompt, sampling, group_key=tuple(prompt[:4])))
    return load.in_flight * load.new_tokens / (time.perf_counter() - started)


def measure(servers: OwnedServers, load: Load, vocab: int, rounds: int) -> dict[str, Any]:
    """Some rounds through one pool."""

    async def run() -> list[float]:
        limits = PoolLimits(together=True)
        pool = ServerPool(servers.handles, Requirements("bench"), lambda ids: "", limits=limits)
        async with pool:
            return [await generate(pool, load, vocab, k) for k in range(rounds)]

    rates = asyncio.run(run())
    return {
        "tokens_per_s": round(max(rates)),
        "rounds": [round(rate) for rate in rates],
        "started_as": servers.describe(),
    }


def try_out(servers: OwnedServers, load: Load, model: Path, folder: Path, rounds: int) -> Any:
    """One variant, alone on its GPU; that it does not start or falls over is a result, too."""
    vocab = AutoConfig.from_pretrained(model).vocab_size
    try:
        servers.api_key = ""
        servers.start(str(model), folder)
        return measure(servers, load, vocab, rounds)
    except Exception:  # noqa: BLE001
        return {"error": traceback.format_exc()[-1500:]}
    finally:
        servers.stop()


def of_load(name: str, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """All variants of one load, one after another."""
    load = LOADS[name]
    model = args.small if load.model == "small" else model_of(args)
    if args.smoke:
        load, model = Load("small", 64, 24), Path(resolve_path("shipped:quickstart"))
    found = report["loads"][name] = {"requests": load.in_flight, "new_tokens": load.new_tokens}
    work = Path(tempfile.mkdtemp())
    for variant in args.variants:
        servers = servers_of(variant, load, model, work, args)
        folder = work / variant.replace(" ", "-")
        began = time.monotonic()
        found[variant] = try_out(servers, load, model, folder, args.rounds)
        found[variant]["seconds"] = round(time.monotonic() - began, 1)
        print(name, variant, found[variant], flush=True)
        write_report(args.out, report)
    by_hand = [found[v]["tokens_per_s"] for v in args.variants[1:] if "tokens_per_s" in found[v]]
    if by_hand and "tokens_per_s" in found.get("chosen", {}):
        found["share"] = round(found["chosen"]["tokens_per_s"] / max(by_hand), 3)
    write_report(args.out, report)


def main() -> None:
    """Each load in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", type=Path, help="folder of SmolLM2-135M-Instruct")
    args = parse_arguments(parser)
    args.flags = {"small": {"attention-backend": "triton"}, "large": {"attention-backend": "fa3"}}
    report: dict[str, Any] = {"hardware": hardware(), "loads": {}}
    for name in args.loads:
        of_load(name, args, report)


if __name__ == "__main__":
    main()
