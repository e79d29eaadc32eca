"""The event loop, the producer, real reward processes and a real tokenizer together."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from loky.backend.context import LokyContext

from lightning_grpo.errors import ConfigError, FailureBudgetError, RewardError
from lightning_grpo.rewards import code, gsm8k, math
from lightning_grpo.rollout.admission import PromptMixture, StalenessGate
from lightning_grpo.rollout.episodes import EpisodeRunner
from lightning_grpo.rollout.ledger import Ledger, RolloutLimits
from lightning_grpo.rollout.producer import RolloutProducer
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.scoring import RewardScorer, TokenLock
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.serving.event_loop import EventLoop
from lightning_grpo.types import Completion, Sampling
from tests.fakes.generator import FakeGenerator
from tests.fakes.reward_processes import (
    crash,
    exact,
    hangs_on_some_digits,
    hold,
    leave,
    runaway_regex,
    stuck,
    vanish,
)
from tests.fakes.tiny_model import make_tiny_tokenizer

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(20)]


class Calculator(FakeGenerator):
    """Answers right where the seed is even, so groups differ in reward."""

    def __init__(self, tokenizer):
        super().__init__(lambda ids, n: 0.002)
        self.tokenizer = tokenizer

    async def generate(self, input_ids, sampling, *, group_key=None, priority=False, seed=None):
        completion = await super().generate(
            input_ids, sampling, group_key=group_key, priority=priority, seed=seed
        )
        question = self.tokenizer.decode(input_ids)
        number = int(question.partition("What is ")[2].split()[0])
        text = f"#### {2 * number + seed % 2}"
        return Completion(
            completion.token_ids, completion.logprobs, completion.versions, text, "stop"
        )


def open_producer(reward, limits=None):
    tokenizer = make_tiny_tokenizer()
    limits = limits or RolloutLimits(reward_processes=1)
    prompts = Prompts(ROWS, column="question").load(tokenizer, max_prompt_tokens=400)
    workflow = RLVRWorkflow(reward, Sampling(max_new_tokens=8))
    workflow.validate(prompts.columns)
    generator = Calculator(tokenizer)

    @asynccontextmanager
    async def build():
        scorer = RewardScorer(
            workflow.reward_functions, limits.reward_processes, limits.reward_timeout_s
        )
        async with scorer:
            runner = EpisodeRunner(workflow, generator, scorer, tokenizer, 4)
            stream = PromptMixture({"": prompts})
            gate, ledger = StalenessGate(4, 1), Ledger(stream.sizes, 4, limits.max_failed_fraction)
            async with RolloutProducer(stream, runner, gate, ledger, limits) as producer:
                made.append(producer)
                yield

    loop, made = EventLoop(), []
    loop.start(build)
    return loop, made[0], prompts, generator


def test_prompts_become_scored_groups_and_evaluation_runs_beside():
    loop, producer, prompts, generator = open_producer(gsm8k)
    try:
        for version in range(1, 4):
            groups = loop.run(producer.take).result(timeout=30)
            rewards = [t.reward for group in groups for t in group.trajectories]
            assert len(rewards) == 16
            assert set(rewards) == {0.0, 1.0}
            for group in groups:
                ids = group.prompt.input_ids
                assert all(t.input_ids[: len(ids)] == ids for t in group.trajectories)
            evaluation = loop.run(producer.evaluate, prompts, Sampling(temperature=0.0), 2)
            assert len(evaluation.result(timeout=30)) == 20
            generator.version = version
            loop.call(producer.advance, version)
        assert loop.call(producer.state_dict)["ledger"]["counts"] == {"trained": 12}
    finally:
        loop.close()


def train_until_it_ends(loop, producer, generator):
    for version in range(1, 100):
        groups = loop.run(producer.take).result(timeout=60)
        assert {t.reward for group in groups for t in group.trajectories} == {1.0}
        generator.version = version
        loop.call(producer.advance, version)


def test_rewards_that_hang_end_the_run_and_say_so_and_never_count_as_zero():
    limits = RolloutLimits(reward_processes=2, reward_timeout_s=0.2, max_attempts=1)
    loop, producer, _, generator = open_producer(hangs_on_some_digits, limits)
    try:
        with pytest.raises(FailureBudgetError, match="`reward_timeout_s`"):
            train_until_it_ends(loop, producer, generator)
    finally:
        loop.close()


# -- rewards in real processes: killed, crashed, shipped from scripts, gone with their parent ------


ROOT = Path(__file__).parents[3]


def run(function, *rewards, processes=1, timeout_s=10.0):
    async def main():
        async with RewardScorer(rewards, processes, timeout_s) as scorer:
            return await function(scorer), scorer.counts

    return anyio.run(main)


async def value_or_error(scorer, reward, **arguments):
    try:
        return await scorer.score(reward, arguments)
    except RewardError as error:
        return str(error)


def test_a_reward_runs_in_another_process():
    async def main(scorer):
        return await scorer.score(os.getpid, {})

    pid, counts = run(main, os.getpid)
    assert pid != os.getpid()
    assert counts.scored == 1


def test_lambdas_closures_and_functions_not_known_at_the_start_travel():
    bonus = 0.5

    async def main(scorer):
        return [
            await scorer.score(lambda completion: len(completion) + bonus, {"completion": "abc"}),
            await scorer.score(exact, {"completion": "4", "answer": "4"}),
        ]

    assert run(main)[0] == [3.5, 1.0]


@pytest.mark.parametrize("endless", [stuck, runaway_regex])
def test_a_reward_that_never_returns_is_killed_and_the_next_one_is_right(endless):
    async def main(scorer):
        return [
            await value_or_error(scorer, endless, completion="x"),
            await value_or_error(scorer, exact, completion="4", answer="4"),
        ]

    (error, after), counts = run(main, endless, exact, timeout_s=2.0)
    assert "took longer than `reward_timeout_s` (2 s)" in error
    assert after == 1.0
    assert (counts.timed_out, counts.scored) == (1, 1)


SLOW_TO_IMPORT = """
import time
time.sleep(1.5)
def right(completion, answer):
    return float(completion == answer)
def fails(completion):
    raise KeyError("mine")
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_reward_imports_is_no_part_of_its_time(tmp_path, monkeypatch, processes):
    (tmp_path / "slow_to_import.py").write_text(SLOW_TO_IMPORT)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("slow_to_import")

    async def main(scorer):
        right = [await scorer.score(module.right, {"completion": "4", "answer": "4"})]
        right.append(await value_or_error(scorer, module.fails, completion="x"))
        right.append(await value_or_error(scorer, stuck, completion="x"))  # ends the process
        right.append(await scorer.score(module.right, {"completion": "4", "answer": "5"}))
        return right

    try:
        rewards = (module.right, module.fails, stuck)
        said, counts = run(main, *rewards, processes=processes, timeout_s=0.5)
    finally:
        sys.modules.pop("slow_to_import")
    assert (said[0], said[3]) == (1.0, 0.0)
    assert "KeyError: 'mine' (" in said[1]
    assert "in fails" in said[1]
    assert (counts.timed_out, counts.failed, counts.scored) == (1, 1, 2)


def test_a_reward_that_can_t_be_loaded_is_told_by_its_line(tmp_path, monkeypatch):
    file = tmp_path / "loads_here_only.py"
    file.write_text("def right(completion):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = importlib.import_module("loads_here_only").right
    file.write_text("import os\nos.nowhere\n")

    async def main(scorer):
        return await value_or_error(scorer, reward, completion="x")

    try:
        said, counts = run(main, reward)
    finally:
        sys.modules.pop("loads_here_only")
    assert "AttributeError: module 'os' has no attribute 'nowhere'" in said
    assert f"{file}:2" in said
    assert counts.failed == 1


def test_a_stuck_reward_costs_no_other_its_score():
    async def main(scorer):
        results = {}

        async def one(name, reward, **arguments):
            results[name] = await value_or_error(scorer, reward, **arguments)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: one("stuck", stuck, completion="x"))
            for index in range(40):
                name, answer = f"healthy {index}", str(index % 2)
                tasks.start_soon(lambda n=name, a=answer: one(n, exact, completion="1", answer=a))
        return results

    results, counts = run(main, stuck, exact, processes=2, timeout_s=1.0)
    assert "took longer" in results.pop("stuck")
    assert results == {f"healthy {index}": float(index % 2) for index in range(40)}
    assert (counts.timed_out, counts.scored) == (1, 40)


@pytest.mark.parametrize(("crash", "code"), [(crash, 3), (vanish, 0)])
def test_a_process_that_crashes_or_leaves_is_replaced(crash, code):
    async def main(scorer):
        return [
            await value_or_error(scorer, crash, completion="x"),
            await value_or_error(scorer, exact, completion="4", answer="4"),
        ]

    (error, after), counts = run(main, crash, exact)
    assert re.search(f"ended by itself .exit code {code};|were lost and start anew", error)
    assert after == 1.0
    assert counts.crashed == 2  # tried once more, in another process


def test_a_call_whose_process_is_killed_gets_its_score_from_another(tmp_path):
    def slow_at_first(completion):
        begun = tmp_path / "begun"
        if not begun.exists():
            begun.write_text(str(os.getpid()))
            time.sleep(60)
        return float(len(completion))

    async def main(scorer):
        def kill():
            while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
                time.sleep(0.01)
            os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, kill)
            return await scorer.score(slow_at_first, {"completion": "four"})

    score, counts = run(main, slow_at_first)
    assert score == 4.0
    assert (counts.scored, counts.crashed) == (1, 1)


def test_quick_calls_of_the_same_turn_go_to_one_process_together_and_slow_ones_do_not():
    def where(pause_s):
        time.sleep(pause_s)
        return float(os.getpid())

    async def main(scorer):
        async def places(pause_s):
            found = []

            async def call():
                found.append(await scorer.score(where, {"pause_s": pause_s}))

            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(call)
            return set(found)

        while len(await places(0.05)) < 2:  # until both processes have loaded it
            pass
        while len(await places(0)) > 1:  # until one was seen to be quick
            pass
        await places(0.05)  # together once more, and seen to be slow
        return await places(0.05)

    slow, counts = run(main, where, processes=2)
    assert len(slow) == 2
    assert counts.failed == counts.timed_out == counts.crashed == 0


def test_one_of_several_quick_calls_that_kills_its_process_costs_no_other_its_score():
    def checked(completion):
        if completion == "exit":
            os._exit(3)
        return float(len(completion))

    async def main(scorer):
        await scorer.score(checked, {"completion": "quick"})
        results = {}

        async def call(text):
            results[text] = await value_or_error(scorer, checked, completion=text)

        async with anyio.create_task_group() as tasks:
            for text in ("a", "exit", "four"):
                tasks.start_soon(call, text)
        return results

    results, counts = run(main, checked)
    assert (results["a"], results["four"]) == (1.0, 4.0)
    assert "ended by itself" in results["exit"]
    assert counts.scored == 3


def test_no_names_are_left_that_a_killed_run_could_not_clean_up():
    async def main(scorer):
        assert await scorer.score(exact, {"completion": "4", "answer": "4"}) == 1.0
        return [name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name]

    assert run(main, exact)[0] == []


def test_a_lock_that_another_process_holds_is_waited_for_and_can_be_taken_twice():
    context = LokyContext()
    lock = TokenLock(context)
    held, tells = context.Pipe(duplex=False)
    until, ends = context.Pipe(duplex=False)
    assert [lock.acquire(), lock.acquire(block=False), lock.acquire(timeout=0.0)] == [True] * 3
    for _ in range(3):
        lock.release()
    process = context.Process(target=hold, args=(lock, tells, until))
    process.start()
    assert held.recv()
    assert not lock.acquire(block=False)
    assert not lock.acquire(timeout=0.05)
    ends.send(None)
    assert lock.acquire()
    lock.release()
    process.join()
    assert process.exitcode == 0


def test_a_process_that_is_killed_while_idle_is_replaced():
    async def main(scorer):
        pid = int(await scorer.score(os.getpid, {}))
        os.kill(pid, signal.SIGKILL)
        results = [await value_or_error(scorer, exact, completion="4", answer="4")]
        while results[-1] != 1.0 and len(results) < 3:
            results.append(await value_or_error(scorer, exact, completion="4", answer="4"))
        return results

    results, _ = run(main, os.getpid, exact)
    assert results[-1] == 1.0
    assert 0.0 not in results


def test_raising_exiting_and_infinite_rewards_are_errors_with_their_text():
    async def main(scorer):
        return [
            await value_or_error(scorer, lambda completion: {}["missing"], completion="x"),
            await value_or_error(scorer, leave, completion="x"),
            await value_or_error(scorer, lambda completion: float("inf"), completion="x"),
        ]

    (raised, left, infinite), counts = run(main)
    assert "in <lambda>: await value_or_error(" in raised
    assert "KeyError: 'missing'" in raised
    assert "SystemExit: enough" in left
    assert "must be finite, got inf" in infinite
    assert counts.failed == 3


def test_a_list_is_refused_with_the_way_out():
    async def main(scorer):
        await scorer.score(lambda completion: [1.0], {"completion": "x"})

    with pytest.raises(ConfigError, match="from_trl"):
        run(main)


def test_a_process_has_one_thread_and_no_gpu_unless_asked():
    def seen():
        import os

        return float(
            os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["OMP_NUM_THREADS"] == "1"
        )

    async def main(scorer):
        return await scorer.score(seen, {})

    assert run(main, seen)[0] == 1.0


def test_a_known_reward_is_shipped_once_and_not_with_each_call():
    table = bytes(2**20)

    def reward(completion):
        return float(len(table))

    async def main(scorer):
        await scorer.score(reward, {"completion": "x"})
        began = time.perf_counter()
        for _ in range(50):
            await scorer.score(reward, {"completion": "x"})
        known = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(50):
            await scorer.score(lambda completion: reward(completion), {"completion": "x"})
        return known, time.perf_counter() - began

    (known, with_each_call), _ = run(main, reward)
    assert known < with_each_call


def test_a_cancelled_call_leaves_the_process_alive():
    def slow():
        time.sleep(0.3)
        return os.getpid()

    async def main(scorer):
        before = await scorer.score(os.getpid, {})
        with anyio.move_on_after(0.1) as scope:
            await scorer.score(slow, {})
        assert scope.cancelled_caught
        return before, await scorer.score(os.getpid, {})

    (before, after), _ = run(main, slow, os.getpid)
    assert before == after


def test_leaving_ends_every_process_also_one_that_is_stuck():
    async def main():
        async with RewardScorer([stuck, os.getpid], processes=2) as scorer:
            pids = {int(await scorer.score(os.getpid, {}))}
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(scorer.score, runaway_regex, {"completion": "x"})
                tasks.start_soon(scorer.score, stuck, {"completion": "x"})
                await anyio.sleep(0.5)
                pids |= {
                    child.pid
                    for child in psutil.Process().children(recursive=True)
                    if "pebble" in " ".join(child.cmdline())
                }
                tasks.cancel_scope.cancel()
            return pids

    pids = anyio.run(main)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


SCRIPT = """
import os, sys, time
import anyio
from lightning_grpo.rollout.scoring import RewardScorer, TokenLock
from my_rewards import helper      # beside the script, and nowhere else

SCALE = 2.0

def reward(completion):            # defined in the script, without a __main__ guard
    return SCALE * helper(completion)

def where():
    return os.getpid()

def stuck():
    while True:
        pass

async def main():
    async with RewardScorer([reward, where, stuck], processes=2) as scorer:
        print(await scorer.score(reward, {"completion": "abc"}), flush=True)
        if "die" in sys.argv:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(scorer.score, stuck, {})
                await anyio.sleep(0.5)
                print("ready", flush=True)
                await anyio.sleep(600)

anyio.run(main)
"""


def script(folder):
    (folder / "train.py").write_text(SCRIPT)
    (folder / "my_rewards.py").write_text("def helper(text):\n    return float(len(text))\n")
    return {
        "args": [sys.executable, "train.py"],
        "cwd": folder,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
        "stdout": subprocess.PIPE,
        "text": True,
    }


def test_a_reward_of_the_users_script_runs_without_a_main_guard(tmp_path):
    options = script(tmp_path)
    done = subprocess.run(options.pop("args"), **options, timeout=60, check=True)
    assert done.stdout == "6.0\n"


def test_when_the_trainer_is_killed_its_reward_processes_end_too(tmp_path):
    options = script(tmp_path)
    with subprocess.Popen([*options.pop("args"), "die"], **options) as parent:
        assert parent.stdout.readline() == "6.0\n"
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len([c for c in children if "pebble" in " ".join(c.cmdline())]) == 2
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive


# -- hostile answers in real reward processes: the next healthy one is scored as if nothing was


pytest.importorskip("math_verify", reason="needs the extra [math]")

HEALTHY = {"completion": "\\boxed{0.5}", "answer": "\\frac{1}{2}"}
HOSTILE = (
    "\\boxed{" + "9" * 2**20 + "}",
    "\\boxed{" * 2**18,
    "\\boxed{" + "(" * 100 + "5" + ")" * 100 + "}",
    "\\boxed{9^{9^{9^{9^9}}}}",
    "\\boxed{(\\sin x + \\cos x)^{97} (\\tan x + \\cot x)^{89} - e^{i x^{31}}}",
    "\\boxed{\\int_0^1 e^{x^x} \\sin(\\cos(\\tan(x^x))) dx}",
    "\ud800\x00\\boxed{\x00}",
)
PROGRAMS = (
    "while True: pass",
    "import os\nwhile True: os.fork()",
    "while True: print('x' * 10000)",
    "x = 'x' * 10**10",
    "import os; os.kill(os.getppid(), 9)",
    "import ctypes; ctypes.string_at(0)",
)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_hostile_mathematics_is_wrong_and_blocks_nobody():
    async def play():
        async with RewardScorer([math], processes=1, timeout_s=30) as scorer:
            values = []
            for text in HOSTILE:
                values.append(await scorer.score(math, {**HEALTHY, "completion": text}))
                assert await scorer.score(math, HEALTHY) == 1.0
            return values, scorer.counts

    values, counts = anyio.run(play)
    assert values == [0.0] * len(HOSTILE)
    assert (counts.timed_out, counts.crashed, counts.failed) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_hostile_programs_are_wrong_and_block_nobody():
    async def play():
        async with RewardScorer([code], processes=1, timeout_s=30) as scorer:
            for program in PROGRAMS:
                completion = f"```python\n{program}\n```"
                arguments = {"completion": completion, "tests": "assert True"}
                assert await scorer.score(code, arguments) == 0.0
            healthy = {"completion": "```python\nx = 1\n```", "tests": "assert x == 1"}
            assert await scorer.score(code, healthy) == 1.0
            return scorer.counts

    counts = anyio.run(play)
    assert (counts.timed_out, counts.crashed, counts.failed) == (0, 0, 0)


@pytest.mark.slow
def test_a_program_ends_with_the_reward_process_that_was_killed_for_its_time():
    async def play():
        async with RewardScorer([code], processes=1, timeout_s=2.5) as scorer:
            loop = {"completion": "```python\nwhile True: pass\n```", "tests": "assert True"}
            with pytest.raises(RewardError, match="took longer than"):
                await scorer.score(code, loop)
            return scorer.counts.timed_out

    assert anyio.run(play) == 1  # the leak checks around each test see to the rest
