"""A weight group over NCCL: the trainer on GPU 0, a receiver that joins as SGLang does on GPU 1."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_grpo.weights.gather import make_buckets
from lightning_grpo.weights.process_group import WeightGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RECEIVER = """
import json, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world
from torch.distributed.rendezvous import rendezvous
invitation, sizes = json.loads(sys.argv[1])
torch.cuda.set_device(1)
timeout = timedelta(seconds=60)
address = f"tcp://{invitation['master_address']}:{invitation['master_port']}"
store, rank, size = next(rendezvous(address, 1, 2, timeout=timeout))
store.set_timeout(timeout)
name = invitation["group_name"]
group, _ = _new_process_group_helper(
    size, rank, [], "nccl", PrefixStore(name, store), group_name=name, timeout=timeout)
_world.pg_group_ranks[group] = {0: 0, 1: 1}
for size in sizes:
    flat = torch.empty(size, dtype=torch.uint8, device="cuda:1")
    dist.broadcast(flat, src=0, group=group)
    print(int(flat.view(torch.int64).sum()), flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def receiver(group: WeightGroup, sizes: list[int]):
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, json.dumps([group.invitation(), sizes])],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_buckets_arrive_whole_and_a_broadcast_nobody_takes_is_ended_by_abort():
    weights = {f"w{i}": torch.randn(1024, 16384, device="cuda:0").bfloat16() for i in range(96)}
    buckets = make_buckets(weights, 512 << 20)
    group = WeightGroup("nccl-test", "nccl", 2, "127.0.0.1", 60.0)
    with receiver(group, [b.flat.nbytes for b in buckets] * 2) as process:
        group.join([])
        for attempt in range(2):
            started = time.perf_counter()
            for bucket in buckets:
                group.broadcast(bucket.flat)
            seconds = time.perf_counter() - started
            num_bytes = sum(b.flat.nbytes for b in buckets)
            print(f"pass {attempt}: {num_bytes / 1e9:.2f} GB in {seconds * 1e3:.0f} ms")
            for bucket in buckets:
                assert int(process.stdout.readline()) == int(bucket.flat.view(torch.int64).sum())
        failures = []

        def send():
            try:
                group.broadcast(buckets[0].flat)
            except RuntimeError as error:
                failures.append(error)

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        time.sleep(2)
        assert sending.is_alive()
        started = time.perf_counter()
        group.abort()
        sending.join(30)
        print(f"abort released the sender after {time.perf_counter() - started:.2f} s: {failures}")
        assert not sending.is_alive()
