"""A run on 8 to 1,024 GPUs, simulated from the times of its parts.

Discrete events (simpy): servers decode what they hold, one completion ending after the other; the
gate lets groups in as far as the staleness allows; the trainer takes a rollout batch, trains and
syncs; servers and trainer nodes fail and come back. Times of parts are those of
`lightning_grpo.plan`, which are held against measured runs, or measured themselves (VALIDATED);
what was neither measured nor derived from it is in ASSUMED, each with its source.

    pip install 'lightning-grpo[bench]'
    python -m benchmarks.scale --validate
    python -m benchmarks.scale --out benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy
from transformers import AutoConfig

from lightning_grpo.plan.hardware import (
    CAST_BYTES,
    COPY_SHARE,
    DECODE_BYTES,
    Packed,
    gpu_speed,
    optimizer_seconds,
    training_seconds,
)
from lightning_grpo.policy.size import FULL, HALF, ModelSize, TrainingSetup, model_size

NODE = 8
ASSUMED = {
    "network": (40e9, "bytes/s of a GPU between machines: 0.8 of one 400 Gb/s port each"),
    "gpu_failures_per_hour": (
        1 / 50_000,
        "419 interruptions of 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783, section 3.3.4)",
    ),
    "server_restart_s": (78.0, "start of SGLang on an H200 (benchmarks/h200); weights come after"),
    "trainer_restart_s": (240.0, "start, load of a checkpoint and compilation, from main_job"),
    "checkpoint_steps": (20, "steps that a trainer loses at most; twice what it loses on average"),
    "spread": (0.05, "of servers' speeds (log-normal): hosts of one kind differed so in our calls"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    },
    "32B": {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
    },
}
TENSOR_PARALLEL = {"7B": 1, "32B": 2}
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SERVING_SHARES = (0.25, 0.5, 0.75, 0.875)
STRONG = 256
"""Beyond this size a row with this size's batch stands beside the one whose batch grows."""


@dataclass(frozen=True)
class Load:
    """What a rollout batch asks.

    Attributes:
        batch: Prompts.
        group: Completions of each.
        prompt: Tokens.
        mean: Tokens of a completion.
        sigma: Of their logarithm; 0: all alike.
        longest: Tokens at most.
        staleness: Versions.
    """

    batch: int
    group: int = 16
    prompt: int = 512
    mean: int = 2048
    sigma: float = 0.8
    longest: int = 16384
    staleness: int = 1


@dataclass(frozen=True)
class Parts:
    """How long things take, in seconds.

    Attributes:
        token: Of one token for each of `n` requests with `context` tokens in all, on a server.
        prefill: Of one token of a prompt, or of one that is read again.
        train: Of a rollout batch of so many tokens, from its arrival to the last optimizer step.
        sync: Of the weights, while servers stand still.
    """

    token: Callable[[int, float], float]
    prefill: float
    train: Callable[[float], float]
    sync: float


@dataclass
class Failures:
    """What breaks, how often, and how long it is gone; 0 a second: nothing does."""

    per_gpu_s: float = 0.0
    server_gpus: int = 1
    trainer_gpus: int = 1
    server_s: float = 0.0
    trainer_s: float = 0.0
    lost_steps: float = 0.0


@dataclass(order=True)
class Request:
    """One completion; `end` is the number of tokens its server has decoded when it is done."""

    end: float
    left: int = field(compare=False)
    context: int = field(compare=False)
    group: Group = field(compare=False)


@dataclass
class Group:
    """What is trained on together."""

    version: int
    open: int
    tokens: int = 0


class Server:
    """Decodes one token after the other for up to `running` requests; others wait.

    All requests advance together, so one counter says how far each is, and only ends are events.
    """

    def __init__(self, run: Run, speed: float, running: int) -> None:
        self.run, self.speed, self.running = run, speed, running
        self.decoded = self.context = 0.0
        self.active: list[Request] = []
        self.waiting: list[Request] = []
        self.debt = 0.0  # seconds of reading prompts
        self.busy_s = 0.0
        self.held = False
        self.process = run.env.process(self.serve())

    @property
    def load(self) -> int:
        """Requests here."""
        return len(self.active) + len(self.waiting)

    def add(self, requests: list[Request]) -> None:
        """Take requests, and go on."""
        self.waiting += requests
        self.wake()

    def wake(self) -> None:
        """Look anew at what there is."""
        if self.process.is_alive and self.run.env.active_process is not self.process:
            self.process.interrupt()

    def empty(self) -> list[Request]:
        """Give everything away, as it is."""
        for each in self.active:
            each.left = max(1, round(each.end - self.decoded))
        given, self.active, self.waiting = self.active + self.waiting, [], []
        self.context = 0.0
        return given

    def admit(self) -> None:
        """Start what waits, as far as there is room."""
        while self.waiting and len(self.active) < self.running:
            request = self.waiting.pop(0)
            request.end = self.decoded + request.left
            heapq.heappush(self.active, request)
            self.context += request.context
            self.debt += request.context * self.run.parts.prefill / self.speed

    def serve(self) -> Generator[simpy.Event, Any, None]:
        """For ever."""
        env = self.run.env
        while True:
            try:
                if self.held or not self.load:
                    yield env.timeout(math.inf)
                self.admit()
                each = self.run.parts.token(len(self.active), self.context) / self.speed
                debt, self.debt = self.debt, 0.0
                steps = max(0.0, self.active[0].end - self.decoded)
                began = env.now
                try:
                    yield env.timeout(debt + steps * each)
                    done = steps
                except simpy.Interrupt:
                    past = env.now - began
                    self.debt += max(0.0, debt - past)
                    done = min(steps, max(0.0, past - debt) / each)
                self.busy_s += env.now - began
                self.decoded += done
                self.context += done * len(self.active)
                while self.active and self.active[0].end <= self.decoded + 1e-9:
                    request = heapq.heappop(self.active)
                    self.context -= request.context + request.left
                    self.run.ended(request)
            except simpy.Interrupt:
                continue


class Run:
    """Gate, servers and trainer."""

    def __init__(
        self,
        load: Load,
        parts: Parts,
        servers: int,
        running: int,
        failures: Failures,
        seed: int = 0,
    ) -> None:
        self.env, self.load, self.parts = simpy.Environment(), load, parts
        self.failures, self.draw = failures, random.Random(seed)
        self.chance = random.Random(seed + 1)  # so that lengths stay the same where things fail
        self.version = self.admitted = 0
        self.open: list[Group] = []
        self.finished: list[Group] = []
        self.arrival = self.env.event()
        spread = ASSUMED["spread"][0] if load.sigma else 0.0
        speeds = (math.exp(self.draw.gauss(0.0, float(spread))) for _ in range(servers))
        self.servers = [Server(self, speed, running) for speed in speeds]
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.tokens: list[int] = []
        self.lost_s = 0.0
        self.busy_at: list[float] = []
        self.env.process(self.train())
        if failures.per_gpu_s:
            for server in self.servers:
                self.env.process(self.break_server(server))

    def length(self) -> int:
        """Of one completion."""
        load = self.load
        if not load.sigma:
            return load.mean
        drawn = self.draw.lognormvariate(0.0, load.sigma) * load.mean / math.exp(load.sigma**2 / 2)
        return int(min(max(drawn, 16), load.longest))

    def admit(self) -> None:
        """Let in what may still be taken in time; a group goes to the server with least to do."""
        given: dict[int, list[Request]] = {}
        loads = [(server.load, i) for i, server in enumerate(self.servers)]
        heapq.heapify(loads)
        while self.admitted < (self.version + self.load.staleness + 1) * self.load.batch:
            group = Group(self.version, self.load.group)
            self.open.append(group)
            self.admitted += 1
            for _ in range(self.load.group):
                count, i = heapq.heappop(loads)
                given.setdefault(i, []).append(Request(0, self.length(), self.load.prompt, group))
                heapq.heappush(loads, (count + 1, i))
        for i, requests in given.items():
            self.servers[i].add(requests)

    def ended(self, request: Request) -> None:
        """A completion is there; a group with its last."""
        group = request.group
        group.tokens += request.context + request.left
        group.open -= 1
        if not group.open:
            self.open.remove(group)
            self.finished.append(group)
            if not self.arrival.triggered:
                self.arrival.succeed()

    def ready(self) -> bool:
        """Whether a batch can be taken: enough groups, and none left behind that must go now."""
        due = self.version - self.load.staleness
        return len(self.finished) >= self.load.batch and not any(
            group.version <= due for group in self.open
        )

    def train(self) -> Generator[simpy.Event, Any, None]:
        """Take, train, sync."""
        env = self.env
        self.admit()
        while True:
            began = env.now
            while not self.ready():
                self.arrival = env.event()
                yield self.arrival
            waited = env.now - began
            self.finished.sort(key=lambda group: group.version)
            taken = self.finished[: self.load.batch]
            del self.finished[: self.load.batch]
            tokens = sum(group.tokens for group in taken)
            yield env.timeout(self.parts.train(tokens) + self.broken(env.now - began))
            for server in self.servers:
                server.held = True
                server.wake()
            yield env.timeout(self.parts.sync)
            self.version += 1
            for server in self.servers:
                server.held = False
                server.debt += server.context * self.parts.prefill / server.speed  # read again
                server.wake()
            self.admit()
            self.steps.append(env.now - began)
            self.waits.append(waited)
            self.tokens.append(tokens)
            self.busy_at.append(sum(server.busy_s for server in self.servers))

    def broken(self, seconds: float) -> float:
        """What failures of trainer GPUs add to a step, on average: exact in the long run."""
        rate = self.failures.per_gpu_s * self.failures.trainer_gpus
        typical = sum(self.steps[-5:]) / len(self.steps[-5:]) if self.steps else seconds
        lost = rate * typical * (self.failures.trainer_s + self.failures.lost_steps * typical)
        self.lost_s += lost
        return lost

    def break_server(self, server: Server) -> Generator[simpy.Event, Any, None]:
        """Its requests go on elsewhere, from the tokens that they have."""
        rate = self.failures.per_gpu_s * self.failures.server_gpus
        while True:
            yield self.env.timeout(self.chance.expovariate(rate))
            others = [each for each in self.servers if each is not server and not each.held]
            server.held = True
            requests = server.empty()
            server.wake()
            for request in requests:
                min(others or [server], key=lambda each: each.load).add([request])
            yield self.env.timeout(self.failures.server_s)
            server.held = False
            server.wake()

    def result(self, steps: int, warm: int) -> dict[str, float]:
        """Means of the steps that count."""
        while len(self.steps) < steps + warm:
            self.env.step()
        took = sum(self.steps[warm:])
        busy = self.busy_at[-1] - self.busy_at[warm - 1]
        return {
            "step_s": round(took / steps, 3),
            "trainer_waits": round(sum(self.waits[warm:]) / took, 3),
            "servers_idle": round(1 - busy / took / len(self.servers), 3),
            "tokens_per_s": round(sum(self.tokens[warm:]) / took),
        }


def planned(size: ModelSize, load: Load, trainers: int, servers: int, tp: int) -> Parts:
    """Times of parts by the formulas of `plan`, and the network between machines."""
    speed, network = gpu_speed("h200"), float(ASSUMED["network"][0])
    shard = min(NODE, trainers)
    # A block's activations are computed again: 32B has no room for them.
    setup = TrainingSetup(
        16384, ranks=shard, checkpointing=size.parameters > 10e9, compiled=True, keeps=False
    )
    mean = load.prompt + load.mean
    nodes = max(1, trainers // NODE)

    def token(n: int, context: float) -> float:
        read = HALF * size.parameters + context * size.kv_bytes_per_token
        read += n * size.vocab * DECODE_BYTES
        gpu = max(read / speed.bandwidth, 2 * size.parameters * n / speed.flops) / tp
        return speed.decode_s + max(gpu, n * speed.token_s)

    def train(tokens: float) -> float:
        per_rank = tokens / trainers
        count = max(1, math.ceil(per_rank / setup.max_tokens))
        rows = max(1, round(per_rank / count / mean))
        shared = load.prompt * (rows - rows / min(load.group, rows))
        packed = Packed((mean,) * rows, round(rows * mean - shared))
        seconds = training_seconds(size, setup, [packed] * count, load.mean / mean, speed)
        # Gradients of a shard are summed over machines (hybrid sharding).
        seconds += 2 * FULL * size.parameters / shard * (nodes - 1) / nodes / network
        return seconds + optimizer_seconds(size, setup, speed) + speed.other_s

    gather = CAST_BYTES * size.parameters / shard / (COPY_SHARE * speed.bandwidth)
    # One broadcast to all servers, in pieces: bounded by the port of the machine that sends.
    send = HALF * size.parameters / network
    in_flight = (load.staleness + 1) * load.batch * load.group / servers
    sync = gather + send + size.layers * speed.score_s + in_flight * speed.request_s + speed.sync_s
    return Parts(token, 2 * size.parameters / speed.flops / tp, train, sync)


def simulated(name: str, gpus: int, share: float, load: Load, fails: bool) -> dict[str, Any]:
    """One run."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=152064, tie_word_embeddings=False, **SHAPES[name]
    )
    size = model_size(config)
    assert size is not None
    tp = TENSOR_PARALLEL[name]
    serving = max(tp, round(gpus * share) // tp * tp)
    trainers, servers = gpus - serving, serving // tp
    failures = Failures()
    if fails:
        lost = float(ASSUMED["checkpoint_steps"][0]) / 2
        failures = Failures(
            float(ASSUMED["gpu_failures_per_hour"][0]) / 3600,
            *(tp, trainers, float(ASSUMED["server_restart_s"][0])),
            *(float(ASSUMED["trainer_restart_s"][0]), lost),
        )
    parts = planned(size, load, trainers, servers, tp)
    found: dict[str, Any] = Run(load, parts, servers, 256, failures).result(steps=8, warm=3)
    found["tokens_per_s_per_gpu"] = round(found["tokens_per_s"] / gpus)
    found["sync_s"] = round(parts.sync, 2)
    found["in_flight"] = (load.staleness + 1) * load.batch * load.group
    found["completions_per_s"] = round(load.batch * load.group / found["step_s"], 1)
    what = {"batch": load.batch, "staleness": load.staleness, "fails": fails}
    return {"model": name, "gpus": gpus, "serving_share": share} | what | found


def validated() -> list[dict[str, Any]]:
    """The measured runs, from their own parts: what waits for what is all that is predicted."""
    file = Path(__file__).parent / "results/h200_async_run.json"
    measured = json.loads(file.read_text())
    # Tokens/s of one server of the 1.5B shape by requests at once (benchmarks/h200/README.md).
    decoded = {64: 26e3, 256: 48e3, 512: 55e3}

    def token(n: int, context: float) -> float:
        near = min(decoded, key=lambda each: abs(math.log(each / max(n, 1))))
        return near / decoded[near] * max(0.3, n / near) ** 0.5

    rows = []
    for call, base in (("two GPUs", measured), ("one shared GPU", measured["shared_gpu"])):
        zero = base["staleness_0"]
        train = zero["mean_step_s"] - zero["mean_wait_s"] - zero["time/weight_sync_s"]
        for staleness in (0, 1, 2):
            row = base.get(f"staleness_{staleness}", {})
            if "mean_step_s" not in row:
                continue
            load = Load(32, 8, 128, 512, 0.0, 512, staleness)
            parts = Parts(token, 0.0, lambda _, t=train: t, zero["time/weight_sync_s"])
            found = Run(load, parts, 1, 512, Failures()).result(steps=5, warm=2)
            ratio = found["step_s"] / row["mean_step_s"]
            rows.append(
                {
                    "run": call,
                    "staleness": staleness,
                    "step_s": found["step_s"],
                    "measured_s": round(row["mean_step_s"], 3),
                    "ratio": round(ratio, 3),
                    "trainer_waits": found["trainer_waits"],
                    "servers_idle": found["servers_idle"],
                    "measured_servers_idle": row.get("idle/server_fraction"),
                }
            )
    return rows


def main() -> None:
    """Validate, then every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true", help="the measured runs alone")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"assumed": ASSUMED, "validated": validated(), "rows": []}
    for row in report["validated"]:
        print(row)
    for name in SHAPES if not args.validate else ():
        for gpus in args.sizes:
            load = Load(batch=2 * gpus, staleness=4)
            tried = [simulated(name, gpus, share, load, False) for share in SERVING_SHARES]
            best = max(tried, key=lambda row: row["tokens_per_s"])
            share = best["serving_share"]
            rows = [best, simulated(name, gpus, share, load, True)]
            rows.append(simulated(name, gpus, share, replace(load, staleness=1), False))
            if gpus > STRONG:
                rows.append(simulated(name, gpus, share, replace(load, batch=2 * STRONG), False))
            report["rows"] += rows
            for row in rows:
                print(row, flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
