"""One run has its folder to itself, and gives it back however it ends."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_grpo.errors import ConfigError
from lightning_grpo.session.folder import hold_folder, hold_new_version, hold_run_folder

HOLDER = """
import sys
from pathlib import Path
from lightning_grpo.session.folder import hold_folder, hold_new_version
hold = hold_new_version if sys.argv[1] == "new" else hold_folder
print(hold(Path(sys.argv[2])).folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run():
    """Another process that takes a folder, and says which."""
    processes = []

    def begin(how, folder):
        command = [sys.executable, "-c", HOLDER, how, str(folder)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_a_folder_that_another_run_has_is_refused_with_its_process_and_the_way_out(
    tmp_path, other_run
):
    process = other_run("this", tmp_path / "run")
    process.stdout.readline()
    with pytest.raises(ConfigError) as refused:
        hold_folder(tmp_path / "run")
    message = str(refused.value)
    assert f"process {process.pid} on {socket.gethostname()} has it" in message
    assert "Wait for that run or end it" in message
    assert "--trainer.default_root_dir" in message


def test_a_disk_that_takes_no_line_is_refused_and_nothing_is_left_of_the_run(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(ConfigError, match="must be a folder that can be written to"):
            hold_new_version(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_leaves_its_folder_to_the_next_one(tmp_path, other_run):
    process = other_run("this", tmp_path / "run")
    process.stdout.readline()
    process.kill()
    process.wait()
    assert (tmp_path / "run/.lock").exists()
    hold_folder(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]  # somebody else's: it stays


def test_runs_that_begin_at_the_same_moment_get_a_folder_each(tmp_path, other_run):
    begun = [other_run("new", tmp_path / "runs/a") for _ in range(3)]
    folders = {process.stdout.readline().strip() for process in begun}
    assert folders == {str(tmp_path / f"runs/a/version_{i}") for i in range(3)}


def test_one_process_may_take_its_folder_twice_and_gives_it_back_at_the_last(
    tmp_path, other_run, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first, second = hold_folder(tmp_path / "a/b"), hold_folder(tmp_path / "a/../a/b")
    first.release()
    assert (tmp_path / "a/b/.lock").exists()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_has_left_in_its_folder_stays(tmp_path):
    lock = hold_folder(tmp_path / "a/b")
    (tmp_path / "a/b/metrics.csv").touch()
    lock.release()
    assert os.listdir(tmp_path / "a/b") == ["metrics.csv"]


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_file_in_the_place_of_the_folder_is_refused_in_one_sentence(tmp_path, place):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match=re.escape(f"{place}' (a file is in its place)")):
        hold_folder(tmp_path / place)
    with pytest.raises(ConfigError, match="a file is in its place"):
        hold_new_version(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_t_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        hold_folder(tmp_path / "run")


def trainer(**settings):
    return L.Trainer(accelerator="cpu", max_steps=1, enable_progress_bar=False, **settings)


@pytest.mark.parametrize(
    "settings", [{"logger": False}, {"fast_dev_run": True}], ids=["no logger", "fast_dev_run"]
)
def test_a_run_without_a_logger_has_a_folder_of_its_own(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    locks = [hold_run_folder(trainer(**settings)) for _ in range(2)]
    assert [lock.folder for lock in locks] == [
        tmp_path / "lightning_logs/version_0",
        tmp_path / "lightning_logs/version_1",
    ]
    named = hold_run_folder(trainer(default_root_dir=tmp_path / "mine", **settings))
    assert named.folder == tmp_path / "mine/version_0"
    for lock in (*locks, named):
        lock.release()


def test_a_run_with_a_logger_has_the_loggers_folder(tmp_path):
    lock = hold_run_folder(trainer(logger=CSVLogger(tmp_path, name="mine")))
    assert lock.folder == tmp_path / "mine/version_0"
    lock.release()
