"""Signals set a flag; handlers are given back to whom they were taken from."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_grpo.callbacks.early_stop import EarlyStop, came_early
from lightning_grpo.callbacks.recording import FinalCheckpoint
from lightning_grpo.callbacks.signals import SignalHandling, StopFlag
from lightning_grpo.distributed import RankChannel
from lightning_grpo.errors import StopRun
from tests.fakes.tiny_run import TinyData, TinyModule

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    made = StopFlag()
    yield made
    made.uninstall()
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_sets_the_flag_and_nothing_else(flag, name):
    flag.install(NAMES)
    os.kill(os.getpid(), signal.Signals[name])
    assert soon(lambda: flag.requested == name)


@pytest.mark.parametrize("order", [("SIGUSR1", "SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGUSR1")])
def test_a_request_to_run_again_outweighs_the_end_that_comes_with_it(flag, order):
    flag.install(NAMES)
    for name in order:  # Slurm: a warning, then the end; the kernel may turn them around
        os.kill(os.getpid(), signal.Signals[name])
    assert soon(lambda: flag.requested == "SIGUSR1")


def test_handlers_come_back_and_the_flag_is_down_at_the_next_start(flag):
    before = signal.getsignal(signal.SIGTERM)
    flag.install(NAMES)
    flag.install(NAMES)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert soon(lambda: flag.requested != "")
    flag.uninstall()
    flag.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not flag.installed
    flag.install(NAMES)
    assert flag.requested == ""


def test_a_handler_that_somebody_else_put_in_place_is_left_alone(flag):
    flag.install(NAMES)

    def theirs(signum: int, frame: object) -> None:
        """Lightning's, given back before the callbacks' teardown."""

    signal.signal(signal.SIGTERM, theirs)
    flag.uninstall()
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_a_shutdown_may_keep_a_handler_that_exits(flag):
    usr1 = signal.getsignal(signal.SIGUSR1)
    flag.install(NAMES)
    flag.uninstall(exit_on_signal=True)
    assert signal.getsignal(signal.SIGTERM).__name__ == "_exit_now"
    assert signal.getsignal(signal.SIGUSR1) == usr1


class Interrupt(Callback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def fit(make_trainer, folder, *others, stop_at=None, ckpt_path=None, saves=True, **keeps):
    """Eight steps, saved after every second one where it saves."""
    handling = SignalHandling()
    handling.connect(RankChannel.single())
    callbacks = [*others, handling, Interrupt(-1 if stop_at is None else stop_at)]
    settings = {name: keeps.pop(name) for name in ("max_steps", "max_epochs") if name in keeps}
    if saves:
        keeps = {"every_n_train_steps": 2, "save_top_k": -1, **keeps}
        callbacks.append(ModelCheckpoint(folder / "kept", **keeps))
    trainer = make_trainer(
        callbacks=callbacks, enable_checkpointing=saves, enable_progress_bar=False, **settings
    )
    data = TinyData(num_rollouts=4)
    if stop_at is None:
        trainer.fit(TinyModule(), datamodule=data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(StopRun):
            trainer.fit(TinyModule(), datamodule=data, ckpt_path=ckpt_path)
    return sorted(path.name for path in folder.glob("hpc_ckpt_*.ckpt"))


QUIET = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, of each resume


@QUIET
def test_what_a_stop_saved_goes_once_a_newer_checkpoint_has_its_place(make_trainer, tmp_path):
    assert fit(make_trainer, tmp_path, stop_at=2) == ["hpc_ckpt_1.ckpt"]
    # Gone on from and stopped again before another was due: the newer stop takes its place.
    first = tmp_path / "hpc_ckpt_1.ckpt"
    assert fit(make_trainer, tmp_path, stop_at=3, ckpt_path=first) == ["hpc_ckpt_2.ckpt"]
    assert fit(make_trainer, tmp_path, ckpt_path=tmp_path / "hpc_ckpt_2.ckpt") == []
    assert (tmp_path / "kept/epoch=0-step=8.ckpt").exists()


@QUIET
def test_what_a_stop_saved_stays_while_it_is_the_newest_or_another_run_s(make_trainer, tmp_path):
    fit(make_trainer, tmp_path, stop_at=2)
    stop = tmp_path / "hpc_ckpt_1.ckpt"
    assert fit(make_trainer, tmp_path, ckpt_path=stop, saves=False) == [stop.name]
    assert fit(make_trainer, tmp_path) == [stop.name]  # a run that did not go on from it


@QUIET
def test_what_a_killed_run_could_not_remove_goes_at_its_next_start(make_trainer, tmp_path):
    fit(make_trainer, tmp_path, stop_at=2)
    stop = tmp_path / "hpc_ckpt_1.ckpt"
    kept = stop.read_bytes()
    fit(make_trainer, tmp_path, ckpt_path=stop)
    stop.write_bytes(kept)
    newer = tmp_path / "kept/epoch=0-step=4.ckpt"
    # Saved anew under the number that was free again: not what the checkpoint came from.
    assert fit(make_trainer, tmp_path, ckpt_path=newer) == [stop.name]
    os.utime(stop, (1, 1))
    assert fit(make_trainer, tmp_path, ckpt_path=newer) == []


@QUIET
@pytest.mark.parametrize("named", ["precious", "precious/hpc_ckpt_1.ckpt", "kept/../precious"])
def test_what_a_stranger_s_checkpoint_calls_used_is_not_removed(make_trainer, tmp_path, named):
    fit(make_trainer, tmp_path)
    (tmp_path / named).mkdir(parents=True)
    os.utime(tmp_path / named, (1, 1))
    checkpoint = torch.load(tmp_path / "kept/epoch=0-step=4.ckpt", weights_only=True)
    checkpoint["callbacks"]["SignalHandling"] = {"used": [str(tmp_path / named)]}
    torch.save(checkpoint, tmp_path / "strange.ckpt")
    fit(make_trainer, tmp_path, ckpt_path=tmp_path / "strange.ckpt")
    assert (tmp_path / named).is_dir()


NEWEST = {"monitor": "step", "mode": "max", "save_top_k": 2, "filename": "{step}"}


def kept(folder):
    """What can be gone on from, and where `last` leads."""
    names = {path.name for path in folder.rglob("*.ckpt") if path.name != "last.ckpt"}
    return names, torch.load(folder / "kept/last.ckpt", weights_only=True)["global_step"]


@QUIET
@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_trainer_s_own_last_is_what_a_stop_saved_and_takes_its_place(
    make_trainer, tmp_path, save_last
):
    keeps = NEWEST | {"save_last": save_last}
    for stop_at in (2, 4, 6):
        fit(make_trainer, tmp_path, stop_at=stop_at, ckpt_path="last", **keeps)
        names, newest = kept(tmp_path)
        assert len([name for name in names if name.startswith("hpc")]) == 1
        assert newest == stop_at + 1
    fit(make_trainer, tmp_path, ckpt_path="last", **keeps)
    assert kept(tmp_path) == ({"step=6.ckpt", "step=8.ckpt"}, 8)


@QUIET
@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_trainer_s_own_last_is_what_the_end_of_training_saved_and_takes_its_place(
    make_trainer, tmp_path, save_last
):
    keeps = NEWEST | {"save_last": save_last, "max_epochs": 9}
    for steps in (3, 7, 11):
        final = FinalCheckpoint()
        fit(make_trainer, tmp_path, final, ckpt_path="last", max_steps=steps, **keeps)
        wanted = {f"final-step={steps}.ckpt", f"step={steps - 1}.ckpt", f"step={steps - 3}.ckpt"}
        assert kept(tmp_path) == (wanted - {"step=0.ckpt"}, steps)
    # One that somebody named is theirs to remove.
    named = tmp_path / "kept/final-step=11.ckpt"
    fit(make_trainer, tmp_path, ckpt_path=named, max_steps=16, **keeps)
    assert kept(tmp_path) == ({named.name, "step=14.ckpt", "step=16.ckpt"}, 16)


@QUIET
def test_what_last_leads_to_stays_while_it_does(make_trainer, tmp_path):
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == 6:
                raise ValueError("broken")

    def seldom():
        return ModelCheckpoint(tmp_path / "seldom", every_n_train_steps=100, save_last=True)

    stop = fit(make_trainer, tmp_path, seldom(), stop_at=2, ckpt_path="last")
    with pytest.raises(ValueError, match="broken"):
        fit(make_trainer, tmp_path, seldom(), Breaks(), ckpt_path="last")
    assert (tmp_path / "kept/epoch=0-step=4.ckpt").exists()
    assert (tmp_path / "seldom/last.ckpt").resolve() == tmp_path / stop[0]
    assert (tmp_path / stop[0]).exists()


@QUIET
def test_last_replaces_nothing_that_a_stranger_s_checkpoint_calls_it(make_trainer, tmp_path):
    fit(make_trainer, tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    checkpoint = torch.load(tmp_path / "kept/epoch=0-step=4.ckpt", weights_only=True)
    (state,) = (s for key, s in checkpoint["callbacks"].items() if "ModelCheckpoint" in key)
    state["last_model_path"] = str(precious)
    torch.save(checkpoint, tmp_path / "strange.ckpt")
    fit(make_trainer, tmp_path, stop_at=6, ckpt_path=tmp_path / "strange.ckpt", save_last=True)
    assert not precious.is_symlink()


# -- SIGTERM before training: an exception once, the default action afterwards ---------------------


@pytest.fixture(autouse=True)
def handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signal_raises_once_with_its_exit_status():
    early = EarlyStop()
    early.install()
    with pytest.raises(StopRun, match="SIGTERM outside of training") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    early.uninstall()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_whose_exception_was_lost_in_a_library_ends_the_next_wait_and_training():
    early, handling = EarlyStop(), SignalHandling()
    channel = RankChannel.single(poll_s=0.01)
    handling.connect(channel)
    early.install()
    try:
        assert handling.poll() == ""
        with contextlib.suppress(Exception):  # as around an optional import
            os.kill(os.getpid(), signal.SIGTERM)
        assert handling.poll() == "SIGTERM"
        with pytest.raises(StopRun):
            channel.wait(Future(), what="the start of the servers")
        handling.flag.install(("SIGTERM", "SIGUSR1"))
        assert handling.poll() == "SIGTERM"
    finally:
        handling.flag.uninstall()
        early.uninstall()
    assert handling.poll() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_of_one_run_is_no_news_to_the_next_one_in_the_same_program(number):
    early, flag = EarlyStop(), StopFlag()
    early.install()
    with contextlib.suppress(StopRun):
        os.kill(os.getpid(), number)
    early.uninstall()
    early.install()
    try:
        assert not came_early(number, signal.getsignal(number))
        flag.install(("SIGTERM", "SIGUSR1"))
        assert flag.requested == ""
    finally:
        flag.uninstall()
        early.uninstall()


def test_a_warning_of_the_time_limit_waits_for_training():
    early, flag = EarlyStop(), StopFlag()
    early.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        flag.install(("SIGTERM", "SIGUSR1"))
        assert flag.requested == "SIGUSR1"
    finally:
        flag.uninstall()
        early.uninstall()


def test_what_was_given_back_and_a_handler_of_others_are_left_alone():
    early = EarlyStop()
    early.install()
    early.uninstall()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    early.install()
    early.uninstall()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_handler_that_was_brought_back_gives_way_to_the_next_run_s():
    first, second = EarlyStop(), EarlyStop()
    first.install()
    kept = signal.getsignal(signal.SIGTERM)
    first.uninstall()
    signal.signal(signal.SIGTERM, kept)
    second.install()
    with pytest.raises(StopRun):
        os.kill(os.getpid(), signal.SIGTERM)
    second.uninstall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_handler_that_somebody_brings_back_later_acts_as_the_default(number):
    program = (
        "import os, signal; from lightning_grpo.callbacks.early_stop import EarlyStop as E;"
        f"n = {int(number)}; e = E(); e.install(); kept = signal.getsignal(n); e.uninstall();"
        "signal.signal(n, kept); os.kill(os.getpid(), n); print('still here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
