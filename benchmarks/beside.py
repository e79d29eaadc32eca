"""What rollouts cost the trainer that shares its interpreter: a pass with and without them.

A client with so many requests in flight (`load.py`'s: everything of a run but a model, null servers
that answer after some seconds) flows on its own thread, while this one runs forward and backward
passes of the quickstart's model. Windows with and without rollouts take turns in one process, for
each interval at which Python takes the interpreter from a thread. Rule: a pass takes at most 3 %
longer beside 1,000 requests in flight.

    python -m benchmarks.beside --out benchmarks/results/beside.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.load import Client, cpu_name, null_servers
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.serving.event_loop import SWITCH_INTERVAL_S
from lightning_grpo.shipped import resolve_path

INTERVALS_S = (0.005, 0.0005, SWITCH_INTERVAL_S)
TOKENS = {"many small kernels": (50,) * 4, "few large ones": (45,) * 128}


class Passes:
    """Forward and backward passes over rows of some lengths."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_path("shipped:quickstart"), dtype=torch.float32
        )
        self._policy = PackedPolicy(model)
        self._ids = torch.randint(5, 50, (sum(lengths),))
        self._bounds = torch.tensor([0, *lengths]).cumsum(0)

    def seconds(self, window_s: float) -> list[float]:
        """How long each takes, for so long."""
        taken: list[float] = []
        until = time.perf_counter() + window_s
        while time.perf_counter() < until:
            began = time.perf_counter()
            self._policy(self._ids, self._bounds)[0].sum().backward()
            taken.append(time.perf_counter() - began)
        return taken


class Flow:
    """Batch after batch, on a thread, while it is switched on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._on, self._over = threading.Event(), threading.Event()
        self.completions = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def switch(self, on: bool) -> None:
        """On, or off once the batch under way has ended."""
        (self._on.set if on else self._on.clear)()

    def end(self) -> None:
        """For good."""
        self._over.set()
        self._on.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self._on.wait()
            self._client.advance()
            self.completions += self._client.next_batch()


def measure(
    in_flight: int, delay_s: float, window_s: float, rounds: int, interval_s: float
) -> dict[str, Any]:
    """Windows in turn, at one interval."""
    report: dict[str, Any] = {"interval_s": interval_s}
    with null_servers(1, delay_s) as urls, tempfile.TemporaryDirectory() as folder:
        client = Client(urls, in_flight, together=False, run_dir=Path(folder))
        with client.started():
            sys.setswitchinterval(interval_s)
            flow = Flow(client)
            for name, lengths in TOKENS.items():
                passes, found = Passes(lengths), ([], [])
                passes.seconds(1.0)
                for _ in range(rounds):
                    for beside in (False, True):
                        flow.switch(beside)
                        time.sleep(delay_s)
                        found[beside].append(statistics.mean(passes.seconds(window_s)))
                alone, beside_s = map(statistics.median, found)
                report[name] = {
                    "alone_ms": round(1e3 * alone, 2),
                    "beside_ms": round(1e3 * beside_s, 2),
                    "ratio": round(beside_s / alone, 3),
                }
            report["completions"] = flow.completions
            flow.end()
    return report


def main() -> None:
    """Each interval in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--delay-s", type=float, default=5.0)
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--intervals", type=float, nargs="+", default=list(INTERVALS_S))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for interval_s in args.intervals:
        row = measure(args.in_flight, args.delay_s, args.window_s, args.rounds, interval_s)
        print(json.dumps(row), flush=True)
        rows.append(row)
    report = {
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "load_average": list(os.getloadavg()),
        "date": datetime.now(UTC).date().isoformat(),
        "in_flight": args.in_flight,
        "delay_s": args.delay_s,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
