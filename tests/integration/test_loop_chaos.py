"""A run beside servers that are cut off, busy, slow, broken or lying, or that come and go."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import web
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.servers.base import RunningServers, ServerList
from lightning_grpo.types import Sampling
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.transport import DiskTransport
from tests.fakes.engine_process import EngineProcess
from tests.fakes.loops import Recorder, make_data, make_module, make_prompts, make_trainer
from tests.fakes.proxy import ForwardingProxy, in_a_thread
from tests.fakes.user_objects import make_adam
from tests.fakes.wire import Wire, wire_to

RATES = {"429": 0.02, "503": 0.01, "500": 0.01, "hang": 0.005, "drop": 0.005, "lie": 0.01}


class Chaos(ForwardingProxy):
    """Answers some requests itself, and changes some answers.

    Attributes:
        on: Whether it does.
        seen: How often it did what.
    """

    def __init__(self, target: str, noise: random.Random, seen: Counter[str]) -> None:
        super().__init__()
        self._target, self._noise, self.seen, self.on = target, noise, seen, False

    @property
    def target(self) -> str:
        return self._target

    async def answer(self, request: web.Request, body: bytes) -> web.Response | None:
        kind = self._noise.choices([*RATES, ""], [*RATES.values(), 1 - sum(RATES.values())])[0]
        if not self.on or kind in ("", "lie"):
            return None
        self.seen[kind] += 1
        if kind.isdecimal():
            headers = {"Retry-After": "0.2"} if kind == "429" else {}
            return web.Response(status=int(kind), headers=headers)
        if kind == "hang":
            await asyncio.sleep(3.0)
            return None
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def changed(self, path: str, content: bytes) -> bytes:
        if not self.on or path != "/generate" or self._noise.random() > RATES["lie"]:
            return content
        self.seen["lie"] += 1
        answer = json.loads(content)
        for reply in answer if isinstance(answer, list) else [answer]:
            ids, meta = reply["output_ids"], reply["meta_info"]
            logprobs = meta.get("output_token_logprobs")
            lie = self._noise.randrange(4)
            if lie == 0 and ids:
                ids[0] = 10**6
            elif lie == 1 and logprobs:
                logprobs[0][0] = 0.5
            elif lie == 2:
                meta["finish_reason"] = {"type": "tired"}
            else:
                ids.append(1)
        return json.dumps(answer).encode()


class Cutter(Callback):
    """While it trains, cuts one wire after another, for seconds, and lists some of them only."""

    def __init__(self, wires: list[Wire], noise: random.Random, file: Path) -> None:
        self.wires, self.noise, self.ended = wires, noise, threading.Event()
        self.file = file
        self.list(wires)
        self.thread = threading.Thread(target=self.work)

    def on_train_start(self, trainer, pl_module) -> None:
        self.thread.start()

    def list(self, wires: list[Wire]) -> None:
        self.file.write_text("".join(f"{wire.url}\n" for wire in wires))

    def work(self) -> None:
        while not self.ended.wait(self.noise.uniform(2.0, 6.0)):
            self.list(self.noise.sample(self.wires, self.noise.choice([0, 1, 1, 2, 2])))
            wire = self.noise.choice(self.wires)
            wire.cut(quietly=self.noise.random() < 0.3)
            self.ended.wait(self.noise.uniform(0.5, 4.0))
            wire.mend()

    def end(self) -> None:
        self.ended.set()
        self.thread.join()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("comes", [False, True])
def test_no_prompt_is_lost_and_no_lie_is_trained_on(tiny_model, tmp_path, seed, comes):
    steps, batch = 100, 4
    noise, seen = random.Random(seed), Counter()
    transport = [DiskTransport(), ProcessGroupTransport("gloo", timeout_s=4.0)][seed]
    engines = [EngineProcess(tiny_model, tmp_path / f"engine-{i}") for i in range(2)]
    try:
        with (
            in_a_thread(Chaos(engines[0].url, noise, seen)) as one,
            in_a_thread(Chaos(engines[1].url, noise, seen)) as other,
            wire_to(one.url) as first,
            wire_to(other.url) as second,
        ):
            recorder = Recorder()
            cutter = Cutter([first, second], noise, tmp_path / "servers.txt")
            fixed = RunningServers([first.url, second.url])
            data = make_data(
                ServerList(str(cutter.file), look_every_s=0.5) if comes else fixed,
                prompts=make_prompts(steps * batch),
                val_prompts=make_prompts(8),
                batch_size=batch,
                max_staleness=1,
                limits=RolloutLimits(reward_processes=0, max_server_restarts=steps),
            )
            sync = WeightSync(transport, request_timeout_s=10.0)
            trainer = make_trainer(
                tmp_path,
                max_steps=steps,
                val_check_interval=20,
                callbacks=[sync, cutter, recorder],
            )
            data.servers.start(str(tiny_model), tmp_path)  # before anything goes wrong
            one.on = other.on = True
            try:
                trainer.fit(make_module(tiny_model), data)
            finally:
                one.on = other.on = False
                cutter.end()
    finally:
        for engine in engines:
            engine.close()
    print(f"seed {seed}: {dict(seen)}, {first.num_cuts + second.num_cuts} cuts")
    rows = [g.prompt.row for b in recorder.batches for g in b.rollout.groups]
    assert sorted(rows) == list(range(steps * batch))
    assert data.session.state_dict()["producer"]["ledger"]["counts"] == {"trained": steps * batch}
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4
    assert min(seen.values()) > 0


# -- servers that come and go ----------------------------------------------------------------------


@contextmanager
def engines_of(model, folder, number):
    """So many engines, started at once, that give equal requests equal bits."""
    logs = [folder / f"engine-{slot}.log" for slot in range(number)]
    with ThreadPoolExecutor(number) as threads:
        starting = [threads.submit(EngineProcess, model, log, ["--deterministic"]) for log in logs]
    try:
        yield [each.result() for each in starting]
    finally:
        for each in starting:
            if each.exception() is None:
                each.result().close()


@pytest.fixture(scope="module")
def two_engines(tiny_model, tmp_path_factory):
    with engines_of(tiny_model, tmp_path_factory.mktemp("two"), 2) as engines:
        yield engines


@pytest.fixture(scope="module")
def four_engines(two_engines, tiny_model, tmp_path_factory):
    with engines_of(tiny_model, tmp_path_factory.mktemp("four"), 2) as others:
        yield two_engines + others


class Operator(Callback):
    """Changes the list of servers while the next batch is sampled, and sees to it that it counts.

    Args:
        file: The list.
        plan: Which servers are on it, by the step behind which it is changed.
        said: All that the run has said.
    """

    def __init__(self, file, plan, said) -> None:
        self.file, self.plan, self.said = file, plan, said
        self.write(plan[0])
        self.began_with = self.wanted = len(plan[0])

    def write(self, urls) -> None:
        self.file.write_text("".join(f"{url}\n" for url in urls))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        until = time.monotonic() + 60
        while self.wanted != self.began_with + sum(
            ("has joined" in text) - ("has left" in text) for text in self.said()
        ):
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)
        if trainer.global_step in self.plan:
            self.write(self.plan[trainer.global_step])
            self.wanted = len(self.plan[trainer.global_step])


@pytest.fixture
def fit_listed(tiny_model, tmp_path, caplog):
    """A deterministic run on listed servers, and what it left: trajectories, weights, servers."""

    def fit(name, plan, max_steps, where="thread", transport=None, ckpt_path=None):
        caplog.clear()
        operator = Operator(tmp_path / name, plan, lambda: [r.message for r in caplog.records])
        recorder, module = Recorder(), make_module(tiny_model, optimizer=make_adam)
        data = make_data(
            ServerList(str(tmp_path / name), look_every_s=0.02),
            group_size=4,
            sampling=Sampling(max_new_tokens=24),
            prompts=make_prompts(20),
            rollouts_in=where,
        )
        callbacks = [WeightSync(transport), recorder, operator]
        trainer = make_trainer(
            tmp_path, max_steps=max_steps, deterministic=True, callbacks=callbacks
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        groups = [g for b in recorder.batches for g in b.rollout.groups]
        counts = data.session.state_dict()["producer"]["ledger"]["counts"]
        assert counts == {"trained": 2 * max_steps}
        return groups, module.state_dict(), recorder.of("rollout/servers")

    yield fit
    torch.use_deterministic_algorithms(False)


def assert_same_run(one, other):
    assert one[0] == other[0]
    for name, weight in one[1].items():
        assert torch.equal(weight, other[1][name]), name


def test_a_run_whose_one_server_gives_way_to_another_is_the_run_without_that(
    two_engines, fit_listed
):
    a, b = (engine.url for engine in two_engines)
    whole = fit_listed("whole", {0: [a]}, 3)
    changed = fit_listed("changed", {0: [a], 1: [a, b], 2: [b]}, 3)
    assert_same_run(whole, changed)
    assert {engine.get("/model_info")["weight_version"] for engine in two_engines} == {"default"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.parametrize("kind", [DiskTransport, ProcessGroupTransport])
def test_a_run_on_one_four_two_and_three_servers_is_the_run_on_one(
    four_engines, tmp_path, fit_listed, where, kind
):
    a, b, c, d = (engine.url for engine in four_engines)
    whole = fit_listed("whole", {0: [a]}, 10, where, kind())
    plan = {0: [a], 2: [d, a, b, c], 4: [c, d], 6: [c, b, d]}
    changed = fit_listed("changed", plan, 10, where, kind())
    assert_same_run(whole, changed)
    assert set(whole[2]) == {1}
    assert {1, 2, 3, 4} <= set(changed[2])
    first = fit_listed("first", {0: [a, b]}, 5, where, kind())
    then = fit_listed("then", {0: [d], 6: [c, d]}, 10, where, kind(), tmp_path / "first.ckpt")
    assert first[0] + then[0] == whole[0]
    assert_same_run((whole[0], then[1]), whole)
