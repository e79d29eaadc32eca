from __future__ import annotations

import errno
import os
import re
import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lightning_grpo.cli.main import (
    COMMANDS,
    _ended,
    doctor_words,
    explain,
    import_from,
    is_first_rank,
    main,
    prepare_imports,
    refuse_hiding,
    wants_traceback,
)
from lightning_grpo.cli.sources import ConfigProblem
from lightning_grpo.errors import (
    ConfigError,
    PromptError,
    RewardError,
    ServersLostError,
    ServerStartError,
    StopRun,
)
from lightning_grpo.shipped import resolve_config


def test_help_names_every_command_that_is_there(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_no_arguments_print_the_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: lightning-grpo COMMAND")


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lightning-grpo ")


def test_an_unknown_command_names_the_nearest_one(capsys):
    assert main(["trian", "--config", "x.yaml"]) == 2
    assert main(["validat"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: `trian` is not a command of lightning-grpo",
        f"it has: {', '.join(COMMANDS)}",
        "error: `validat` is not a command of lightning-grpo",
        "did you mean `lightning-grpo validate`?",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_function_of_its_module(name):
    module, _, function = COMMANDS[name][0].partition(".")
    assert callable(getattr(import_module(f"lightning_grpo.cli.{module}"), function))


def test_a_mistake_leaves_with_code_2_and_no_traceback(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("trainer:\n  max_steps: 1\nmodle: {}\n")
    assert main(["fit", "--config", "bad.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: modle (bad.yaml, line 3)",
        "  is not a section of a config (seed_everything, trainer, model, data)",
        "  did you mean `model`?",
    ]


def test_only_the_first_rank_speaks_of_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == ""


def test_the_user_may_ask_for_tracebacks(monkeypatch):
    monkeypatch.setenv("LIGHTNING_GRPO_TRACEBACK", "1")
    assert wants_traceback()
    with pytest.raises(ConfigProblem):
        main(["fit", "--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("`a` must be > 0, got 0."), 2, "error: `a` must be > 0, got 0."),
        (StopRun("saved at step 4", signal.SIGTERM), 143, "stopped: saved at step 4"),
        (StopRun("saved at step 4", signal.SIGINT), 130, "stopped: saved at step 4"),
        (KeyboardInterrupt(), 130, "stopped: interrupted"),
        (ServerStartError("no answer"), 1, "ServerStartError: no answer"),
        (
            torch.OutOfMemoryError("Tried to allocate 9 GiB.\nSee ..."),
            1,
            "the trainer's GPU is full: Tried to allocate 9 GiB.",
        ),
    ],
)
def test_what_ended_a_command_decides_its_exit_code(error, code, words):
    exit_code, lines = explain(error)
    assert exit_code == code
    assert lines[0] == words


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (StopRun("stopped", signal.SIGTERM), 143, []),
        (ServersLostError("all gone"), 1, ["ServersLostError: all gone"]),
    ],
)
def test_whatever_has_saved_ends_with_the_command_that_goes_on(error, status, words):
    error.saved_to = "runs/hpc_ckpt_1.ckpt"
    ended = _ended(error, "fit", ["--config", "mine.yaml", "--ckpt_path", "last"])
    assert ended is not None
    code, lines = ended
    assert code == status
    assert lines[: len(words)] == words
    assert lines[-1] == (
        "go on with: lightning-grpo fit --config mine.yaml --ckpt_path runs/hpc_ckpt_1.ckpt"
    )


def test_servers_that_do_not_start_name_the_command_that_starts_them_alone(capsys, tmp_path):
    config = tmp_path / "dead.yaml"
    quickstart = Path(resolve_config("quickstart.yaml")).read_text()
    config.write_text(
        re.sub(
            r"  servers: .*",
            "  servers: {class_path: lightning_grpo.RunningServers, "
            "init_args: {urls: ['http://127.0.0.1:9'], connect_timeout_s: 0.1}}",
            quickstart,
        )
    )
    assert main(["fit", "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert f"lightning-grpo doctor --config {config} --start" in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PromptError("row 3 can't be rendered"), "`prompts`"),
        (RewardError("reward 'graded' raised"), "`reward`"),
        (OSError(errno.ENOSPC, "No space left on device", "runs"), "`disk`"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "`disk`"),
        (ServerStartError("the server ended with status 1"), "`start`"),
        (ConfigError("group_size", "must be >= 2", 1), None),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), None),
    ],
    ids=str,
)
def test_a_failed_run_names_the_line_of_doctor_that_looks_at_what_ended_it(error, line):
    said = doctor_words(error, ["--config", "my task.yaml"])
    if line is None:
        assert said == []
    else:
        (words,) = said
        assert f"the line {line} looks at this alone" in words
        assert "lightning-grpo doctor --config 'my task.yaml'" in words


def test_files_of_the_current_folder_can_be_imported_here_and_in_children(tmp_path):
    prepare_imports()
    assert sys.path[0] == str(tmp_path)
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)


def test_preparing_twice_changes_nothing_more(tmp_path):
    prepare_imports()
    before = (list(sys.path), os.environ["PYTHONPATH"])
    prepare_imports()
    assert (list(sys.path), os.environ["PYTHONPATH"]) == before


def test_files_beside_a_config_come_after_those_of_the_current_folder(tmp_path):
    prepare_imports()
    mine = tmp_path / "mine"
    for _ in range(2):
        import_from([mine / "config.yaml", tmp_path / "other.yaml"])
    assert sys.path[:2] == [str(tmp_path), str(mine)]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), str(mine)]


def test_a_folder_beside_which_a_needed_module_would_be_another_is_left_out(tmp_path):
    prepare_imports()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/yaml.py").touch()
    import_from([tmp_path / "mine/config.yaml"])
    assert str(tmp_path / "mine") not in sys.path


def test_a_module_that_is_not_there_is_told_with_where_it_was_looked_for(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/c.yaml").write_text("model: {class_path: not_there.M}\n")
    assert main(["fit", "--config", "mine/c.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"no module `not_there` in `{tmp_path}`, `{tmp_path}/mine`, nor is one installed" in said


def test_a_process_without_a_launcher_is_the_first_rank(monkeypatch):
    for name in ("LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_rank()


@pytest.mark.parametrize("name", ["yaml.py", "queue.py", "torch/__init__.py", "lightning.py"])
def test_a_file_that_would_be_imported_in_the_place_of_a_needed_module_is_refused(
    name, tmp_path, capsys
):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('imported')\n")
    assert main(["fit", "--config", "quickstart.yaml"]) == 2
    said = capsys.readouterr().err
    module = name.split("/")[0].removesuffix(".py")
    assert said.startswith(f"error: `{name.split('/')[0]}` in the current folder must have another")
    assert f"{module!r} is a module that this program needs" in said


@pytest.mark.parametrize("name", ["my_rewards.py", "tests/__init__.py", "lightning_grpo/x.py"])
def test_a_folder_of_ones_own_modules_is_none(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    refuse_hiding(tmp_path)


def test_a_checkout_is_a_folder_to_run_in():
    refuse_hiding(Path(__file__).parents[3])
