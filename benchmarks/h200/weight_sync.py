"""One weight sync end to end, by phase: medians of 20 after 3.

32 requests are always in flight. By NCCL the trainer is on another GPU than the server, by IPC on
the same. What is also reported: mean |dlogprob| of the probe, after every sync.

    python -m benchmarks.h200.weight_sync --transport ipc --out sync.json
    python -m benchmarks.h200.weight_sync --transport nccl --train-device 1 --out sync.json
    python -m benchmarks.h200.weight_sync --transport gloo --smoke --out sync.json
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.h200.serving import (
    hardware,
    make_model,
    make_servers,
    median_of,
    write_report,
)
from lightning_grpo.rollout.pool import ServerPool
from lightning_grpo.rollout.verify import Requirements
from lightning_grpo.servers.base import ServerHandle
from lightning_grpo.shipped import resolve_path
from lightning_grpo.types import Sampling
from lightning_grpo.weights.disk import DiskTransport
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.ipc import IPCTransport
from lightning_grpo.weights.probe import Probe
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.publisher import SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import Place, Transport

IN_FLIGHT, WARM, ROUNDS = 32, 3, 20
TRANSPORTS = {
    "ipc": IPCTransport,
    "nccl": lambda: ProcessGroupTransport("nccl"),
    "gloo": lambda: ProcessGroupTransport("gloo"),
    "disk": DiskTransport,
}


def make_probe(vocab: int) -> Probe:
    """Fixed sequences of 32 tokens."""
    noise = random.Random(1)
    rows = [tuple(noise.randrange(5, vocab) for _ in range(32)) for _ in range(4)]
    return Probe(tuple(rows), exact=not torch.cuda.is_available())


class Policy:
    """The trainer's side: fp32 weights that move, served as bf16."""

    def __init__(self, path: Path, device: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)

    @torch.no_grad()
    def step(self) -> None:
        """Moves every weight a little."""
        for parameter in self.model.parameters():
            parameter.mul_(1.0 + 1e-2 * torch.randn((), device=parameter.device))

    @torch.no_grad()
    def scores(self, probe: Probe) -> list[list[float]]:
        """As the strategy computes: fp32 weights, bf16 products where the servers are bf16."""
        device = next(self.model.parameters()).device
        ids = torch.tensor(probe.sequences, device=device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(input_ids=ids).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return [[0.0, *row] for row in logprobs.cpu().tolist()]


async def keep_busy(pool: ServerPool, stop: asyncio.Event, index: int, tokens: int) -> int:
    """One request after the other; how many tokens came."""
    total = 0
    while not stop.is_set():
        prompt = [5 + index, 6, 7, 8]
        completion = await pool.generate(prompt, Sampling(max_new_tokens=tokens))
        total += len(completion.token_ids)
    return total


async def measure(
    handle: ServerHandle, policy: Policy, transport: Transport, place: Place, tokens: int
) -> dict[str, Any]:
    """All syncs of one transport."""
    probe = make_probe(400)
    transport.bind(place)
    rows: list[dict[str, float]] = []
    async with ServerPool([handle], Requirements("bench"), lambda ids: "") as pool:
        publisher = WeightPublisher(pool, transport, "bench", probe, SyncSettings())
        assert await publisher.adopt(0, policy.scores(probe)), "the server holds other weights"
        stop = asyncio.Event()
        busy = [asyncio.create_task(keep_busy(pool, stop, i, tokens)) for i in range(IN_FLIGHT)]
        for version in range(1, WARM + ROUNDS + 1):
            await asyncio.sleep(0.3)
            policy.step()
            expected = policy.scores(probe)
            in_flight = pool.num_in_flight
            started = time.perf_counter()
            snapshot = gather_weights(policy.model, policy.dtype)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            gathered = time.perf_counter()
            report = await publisher.publish(snapshot, version, expected)
            ended = time.perf_counter()
            assert not report.failures, report.failures
            rows.append(
                {
                    "end_to_end_s": ended - started,
                    "gather_s": gathered - started,
                    "paused_s": report.paused_s,
                    "in_flight": in_flight,
                    "probe_diff": report.probe_diff or 0.0,
                    **{f"{phase}_s": seconds for phase, seconds in report.seconds.items()},
                }
            )
        stop.set()
        generated = sum(await asyncio.gather(*busy))
        await publisher.close()
    kept = rows[WARM:]
    return {
        "first": {name: round(value, 7) for name, value in rows[0].items()},
        **{name: median_of([row[name] for row in kept], 7) for name in kept[0]},
        "bytes": report.num_bytes,
        "tokens_generated_meanwhile": generated,
    }


def main() -> None:
    """Each transport in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--transport", nargs="+", choices=list(TRANSPORTS), default=["ipc"])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "bench-model")
    parser.add_argument("--serve-device", type=int, default=0)
    parser.add_argument("--train-device", type=int, default=0)
    parser.add_argument("--bucket-mb", type=int, default=4096)
    args = parser.parse_args()
    path = Path(resolve_path("shipped:quickstart")) if args.smoke else make_model(args.model)
    work = Path(tempfile.mkdtemp())
    servers = make_servers("embedded" if args.smoke else "sglang", work, args.serve_device)
    report: dict[str, Any] = {"hardware": hardware(), "in_flight": IN_FLIGHT}
    try:
        for name in args.transport:
            (handle,) = servers.start(str(path), work)
            device = "cpu" if args.smoke else f"cuda:{args.train_device}"
            dtype = torch.float32 if args.smoke else torch.bfloat16
            policy = Policy(path, device, dtype)
            place = Place(work, path, args.bucket_mb << 20)
            tokens = 40 if args.smoke else 1024
            transport = TRANSPORTS[name]()
            report[name] = asyncio.run(measure(handle, policy, transport, place, tokens))
            write_report(args.out, report)
    finally:
        servers.stop()


if __name__ == "__main__":
    main()
