"""What rollouts cost the trainer beside them: steps with and without, in a thread and a process.

A thousand requests are in flight to null servers in a process of their own, whose replies come one
after another (`--in-flight / --delay-s` completions a second of `--new-tokens` tokens), while the
main thread does what a trainer does. Three kinds of work: `launches`, operations on one number, as
many kernels are started for a GPU; forward and backward passes of the quickstart's model over few
tokens, and over many. Windows take turns in one process:

- `alone`: no request;
- `thread`: rollouts in a thread of this interpreter;
- `process`: rollouts in a process of their own;
- `rival`: no rollouts, but another process that is busy for as much of the time as that one was.

So `process` against `rival` is the price of sharing the machine's cores, `thread` against `process`
that of sharing the interpreter. The kernel tells besides how long the thread stood in the queue for
a core, which on a machine that others use says nothing of rollouts. Rule: beside 1,000 requests in
flight a step takes at most 3 % longer.

    python -m benchmarks.beside --out benchmarks/results/beside.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.load import GROUP_SIZE, AloneWorkflow, cpu_name, null_servers, reward
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.servers.base import RunningServers
from lightning_grpo.serving.event_loop import SWITCH_INTERVAL_S
from lightning_grpo.session.assembly import Beginning, QuietHeap
from lightning_grpo.session.material import RolloutsIn, SessionSettings, open_material
from lightning_grpo.session.process import place_rollouts
from lightning_grpo.session.rollouts import Publish
from lightning_grpo.shipped import resolve_path
from lightning_grpo.types import Sampling
from lightning_grpo.validation import Evaluation
from lightning_grpo.weights.publisher import SyncSettings
from lightning_grpo.weights.transport import Place, Snapshot, Target, Transport

KINDS = ("alone", "thread", "process", "rival")
SLICE_S = 0.02
LAUNCHES = 2000


class NoWeights(Transport):
    """Names a version and sends nothing."""

    def bind(self, place: Place) -> None:
        """Nothing to be kept."""

    def prepare(self, snapshot: Snapshot, version: int) -> int:
        """Nothing to be sent."""
        return 0

    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        """The name alone."""
        await target.client.update("/update_weight_version", {"new_version": label}, timeout_s)

    async def abandon(self, target: Target) -> None:
        """Nothing connects to it."""


class Flow:
    """Batch after batch of rollouts while it is switched on.

    Args:
        urls: Of null servers.
        where: In which the rollouts run.
        args: Of the command line.
        run_dir: Of the run.
    """

    def __init__(
        self, urls: list[str], where: RolloutsIn, args: argparse.Namespace, run_dir: Path
    ) -> None:
        settings = SessionSettings(
            model_path=str(resolve_path("shipped:quickstart")),
            run_dir=run_dir,
            prompts={"": Prompts("shipped:quickstart/train.jsonl", column="question")},
            val_prompts={},
            workflow=AloneWorkflow(reward, Sampling(max_new_tokens=args.new_tokens)),
            servers=RunningServers(urls),
            batch_size=-(-args.in_flight // GROUP_SIZE),
            group_size=GROUP_SIZE,
            max_staleness=0,
            limits=RolloutLimits(reward_processes=0),
            evaluation=Evaluation(greedy=False),
            rollouts_in=where,
        )
        self.completions, self.worst_lag_s = 0, 0.0
        self._size = settings.batch_size * GROUP_SIZE
        before = set(psutil.Process().children())
        self._rollouts = place_rollouts(settings, open_material(settings))
        started = self._rollouts.start()
        sync = SyncSettings(transport=NoWeights(), verify=False)
        self._rollouts.begin(Beginning("bench", None, None, sync))
        started.result()
        (self.process,) = set(psutil.Process().children()) - before or {psutil.Process()}
        self._version = -1
        self._on, self._over = threading.Event(), threading.Event()
        self._ready, self._wanted, self._taken = (threading.Event() for _ in range(3))
        for event in (self._wanted, self._taken):
            event.set()
        self.arrivals: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def switch(self, on: bool) -> None:
        """On, or off once the batch under way has ended."""
        (self._on.set if on else self._on.clear)()

    def attend(self, attended: bool) -> None:
        """Whether somebody will take the batches by `take_if_ready`."""
        (self._wanted.clear if attended else self._wanted.set)()

    def take_if_ready(self) -> float:
        """What a trainer does between two steps; the seconds that it waited for the batch."""
        if not self._ready.is_set():
            return 0.0
        began = time.perf_counter()
        self._taken.clear()
        self._wanted.set()
        self._taken.wait()
        self.arrivals.append(time.perf_counter() - began)
        return self.arrivals[-1]

    def end(self) -> None:
        """For good."""
        self._over.set()
        self._on.set()
        self._thread.join()
        self._rollouts.close()

    def _run(self) -> None:
        while not self._over.is_set():
            self._on.wait()
            self._version += 1
            weights: Future[Snapshot] = Future()
            weights.set_result({})
            self._rollouts.publish(Publish(self._version, 0, weights, Future(), Future())).result()
            self._rollouts.advance(self._version)
            self._rollouts.lag_s()
            while (now := self._rollouts.progress()) is None or now.done < now.wanted:
                time.sleep(0.1)
            self._ready.set()
            self._wanted.wait()
            self._rollouts.take(self._version).result()
            self._ready.clear()
            if not self._taken.is_set():  # by a trainer, which wants the next one later
                self._wanted.clear()
                self._taken.set()
            self.completions += self._size
            self.worst_lag_s = max(self.worst_lag_s, self._rollouts.lag_s() or 0.0)


SPIN = """
import json, os, sys, threading, time
data = json.dumps([[-0.5 - i % 7 / 8, i, None] for i in range(600)])
duty = 0.0
def read():
    global duty
    for line in sys.stdin:
        duty = float(line)
    os._exit(0)
threading.Thread(target=read, daemon=True).start()
while True:
    until = time.perf_counter() + 0.01 * duty
    while time.perf_counter() < until:
        json.loads(data)
    time.sleep(0.01 * (1.0 - duty) if duty else 0.1)
"""


class Rival:
    """A process that is busy for a part of the time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, text=True
        )

    def be_busy(self, part: float) -> None:
        """From here on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{min(part, 1.0)}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """For good."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def passes_over(lengths: tuple[int, ...]) -> Callable[[], None]:
    """A forward and a backward pass over rows of some lengths."""
    path = resolve_path("shipped:quickstart")
    policy = PackedPolicy(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    ids = torch.randint(5, 50, (sum(lengths),))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return lambda: policy(ids, bounds)[0].sum().backward()


def launches() -> Callable[[], None]:
    """As many small operations as a step starts kernels."""
    number = torch.zeros(1)

    def launch() -> None:
        for _ in range(LAUNCHES):
            number.add_(1.0)

    return launch


WORK: dict[str, Callable[[], Callable[[], None]]] = {
    "launches": launches,
    "small passes": lambda: passes_over((50,) * 4),
    "large passes": lambda: passes_over((45,) * 128),
}


@dataclass(frozen=True)
class Step:
    """A step's seconds on average: of them all, and of those in which the thread stood.

    Attributes:
        whole: By the clock.
        core: Ready to run, while other processes had the machine's cores.
        interpreter: Asleep, which this thread is only for the interpreter's lock.
    """

    whole: float
    core: float
    interpreter: float


def seconds_of(step: Callable[[], None], window_s: float, flow: Flow | None = None) -> Step:
    """What a step takes, over a while; without the waits for a batch of `flow` between steps."""
    until, steps = time.perf_counter() + window_s, 0
    whole = core = ran = 0.0
    while time.perf_counter() < until:
        began, (ran_before, stood_before) = time.perf_counter(), scheduled()
        step()
        steps += 1
        ran_now, stood_now = scheduled()
        whole += time.perf_counter() - began
        core, ran = core + stood_now - stood_before, ran + ran_now - ran_before
        if flow is not None:
            until += flow.take_if_ready()
    return Step(whole / steps, core / steps, max(0.0, whole - core - ran) / steps)


def scheduled() -> tuple[float, float]:
    """Seconds in which the kernel had this thread run, and stand in its queue."""
    ran, stood, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(ran) / 1e9, int(stood) / 1e9


@contextmanager
def flows(args: argparse.Namespace) -> Iterator[dict[str, Flow]]:
    """Rollouts in a thread and in a process, each with a server."""
    with contextlib.ExitStack() as stack:
        found = {}
        for where in ("thread", "process"):
            urls = stack.enter_context(null_servers(1, args.delay_s, args.new_tokens, spread=True))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found[where] = Flow(urls, where, args, folder)
            stack.callback(found[where].end)
        yield found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every kind of work in windows of each kind."""
    report: dict[str, Any] = {}
    busy: list[float] = []
    with contextlib.ExitStack() as stack:
        rival = Rival()
        stack.callback(rival.end)
        running = stack.enter_context(flows(args))
        heap = QuietHeap()  # as a session's
        heap.freeze()
        stack.callback(heap.thaw)
        for name, make in WORK.items():
            step, found = make(), {kind: list[Step]() for kind in KINDS}
            seconds_of(step, 1.0)
            for _ in range(args.rounds):
                for kind in KINDS:
                    sys.setswitchinterval(SWITCH_INTERVAL_S if kind == "thread" else 0.005)
                    flow = running.get(kind)
                    if flow is not None:
                        flow.attend(True)
                        flow.switch(True)
                    rival.be_busy(statistics.mean(busy) if kind == "rival" else 0.0)
                    time.sleep(args.warm_s)
                    used = running["process"].process.cpu_times()
                    found[kind].append(seconds_of(step, args.window_s, flow))
                    if kind == "process":
                        busy.append(cpu_s(running["process"].process, used) / args.window_s)
                    if flow is not None:
                        flow.switch(False)
                        flow.attend(False)
                        time.sleep(args.delay_s + 1.0)  # until the batch under way has ended
            report[name] = summary(found)
            print(json.dumps({name: report[name]}), file=sys.stderr, flush=True)
        report["process_cpu_fraction"] = round(statistics.mean(busy), 3)
        report["process_mb"] = round(running["process"].process.memory_info().rss / 1e6)
        report["event_loop_held_s"] = {
            where: round(flow.worst_lag_s, 3) for where, flow in running.items()
        }
        report["wait_for_a_batch_that_is_ready_s"] = {
            where: round(statistics.median(flow.arrivals), 3) for where, flow in running.items()
        }
        report["completions"] = {where: flow.completions for where, flow in running.items()}
    return report


def cpu_s(process: psutil.Process, since: Any) -> float:
    """What a process has computed since."""
    now = process.cpu_times()
    return float(now.user + now.system - since.user - since.system)


def summary(found: dict[str, list[Step]]) -> dict[str, Any]:
    """By kind of window: medians, and of the ratios to `alone` in the same round."""
    report: dict[str, Any] = {}
    for kind, steps in found.items():
        pairs = list(zip(steps, found["alone"], strict=True))
        ratios = [a.whole / b.whole for a, b in pairs]
        on_a_core = [(a.whole - a.core) / (b.whole - b.core) for a, b in pairs]
        report[kind] = {
            "step_ms": milliseconds(step.whole for step in steps),
            "waits_for_a_core_ms": milliseconds(step.core for step in steps),
            "waits_for_the_interpreter_ms": milliseconds(step.interpreter for step in steps),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_without_waits_for_a_core": round(statistics.median(on_a_core), 3),
            "ratios_without_waits_for_a_core": [round(each, 3) for each in on_a_core],
        }
    return report


def milliseconds(seconds: Iterable[float]) -> float:
    """Their median."""
    return round(1e3 * statistics.median(seconds), 3)


def main() -> None:
    """All of it, into a file or to the screen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--delay-s", type=float, default=5.0, help="until the last reply")
    parser.add_argument("--new-tokens", type=int, default=400)
    parser.add_argument("--window-s", type=float, default=8.0)
    parser.add_argument("--warm-s", type=float, default=0.2, help="before a window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = [round(each, 2) for each in os.getloadavg()]
    found = measure(args)
    names = ("torch", "transformers", "aiohttp", "anyio", "msgspec")
    report = {
        "command": "python -m benchmarks.beside --out benchmarks/results/beside.json",
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "load_average_before": load,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
        "date": datetime.now(UTC).date().isoformat(),
        "in_flight": args.in_flight,
        "new_tokens": args.new_tokens,
        "completions_per_s": round(args.in_flight / args.delay_s, 1),
        **found,
    }
    text = json.dumps(report, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
