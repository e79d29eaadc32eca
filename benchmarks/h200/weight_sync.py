"""One weight sync end to end, by phase: medians of 20 after 3 (by disk of 3 after 1).

The trainer's side is a run's own: the policy under `fully_shard`, fp32 masters, bf16 compute, on
the main thread, the servers' client on a loop of its own; what is sent is scored while it travels,
and then the policy (`policy_s`). `end_to_end_s` is when the servers work again, `trainer_waits_s`
when the trainer goes on. The weights move by about 1 % before each sync. By NCCL the trainer is on
another GPU than the server, by IPC on the same. `--in-flight` requests of 1,024 tokens are always
under way. `--no-proof` leaves the probe out: what is left is the weights' own way. With `--release`
the server gives its memory back before each sync, as beside a trainer that needs it
(`enable-memory-saver`).

The rule: end to end at most 60 ms by IPC and by NCCL after the first; servers paused at most 100 ms
with 32 requests in flight.

    python -m benchmarks.h200.weight_sync --transport ipc disk --out sync.json
    python -m benchmarks.h200.weight_sync --transport nccl --serve-device 1 --out sync.json
    python -m benchmarks.h200.weight_sync --transport gloo --smoke --out sync.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from anyio.from_thread import BlockingPortal, start_blocking_portal
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.h200.serving import (
    hardware,
    make_servers,
    median_of,
    model_of,
    parse_arguments,
    versions_of,
    write_report,
)
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.pool import ServerPool
from lightning_grpo.serving.server import ServerHandle
from lightning_grpo.session.assembly import QuietHeap
from lightning_grpo.session.proof import TrainerProof, policy_scores
from lightning_grpo.strategies.fsdp2 import parallelize, reshard
from lightning_grpo.types import Sampling
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.process_group import IPCTransport, ProcessGroupTransport
from lightning_grpo.weights.proof import Probe, SentScores
from lightning_grpo.weights.publisher import SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import DiskTransport, Place, Snapshot, Transport

WARM, ROUNDS = 3, 20
DISK_WARM, DISK_ROUNDS = 1, 3
TRANSPORTS = {
    "ipc": IPCTransport,
    "nccl": lambda: ProcessGroupTransport("nccl"),
    "gloo": lambda: ProcessGroupTransport("gloo"),
    "disk": DiskTransport,
}


def make_probe(vocab: int) -> Probe:
    """As long as a run's."""
    noise = random.Random(1)
    ids = [noise.randrange(5, vocab) for _ in range(140)]
    return Probe((tuple(ids[:128]), tuple(ids[128:])))


class Policy:
    """The trainer's side, as FSDP2Strategy makes it on one GPU."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        self.serving_dtype = torch.bfloat16 if device.type == "cuda" else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.module = PackedPolicy(load_policy(str(path)).to(device))
        self.names = CheckpointNames(self.module.model)
        parallelize(self.module, init_device_mesh(device.type, (1,)))

    @torch.no_grad()
    def step(self) -> None:
        """Moves every weight a little."""
        reshard(self.module)
        for parameter in self.module.parameters():
            parameter.mul_(1.0 + 1e-2 * float(torch.randn(())))

    def wait(self) -> None:
        """Until the GPU has done all it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Servers:
    """What a run's event loop holds, and the requests that keep its server busy."""

    def __init__(
        self, pool: ServerPool, publisher: WeightPublisher, settings: SyncSettings
    ) -> None:
        self.pool = pool
        self.publisher = publisher
        self.proves = settings.verify
        self.releases = settings.release_memory
        self._stop = asyncio.Event()
        self._busy: list[asyncio.Task[int]] = []

    async def load(self, requests: int, tokens: int) -> None:
        """Keeps so many requests under way."""
        self._busy = [asyncio.create_task(self._ask(i, tokens)) for i in range(requests)]

    async def drain(self) -> int:
        """Ends them; how many tokens came."""
        self._stop.set()
        return sum(await asyncio.gather(*self._busy))

    async def _ask(self, index: int, tokens: int) -> int:
        total = 0
        while not self._stop.is_set():
            prompt = [5 + index, 6, 7, 8]
            completion = await self.pool.generate(prompt, Sampling(max_new_tokens=tokens))
            total += len(completion.token_ids)
        return total


@asynccontextmanager
async def connect(
    handle: ServerHandle, transport: Transport, settings: SyncSettings, probe: Probe
) -> AsyncIterator[Servers]:
    """Opens the pool on the loop."""
    async with ServerPool([handle], Requirements("bench"), lambda ids: "") as pool:
        await pool.members[0].unpause()  # a case that failed leaves it paused
        publisher = WeightPublisher(pool, transport, "bench", probe, settings)
        yield Servers(pool, publisher, settings)


def sync(
    portal: BlockingPortal, servers: Servers, policy: Policy, proof: TrainerProof, version: int
) -> dict[str, float]:
    """One weight sync as `RolloutSession.publish` does it, timed by part."""
    policy.step()
    policy.wait()
    in_flight = servers.pool.num_in_flight
    asked = time.perf_counter()
    if servers.releases:
        portal.call(servers.publisher.release_memory)
    started = time.perf_counter()
    snapshot: Future[Snapshot] = Future()
    sent: Future[SentScores] = Future()
    turn: Future[None] = Future()
    publish = servers.publisher.publish
    report_to_come = portal.start_task_soon(publish, snapshot, version, sent, turn)
    proved: list[float] = []
    report_to_come.add_done_callback(lambda _: proved.append(time.perf_counter()))
    turn.result()
    weights = gather_weights(policy.module, policy.serving_dtype, into=proof.memory)
    snapshot.set_result(policy.names.of(weights))
    gathered = time.perf_counter()
    sent.set_result(proof.score(policy.module, weights) if servers.proves else SentScores([]))
    scored = time.perf_counter()
    if servers.proves:
        scores, kind = policy_scores(policy.module, proof.probe.sequences)
    policy_scored = time.perf_counter()
    report = report_to_come.result()
    sent_diff = 0.0
    if servers.proves:
        sent_diff = proof.check_policy(version, sent.result(), scores, kind, merged=False)
    assert not report.failures, report.failures
    return {
        "requests_in_flight": float(in_flight),
        "end_to_end_s": proved[0] - started,
        "trainer_waits_s": time.perf_counter() - started,
        "release_s": started - asked,
        "paused_s": report.paused_s,
        **{f"{phase}_s": seconds for phase, seconds in report.seconds.items()},
        "gather_s": gathered - started,
        "score_s": scored - gathered,
        "policy_s": policy_scored - scored,
        "sent_diff": sent_diff,
        "probe_diff": report.probe_diff or 0.0,
        "bytes": report.num_bytes,
    }


def measure(
    handle: ServerHandle, policy: Policy, case: dict[str, Any], place: Place, smoke: bool
) -> dict[str, Any]:
    """All syncs of one case."""
    probe = make_probe(400)
    proof = TrainerProof(probe, [str(policy.serving_dtype or torch.float32).removeprefix("torch.")])
    transport: Transport = TRANSPORTS[case["transport"]]()
    transport.bind(place)
    settings = SyncSettings(verify=case["proof"], release_memory=case["release"])
    by_disk = case["transport"] == "disk"
    warm, rounds = (DISK_WARM, DISK_ROUNDS) if by_disk else (WARM, case["rounds"])
    rows: list[dict[str, float]] = []
    heap = QuietHeap()
    heap.freeze()  # as a run does
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(connect(handle, transport, settings, probe)) as servers,
    ):
        for version in range(1, warm + rounds + 1):
            if version == 2:  # the first brings the weights of this case
                portal.call(servers.load, case["in_flight"], 40 if smoke else 1024)
            time.sleep(0.25)
            rows.append(sync(portal, servers, policy, proof, version))
        generated = portal.call(servers.drain)
        portal.call(servers.publisher.close)
    heap.thaw()
    kept = rows[warm:]
    return {
        **case,
        "first": {name: round(value, 7) for name, value in rows[0].items()},
        **{name: median_of([row[name] for row in kept], 7) for name in kept[0]},
        "tokens_generated_meanwhile": generated,
    }


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every transport with every bucket size and load."""
    same = {"rounds": args.rounds, "proof": not args.no_proof, "release": args.release}
    return [
        {"transport": transport, "bucket_mb": bucket_mb, "in_flight": in_flight, **same}
        for transport, bucket_mb, in_flight in itertools.product(
            args.transport, args.bucket_mb, args.in_flight
        )
    ]


def main() -> None:
    """Each case in turn; one that fails says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", nargs="+", choices=list(TRANSPORTS), default=["ipc"])
    parser.add_argument("--bucket-mb", nargs="+", type=int, default=[2048])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[32, 0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-proof", action="store_true")
    parser.add_argument("--release", action="store_true", help="the server's memory before each")
    args = parse_arguments(parser)
    path = model_of(args)
    work = Path(tempfile.mkdtemp())
    servers = make_servers(args, work)
    report: dict[str, Any] = {"hardware": hardware()}
    device = torch.device("cpu" if args.smoke else f"cuda:{args.train_device}")
    if not args.smoke:
        torch.cuda.set_device(device)
    try:
        policy = Policy(path, device)
        servers.api_key = ""
        (handle,) = servers.start(str(path), work)
        report |= {"sglang": versions_of([handle.url]), "cases": []}
        for case in cases(args):
            place = Place(work, path, case["bucket_mb"] << 20)
            try:
                found = measure(handle, policy, case, place, args.smoke)
            except Exception:  # noqa: BLE001 - one case's failure is a result
                found = case | {"error": traceback.format_exc()}
            report["cases"].append(found)
            write_report(args.out, report)
    finally:
        servers.stop()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
