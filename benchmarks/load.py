"""What the rollout client costs (CPU, memory, its event loop) beside servers that compute nothing.

Everything of a run is there but a model: prompts, gate, episodes, a reward on the loop, the pool,
HTTP over sockets. So many episodes are let in at once and held until every server's share has
arrived (the hardest start); then batches of as many flow for some seconds. Rules: at 10,000 in
flight memory stays below 25 kB a request, and the loop is not held longer than 0.1 s; CPU is the
client's process alone. Where other programs run (`load_average`), what counts is CPU time, not the
clock's.

    python -m benchmarks.load --out benchmarks/results/load.json      # a quarter of an hour
    python -m benchmarks.load --in-flight 100 --servers 1 --seconds 1 # one case, to try it out
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.producer import RolloutProducer
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import EpisodeContext, RLVRWorkflow
from lightning_grpo.servers.base import RunningServers
from lightning_grpo.serving.event_loop import EventLoop
from lightning_grpo.serving.server import Member
from lightning_grpo.session.assembly import Beginning, Live, QuietHeap, open_live
from lightning_grpo.session.material import SessionSettings, open_material
from lightning_grpo.shipped import resolve_path
from lightning_grpo.types import Prompt, Sampling, Trajectory
from lightning_grpo.validation import Evaluation
from lightning_grpo.weights.publisher import SyncSettings

IN_FLIGHT, SERVERS = (100, 1_000, 10_000), (1, 16, 200)
GROUP_SIZE, NEW_TOKENS = 8, 128
BEAT_S = 0.01


class AloneWorkflow(RLVRWorkflow):
    """As an episode of several turns: each of its requests travels alone."""

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory:
        """As it was."""
        return await super().run(prompt, context)


async def reward(completion: str) -> float:
    """Costs nothing."""
    return float(len(completion) % 7)


class Beat:
    """How long the loop was held at worst, looked at every 10 ms."""

    def __init__(self) -> None:
        self._worst = (0.0, 0.0)

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            before, cpu = time.monotonic(), time.thread_time()
            await asyncio.sleep(BEAT_S)
            held, computed = time.monotonic() - before - BEAT_S, time.thread_time() - cpu
            self._worst = (max(self._worst[0], held), max(self._worst[1], computed))

    def take(self, what: str) -> dict[str, float]:
        """The worst since the last time, on the clock and in CPU time (without other programs)."""
        (held, computed), self._worst = self._worst, (0.0, 0.0)
        return {f"{what}_held_s": round(held, 3), f"{what}_held_cpu_s": round(computed, 3)}


class Client:
    """Everything of a run beside a model, on its event loop."""

    def __init__(self, urls: list[str], in_flight: int, together: bool, run_dir: Path) -> None:
        workflow = (RLVRWorkflow if together else AloneWorkflow)(
            reward, Sampling(max_new_tokens=NEW_TOKENS)
        )
        self.settings = SessionSettings(
            model_path=str(resolve_path("shipped:quickstart")),
            run_dir=run_dir,
            prompts={"": Prompts("shipped:quickstart/train.jsonl", column="question")},
            val_prompts={},
            workflow=workflow,
            servers=RunningServers(urls),
            batch_size=-(-in_flight // GROUP_SIZE),
            group_size=GROUP_SIZE,
            max_staleness=0,
            limits=RolloutLimits(reward_processes=0),
            evaluation=Evaluation(greedy=False),
        )
        self.beat = Beat()
        self.version = -1
        self.service = EventLoop()
        self._live: Live | None = None
        self._heap = QuietHeap()

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[RolloutProducer]:
        beginning: Future[Beginning] = Future()
        beginning.set_result(Beginning("bench", None, None, SyncSettings(transport=None)))
        watching = asyncio.create_task(self.beat.watch())
        async with open_live(self.settings, open_material(self.settings), beginning) as live:
            self._live = live
            live.pool.on_restart(self._restored)
            yield live.producer
        watching.cancel()

    @contextmanager
    def started(self) -> Iterator[None]:
        """Connected; every episode waits for the first weights."""
        self.service.start(self._build)
        try:
            time.sleep(1.0)  # what is to be admitted is
            self._heap.freeze()
            yield
        finally:
            self._heap.thaw()
            self.service.close()

    def advance(self) -> None:
        """The servers have new weights: let the next batch go."""
        self.version += 1
        self.service.run(self._advance).result()

    async def _restored(self, member: Member) -> None:
        member.mark_clean(self.version, "default")

    async def _advance(self) -> None:
        assert self._live is not None
        for member in self._live.pool.members:
            member.mark_clean(self.version, "default")
        await self._live.pool.resume()
        self._live.producer.advance(self.version)

    def next_batch(self) -> int:
        """Wait for one; how many completions it has."""
        assert self._live is not None
        groups = self.service.run(self._live.producer.take).result(timeout=600)
        return sum(len(group.trajectories) for group in groups)


@contextmanager
def null_servers(
    number: int, delay_s: float = 0.0, new_tokens: int = NEW_TOKENS, spread: bool = False
) -> Iterator[list[str]]:
    """So many servers in one process of their own, which answer after a while."""
    command = [sys.executable, "-m", "benchmarks.null_server", "--servers", str(number)]
    command += ["--spread"] if spread else []
    process = subprocess.Popen(
        [*command, "--new-tokens", str(new_tokens), "--delay-s", str(delay_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield [line.strip() for line in iter(process.stdout.readline, "READY\n")]
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def ask(url: str, path: str, body: Any = None) -> Any:
    """One control call to a null server."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(url + path, data, timeout=60) as reply:
        return json.loads(reply.read())


def measure(in_flight: int, num_servers: int, together: bool, seconds: float) -> dict[str, Any]:
    """One case, in this process."""
    me = psutil.Process()
    with null_servers(num_servers) as urls, tempfile.TemporaryDirectory() as folder:
        client = Client(urls, in_flight, together, Path(folder))
        wanted = client.settings.batch_size * GROUP_SIZE
        with client.started():
            ask(urls[0], "/hold", True)
            client.beat.take("")
            memory, cpu, began = me.memory_info().rss, me.cpu_times(), time.perf_counter()
            client.advance()
            while ask(urls[0], "/server_info")["num_requests"] < wanted:
                time.sleep(0.1)
            start_s = time.perf_counter() - began
            memory = me.memory_info().rss - memory
            connections = len(me.net_connections("tcp"))
            started = {"seconds": start_s, "cpu_ms": cpu_ms(me, cpu) / wanted}
            held = client.beat.take("start")
            ask(urls[0], "/hold", False)
            client.next_batch()
            held |= client.beat.take("replies_at_once")
            flowing = flow(client, me, seconds)
    return {
        "in_flight": wanted,
        "servers": num_servers,
        "together": together,
        "connections": connections,
        "kb_per_request": round(memory / wanted / 1e3, 1),
        "start_s": round(started["seconds"], 2),
        "start_cpu_ms_per_request": round(started["cpu_ms"], 3),
        **held,
        **flowing,
    }


def flow(client: Client, me: psutil.Process, seconds: float) -> dict[str, Any]:
    """Batch after batch."""
    began, cpu, completions = time.perf_counter(), me.cpu_times(), 0
    while time.perf_counter() - began < seconds:
        client.advance()
        completions += client.next_batch()
    elapsed = time.perf_counter() - began
    return {
        "completions": completions,
        "cpu_ms_per_completion": round(cpu_ms(me, cpu) / completions, 3),
        "requests_per_s": round(completions / elapsed),
        **client.beat.take("flow"),
    }


def cpu_ms(me: psutil.Process, since: Any) -> float:
    """Of this process, in user and kernel."""
    now = me.cpu_times()
    return 1e3 * (now.user + now.system - since.user - since.system)


def in_a_process(in_flight: int, servers: int, together: bool, seconds: float) -> dict[str, Any]:
    """One case with a memory of its own."""
    command = [sys.executable, "-m", "benchmarks.load", "--in-flight", str(in_flight)]
    command += ["--servers", str(servers), "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, *([] if together else ["--alone"])], stdout=subprocess.PIPE, check=True
    )
    return dict(json.loads(done.stdout))


def report(seconds: float) -> dict[str, Any]:
    """All cases."""
    cases = []
    for together in (True, False):
        for in_flight in IN_FLIGHT:
            for servers in SERVERS:
                case = in_a_process(in_flight, servers, together, seconds)
                print(json.dumps(case), file=sys.stderr, flush=True)
                cases.append(case)
    return {
        "command": "python -m benchmarks.load --out benchmarks/results/load.json",
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "load_average": list(os.getloadavg()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lightning-grpo", "aiohttp", "anyio", "msgspec")},
        },
        "date": datetime.now(UTC).date().isoformat(),
        "new_tokens": NEW_TOKENS,
        "cases": cases,
    }


def cpu_name() -> str:
    """What the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "")


def main() -> None:
    """All cases into a file, or one to the screen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="each request has its exchange")
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    if args.out is None:
        print(json.dumps(measure(args.in_flight, args.servers, not args.alone, args.seconds)))
    else:
        args.out.write_text(json.dumps(report(args.seconds), indent=1) + "\n")


if __name__ == "__main__":
    main()
