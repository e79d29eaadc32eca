"""Runs in which something is killed, stopped, cut or filled, again and again, at random moments.

`make chaos MINUTES=60` lasts an hour; `SEED=N` repeats the faults of a run (their moments depend on
the machine), `EVERY_S=N` changes how often something happens.
"""

from __future__ import annotations

import contextlib
import csv
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightning_grpo.rollout.records import read_rows
from tests.fakes.fit_process import Fit, kill, left_behind, started, write_config

CHAOS_S = 60 * float(os.environ.get("CHAOS_MINUTES", "2"))
EVERY_S = float(os.environ.get("CHAOS_EVERY_S", "8"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 + 4 * CHAOS_S)]

KILLS = 10
BATCH, STEPS_PER_BATCH, ROWS = 4, 2, 50
SIZES = {"batch_size": BATCH, "minibatches_per_batch": STEPS_PER_BATCH, "max_staleness": 2}
SAVE_EVERY = [
    "--trainer.callbacks=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.save_top_k=3",
    "--trainer.callbacks.monitor=step",
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks.save_last=link",
]


def readable(root: Path) -> list[int]:
    """Global steps of all checkpoints, each read as a whole."""
    found = [path for path in root.rglob("*.ckpt") if not path.is_symlink()]
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in found)


def curve(folder: Path) -> dict[int, float]:
    """The reward at every step, as the last start that reached it logged it."""
    parts = sorted(folder.glob("metrics-*.csv"), key=lambda p: int(p.stem.partition("-")[2]))
    rewards = {}
    for part in [*parts, folder / "metrics.csv"]:
        with part.open() as rows:
            logged = [row for row in csv.DictReader(rows) if row.get("reward/mean")]
        rewards |= {int(row["step"]): float(row["reward/mean"]) for row in logged}
    return rewards


def trained_keys(ledger: dict) -> int:
    """How many (pass, prompt) the ledger holds as trained; every pass has one entry a prompt."""
    for _, _, outcomes in ledger["open"]:
        assert outcomes.numel() == ROWS
    for _, _, counts in ledger["closed"]:
        assert sum(counts.values()) == ROWS
    return ledger["counts"]["trained"]


def test_a_run_that_is_killed_ten_times_trains_on_each_prompt_of_each_pass_once(
    tiny_model, tmp_path, capsys
):
    write_config(tmp_path, tiny_model, **SIZES)
    moments, root = random.Random(), tmp_path / "runs" / "tiny"
    reached = []
    for _ in range(KILLS):
        with started(tmp_path, "--ckpt_path=last-or-none", *SAVE_EVERY) as fit:
            fit.wait_for(r"step +\d+/")
            time.sleep(moments.uniform(0.0, 6.0))
            fit.kill_everything()
            assert not fit.survivors()
        reached.append(max(readable(root), default=0))
    steps = reached[-1] + 10
    arguments = ["--ckpt_path=last-or-none", f"--trainer.max_steps={steps}", *SAVE_EVERY]
    with started(tmp_path, *arguments) as fit:
        assert fit.process.wait(timeout=200) == 0, fit.tail
    (last,) = [p for p in root.rglob(f"*step={steps}.ckpt") if not p.is_symlink()]
    folder = last.parents[1]
    state = torch.load(last, weights_only=True)["RolloutDataModule"]
    rows = read_rows(folder)
    keys = {(row["pass_index"], row["row"]) for row in rows}
    groups = {(row["version"], row["group"]) for row in rows}
    rewards = curve(folder)
    with capsys.disabled():
        print(f"\ncheckpoint after each kill: {reached}; {steps} steps, {len(groups)} groups")
    assert state["version"] == steps // STEPS_PER_BATCH
    assert len(keys) == len(groups) == BATCH * state["version"]  # none twice
    assert trained_keys(state["producer"]["ledger"]) == len(keys)
    assert sorted(rewards) == list(range(1, steps + 1))


def kill_the_trainer(fit: Fit, noise: random.Random) -> None:
    """Its engine and the processes of its rewards have to notice."""
    fit.those("")
    fit.process.kill()


def kill_everything(fit: Fit, noise: random.Random) -> None:
    """Also those that would clean up after the others."""
    fit.kill_everything()


def ask_it_to_end(fit: Fit, noise: random.Random) -> None:
    """As a cluster does; it saves."""
    fit.those("")
    fit.process.send_signal(noise.choice([signal.SIGTERM, signal.SIGINT]))


def fill_the_disk(fit: Fit, noise: random.Random) -> None:
    """For a checkpoint that can't be written it ends, with one message."""
    fit.fill_disk(full=True)
    time.sleep(noise.uniform(0.5, 4.0))
    if fit.process.poll() is None:
        fit.fill_disk(full=False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        fit.process.wait(timeout=15.0)


def kill_the_engine(fit: Fit, noise: random.Random) -> None:
    kill(*fit.those("lightning_grpo.engine"))


def kill_a_child(fit: Fit, noise: random.Random) -> None:
    """An engine, what watches it, or a process of the rewards."""
    children = sorted(fit.those(""), key=lambda process: process.pid)
    if children:
        kill(noise.choice(children))


def stop_the_engine(fit: Fit, noise: random.Random) -> None:
    stop([p.pid for p in fit.those("lightning_grpo.engine")], noise.uniform(0.5, 12.0))


def stop_everything(fit: Fit, noise: random.Random) -> None:
    """As a laptop that sleeps."""
    stop([fit.process.pid, *(p.pid for p in fit.those(""))], noise.uniform(0.5, 8.0))


def stop_the_trainer(fit: Fit, noise: random.Random) -> None:
    stop([fit.process.pid], noise.uniform(0.5, 8.0))


def stop(pids: list[int], seconds: float) -> None:
    for number, pause_s in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0.0)):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(pause_s)


def cut_the_network(fit: Fit, noise: random.Random) -> None:
    """No connection of it lives for long."""
    end = time.monotonic() + noise.uniform(0.0, 4.0)
    while True:
        fit.cut_connections()
        if time.monotonic() > end or fit.process.poll() is not None:
            return
        time.sleep(0.02)


ENDING = [kill_the_trainer, kill_everything, ask_it_to_end]
"""Faults after which a run is started again."""
FAULTS = [
    *ENDING,
    fill_the_disk,
    kill_the_engine,
    kill_a_child,
    stop_the_engine,
    stop_the_trainer,
    stop_everything,
    cut_the_network,
]


@contextlib.contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Processes, shared memory, sockets, temporary files: as before."""

    def shared() -> set[str]:
        segments = {path.name for path in Path("/dev/shm").glob("*")}
        return segments | set(Path("/proc/sysvipc/shm").read_text().splitlines()[1:])

    def is_somebody_s(name: str) -> bool:
        return any(Path(f"/proc/{number}").exists() for number in re.findall(r"\d+", name))

    before = shared()
    yield
    assert not left_behind(folder)
    assert not [name for name in shared() - before if not is_somebody_s(name)]
    assert not list((folder / "tmp").rglob("*"))
    unfinished = [path for path in folder.rglob(".*") if path.name not in (".lock", ".gitignore")]
    assert not unfinished


class Chaos:
    """Breaks something every few seconds of a run, and starts it again where that ended it.

    Args:
        folder: With the run's config.
        options: Of its command line.
        say: Prints what happens.

    Attributes:
        seen: How often what was done.
    """

    def __init__(self, folder: Path, options: list[str], say: Callable[[str], None]) -> None:
        self.folder, self.options, self.say = folder, ["--ckpt_path=last-or-none", *options], say
        self.seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
        self.noise, self.seen = random.Random(self.seed), Counter()
        self.bag: list[Callable[[Fit, random.Random], None]] = []

    def newest(self) -> int:
        """The step of the newest checkpoint, by its name: the run writes and deletes meanwhile."""
        names = [path.stem for path in (self.folder / "runs").rglob("*step=*.ckpt")]
        return max((int(name.rpartition("=")[2]) for name in names), default=0)

    def break_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with started(self.folder, *self.options) as fit:
                fit.wait_for(r"step +\d+/", timeout_s=200)
                filled = False
                while fit.process.poll() is None and time.monotonic() < end:
                    time.sleep(self.noise.uniform(0.0, 2 * EVERY_S))
                    if fit.process.poll() is None:
                        filled |= self.break_once(fit) is fill_the_disk
                if fit.process.poll() is None:
                    fit.end(signal.SIGTERM)
                self.check_end(fit, filled)
            assert not left_behind(self.folder)

    def break_once(self, fit: Fit) -> Callable[[Fit, random.Random], None]:
        self.bag = self.bag or self.noise.sample(FAULTS, len(FAULTS))  # each comes in its turn
        fault = self.bag.pop()
        self.say(f"seed {self.seed}: {fault.__name__} after step {self.newest()}")
        self.seen[fault.__name__] += 1
        fault(fit, self.noise)
        if fault in ENDING:
            fit.process.wait(timeout=100)
        elif fault is not fill_the_disk:
            assert fit.process.poll() is None, fit.tail
        return fault

    def check_end(self, fit: Fit, filled: bool) -> None:
        assert not fit.survivors(), fit.tail
        if fit.process.returncode not in (-signal.SIGKILL, 130, 143):
            self.say(f"it ended with {fit.process.returncode}: {fit.output[-400:]}")
            assert filled
            assert "Traceback" not in fit.output

    def finish(self) -> int:
        """Let it end in good order, at a step that comes back."""
        steps = STEPS_PER_BATCH * (self.newest() // STEPS_PER_BATCH + 3)
        with started(self.folder, *self.options, f"--trainer.max_steps={steps}") as fit:
            assert fit.process.wait(timeout=300) == 0, fit.tail
        return steps


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_in_which_something_breaks_all_the_time_is_the_run_in_which_nothing_does(
    tiny_model, tmp_path, capsys, deterministic
):
    def say(words: str) -> None:
        with capsys.disabled():
            print(f"\n{time.strftime('%H:%M:%S')} {words}", end="", flush=True)

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    settings = SIZES | {
        "max_staleness": 0 if deterministic else 2,
        "limits": {"max_server_restarts": 1000},
    }
    for folder in (broken, whole):
        folder.mkdir()
        write_config(folder, tiny_model, **settings)
    options = [*SAVE_EVERY, f"--trainer.deterministic={str(deterministic).lower()}"]
    chaos = Chaos(broken, options, say)
    with nothing_left_behind(broken):
        chaos.break_for(CHAOS_S)
        steps = chaos.finish()
    say(f"{steps} steps, {dict(chaos.seen)}\n")
    state, rows, rewards = outcome(broken, steps)
    check_ledger(state["RolloutDataModule"], rows, steps, "fill_the_disk" in chaos.seen)
    assert sorted(rewards) == list(range(1, steps + 1))
    if not deterministic:
        return
    with (
        nothing_left_behind(whole),
        started(whole, *options, f"--trainer.max_steps={steps}") as fit,
    ):
        assert fit.process.wait(timeout=300 + CHAOS_S) == 0, fit.tail
    expected, expected_rows, expected_rewards = outcome(whole, steps)
    for name, value in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], value), name
    compared = ("version", "pass_index", "row", "tokens", "logprobs", "reward")
    trained = [[row[name] for name in compared] for row in expected_rows]
    assert all([row[name] for name in compared] in trained for row in rows)
    assert rewards == expected_rewards


def check_ledger(state: dict, rows: list[dict], steps: int, filled: bool) -> None:
    """Each prompt of each pass once; of a batch on a full disk the trajectories may be missing."""
    version = steps // STEPS_PER_BATCH
    keys = {(row["pass_index"], row["row"]) for row in rows}
    groups = {(row["version"], row["group"]) for row in rows}
    assert state["version"] == version
    assert trained_keys(state["producer"]["ledger"]) == BATCH * version
    assert len(keys) == len(groups)
    assert len(keys) == BATCH * version or (filled and len(keys) < BATCH * version)


def outcome(folder: Path, steps: int) -> tuple[dict, list[dict], dict[int, float]]:
    """The last checkpoint, all trajectories, and the curve."""
    root = folder / "runs" / "tiny"
    (path,) = [p for p in root.rglob(f"*step={steps}.ckpt") if not p.is_symlink()]
    state = torch.load(path, weights_only=True)
    return state, read_rows(path.parents[1]), curve(path.parents[1])
