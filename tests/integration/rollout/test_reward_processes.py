"""Rewards in real processes: killed, crashed, shipped from scripts, gone with their parent."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import psutil
import pytest
from loky.backend.context import LokyContext

from lightning_grpo.errors import ConfigError, RewardError
from lightning_grpo.rollout.scoring import RewardScorer, TokenLock

ROOT = Path(__file__).parents[3]


def run(function, *rewards, processes=1, timeout_s=10.0):
    async def main():
        async with RewardScorer(rewards, processes, timeout_s) as scorer:
            return await function(scorer), scorer.counts

    return anyio.run(main)


def exact(completion, answer):
    return float(completion == answer)


def stuck(completion):
    while True:
        time.sleep(60)


def runaway_regex(completion):
    # Holds the interpreter for ages: no handler of a signal ever runs.
    return float(re.match(r"(a+)+$", "a" * 40 + "b") is None)


def crash(completion):
    os._exit(3)


def vanish(completion):
    os._exit(0)


def leave(completion):
    sys.exit("enough")


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


def test_no_names_are_left_that_a_killed_run_could_not_clean_up():
    async def main(scorer):
        assert await scorer.score(exact, {"completion": "4", "answer": "4"}) == 1.0
        return [name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name]

    assert run(main, exact)[0] == []


def hold(lock, held, until):
    """In a process of its own."""
    with contextlib.closing(held), contextlib.closing(until):
        held.send(lock.acquire())
        until.recv()
        lock.release()


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
