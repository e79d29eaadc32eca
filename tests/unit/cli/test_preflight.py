"""`lightning-grpo doctor` before runs that could not work, and one that could."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_grpo.cli.folders import write_task
from lightning_grpo.cli.machine import disk, free_memory
from lightning_grpo.cli.main import main
from lightning_grpo.policy.load import load_policy
from lightning_grpo.shipped import resolve_path


@pytest.fixture
def task(tmp_path, monkeypatch):
    write_task(tmp_path / "task")
    monkeypatch.chdir(tmp_path / "task")
    monkeypatch.delitem(sys.modules, "reward", raising=False)
    return tmp_path / "task"


@pytest.fixture
def findings(capsys):
    """Of `doctor` with a config and options: the exit status, and check -> (verdict, words)."""

    def run(*options):
        status = main(["doctor", "--config", "config.yaml", "--json", *options])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found = {each["check"]: each for each in lines if each["verdict"] == "ok"}
        found |= {each["check"]: each for each in lines if each["verdict"] != "ok"}
        said = {n: (f["verdict"], f"{f['found']} {f['way_out']}") for n, f in found.items()}
        return status, said

    return run


def test_a_config_that_can_run_has_no_finding_but_good_ones_and_leaves_nothing(task, findings):
    before = sorted(task.rglob("*"))
    status, said = findings("--start")
    assert status == 0
    assert {verdict for verdict, _ in said.values()} == {"ok"}
    assert {"config", "trainer", "model", "disk", "prompts", "reward", "servers"} < set(said)
    assert "sampled [" in said["start"][1]
    assert [path for path in sorted(task.rglob("*")) if "__pycache__" not in str(path)] == before


def no_weights(task):
    (task / "model").mkdir()
    (task / "model/config.json").write_text('{"model_type": "qwen2"}')


def no_rows(task):
    (task / "train.jsonl").write_text("{")


def no_question(task):
    (task / "train.jsonl").write_text('{"text": "hi", "answer": "1"}\n')


def always_zero(task):
    (task / "reward.py").write_text("def reward(completion, answer):\n    return 0.0\n")


def slow(task):
    source = "import time\ndef reward(completion, answer):\n    time.sleep(5)\n    return 1.0\n"
    (task / "reward.py").write_text(source)


def save(file, parameters):
    state = {f"policy.model.{name}": torch.zeros(shape) for name, shape in parameters.items()}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state}, file)


def another_checkpoint(task):
    save(task / "a.ckpt", {"layers.9.weight": (3,)})


def own_checkpoint(task):
    model = load_policy(resolve_path("shipped:quickstart"), meta=True)
    save(task / "a.ckpt", {name: value.shape for name, value in model.state_dict().items()})


def raises(task):
    (task / "reward.py").write_text("def reward(completion, answer):\n    return answer.no\n")


def asks_for_more(task):
    (task / "reward.py").write_text("def reward(completion, gold):\n    return 0.0\n")


def in_no_module(task):
    (task / "reward.py").write_text("def rewards(completion, answer):\n    return 0.0\n")


@pytest.mark.parametrize(
    ("change", "options", "check", "verdict", "words"),
    [
        (None, ["--trainer.accelerator", "gpu"], "config", "failure", "there is no GPU"),
        (None, ["--trainer.max_step", "3"], "config", "failure", "did you mean"),
        (None, ["--data.group_size", "1"], "config", "failure", "group_size"),
        (None, ["--model.model", "nowhere/at/all"], "model", "failure", "folder that exists"),
        (no_weights, ["--model.model", "model"], "model", "failure", "no weights"),
        (no_rows, [], "prompts", "failure", "train.jsonl"),
        (no_question, [], "prompts", "failure", "question"),
        (None, ["--data.prompts.path", "none.jsonl"], "prompts", "failure", "none.jsonl"),
        (
            always_zero,
            [],
            "reward",
            "warning",
            "gives 0.0 to the first answer tried and 0.0 to an empty one",
        ),
        (
            slow,
            ["--data.limits.reward_timeout_s", "0.2"],
            "reward",
            "warning",
            "took longer than `reward_timeout_s` (0.2 s)",
        ),
        (
            None,
            ["--trainer.devices", "64", "--trainer.strategy", "ddp"],
            "trainer",
            "warning",
            "64 ranks, and",
        ),
        (
            None,
            ["--trainer.devices", "200", "--trainer.strategy", "ddp"],
            "trainer",
            "failure",
            "at most the sequences of a minibatch",
        ),
        (another_checkpoint, ["--ckpt_path", "a.ckpt"], "checkpoint", "failure", "differ"),
        (own_checkpoint, ["--ckpt_path", "a.ckpt"], "checkpoint", "ok", "a.ckpt"),
        (raises, [], "reward", "failure", "'str' object has no attribute 'no'"),
        (asks_for_more, [], "prompts", "failure", "asks for 'gold', which is no column"),
        (in_no_module, [], "config", "failure", "reward.reward"),
        (
            None,
            ["--data.servers", "lightning_grpo.SGLangServers", "--data.servers.python", "/bin/no"],
            "servers",
            "failure",
            "interpreter with SGLang",
        ),
        (
            None,
            ["--data.workflow.init_args.sampling.max_new_tokens", "100000"],
            "prompts",
            "failure",
            "room for a prompt",
        ),
    ],
)
def test_what_would_stop_a_run_is_one_line_with_a_way_out(
    task, findings, change, options, check, verdict, words
):
    if change is not None:
        change(task)
    status, said = findings(*options)
    assert status == (1 if verdict == "failure" else 0), said
    assert said[check][0] == verdict, said
    assert words in said[check][1]


def test_a_reward_beside_the_config_is_found_from_another_folder_and_by_the_process_it_runs_in(
    task, tmp_path, monkeypatch
):
    (task / "reward.py").rename(task / "beside_reward.py")
    config = (task / "config.yaml").read_text().replace("reward: reward.", "reward: beside_reward.")
    (task / "config.yaml").write_text(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files = {"prompts": "train", "val_prompts": "test"}
    paths = [f"--data.{key}.path={task}/{name}.jsonl" for key, name in files.items()]
    status = main(["doctor", "--config", "../task/config.yaml", *paths])
    assert status == 0


def test_no_line_tells_of_a_seed_since_nothing_runs(task):
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logger = logging.getLogger("lightning.fabric")
    logger.addHandler(handler)
    try:
        main(["doctor", "--config", str(task / "config.yaml")])
    finally:
        logger.removeHandler(handler)
    assert "Seed" not in logged.getvalue()


@pytest.mark.parametrize("kind", ["RunningServers", "ServerList"])
def test_servers_that_do_not_answer_are_a_failure(task, findings, kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = yaml.safe_load((task / "config.yaml").read_text())
        listed = {"urls": [url]}
        if kind == "ServerList":
            (task / "servers.txt").write_text(url)
            listed = {"source": str(task / "servers.txt")}
        config["data"]["servers"] = {
            "class_path": f"lightning_grpo.{kind}",
            "init_args": {**listed, "connect_timeout_s": 1.0},
        }
        (task / "config.yaml").write_text(yaml.safe_dump(config))
        status, said = findings()
    assert status == 1
    assert said["servers"][0] == "failure"
    assert url in said["servers"][1]


def test_a_disk_that_is_too_small_or_read_only_is_a_failure(tmp_path):
    (room,) = disk(tmp_path / "runs", needed_gb=1e9)
    assert (room.verdict, "1000000000 GB are needed" in room.found) == ("failure", True)
    (closed,) = disk(Path("/proc/self"))
    assert closed.verdict == "failure"
    assert "trainer.default_root_dir" in closed.way_out


def test_the_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    assert free_memory(tmp_path / "none") > 0
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 5000


def test_without_a_config_it_looks_at_the_machine(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "packages" in printed
    assert printed.endswith("\n0 failures\n")


def test_options_without_a_config_are_refused(capsys):
    assert main(["doctor", "--trainer.max_steps", "3"]) == 2
    assert "`--config` needs a file" in capsys.readouterr().err
