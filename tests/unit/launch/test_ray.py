"""A Ray job's plan: what each node must have and what runs there; no Ray is needed."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec

import psutil
import pytest

from lightning_grpo.cli.main import main
from lightning_grpo.errors import ConfigError
from lightning_grpo.launch.ray import Node, RayJob, Start, bundles, node_tasks

SERVERS = {"class_path": "lightning_grpo.EmbeddedServers", "init_args": {"num_servers": 2}}


def job(**kwargs) -> RayJob:
    return RayJob(("python", "-m", "x"), ("--config", "a.yaml"), SERVERS, **kwargs)


def start(count: int, **kwargs) -> Start:
    return Start(
        [f"10.0.0.{n}" for n in range(count)], 4000, "/shared/run", "/shared/mail", **kwargs
    )


def value(command, option: str) -> str:
    return command[len(command) - 1 - list(reversed(command)).index(option) + 1]


def test_each_node_has_a_bundle_of_its_own():
    assert (
        bundles(job(gpus_per_node=8, cpus_per_node=32, server_nodes=2))
        == [{"CPU": 32, "GPU": 8}] * 3
    )
    assert bundles(job(server_nodes=0)) == [{"CPU": 1}]


def test_ranks_meet_on_the_first_node_and_servers_run_on_the_last_ones():
    tasks = node_tasks(job(train_nodes=2, server_nodes=1, ranks_per_node=4), start(3))
    assert [task.name for task in tasks] == ["train-0", "train-1", "server-0"]
    assert [task.trains for task in tasks] == [True, True, False]
    for rank, task in enumerate(tasks[:2]):
        expected = {"MASTER_ADDR": "10.0.0.0", "MASTER_PORT": "4000", "NODE_RANK": str(rank)}
        assert expected.items() <= task.environment.items()
        assert task.command[:6] == ["python", "-m", "x", "fit", "--config", "a.yaml"]
        assert value(task.command, "--trainer.num_nodes") == "2"
        assert value(task.command, "--trainer.devices") == "4"
        assert value(task.command, "--trainer.default_root_dir") == "/shared/run"
        assert value(task.command, "--data.servers") == "lightning_grpo.RayServers"
        assert value(task.command, "--data.servers.folder") == "/shared/mail"
        assert json.loads(value(task.command, "--data.servers.servers")) == SERVERS
        assert "--ckpt_path" not in task.command
    assert tasks[2].command[3:5] == ["launch", "server-node"]
    assert value(tasks[2].command, "--folder") == "/shared/mail"
    assert value(tasks[2].command, "--host") == "10.0.0.2"
    assert value(tasks[2].command, "--node") == "0"


def test_without_server_nodes_the_run_starts_its_servers_itself():
    (task,) = node_tasks(job(server_nodes=0), start(1))
    assert "--data.servers" not in task.command


def test_a_restart_goes_on_from_the_last_checkpoint_whatever_the_first_start_was_given():
    given = RayJob(("x",), ("--config", "a.yaml", "--ckpt_path", "first.ckpt"), SERVERS)
    (task, _) = node_tasks(given, start(2, resume=True))
    assert value(task.command, "--ckpt_path") == "last-or-none"


@pytest.mark.parametrize(
    ("name", "number"),
    [("train_nodes", 0), ("server_nodes", -1), ("cpus_per_node", 0), ("max_restarts", -1)],
)
def test_an_impossible_number_is_refused_by_its_option(name, number):
    with pytest.raises(ConfigError, match=f"`--{name.replace('_', '-')}` must be >= .*{number}"):
        job(**{name: number})


def test_the_command_refuses_what_can_t_work_in_a_line(capsys):
    words = ["launch", "ray", "--config", "quickstart.yaml", "--train-nodes", "0"]
    assert main(words) == 2
    assert capsys.readouterr().err == "error: `--train-nodes` must be >= 1, got 0.\n"


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_the_extra_the_way_out_is_told(capsys):
    assert main(["launch", "ray", "--config", "quickstart.yaml"]) == 2
    assert "`pip install 'lightning-grpo[ray]'`, on every node" in capsys.readouterr().err


# ---- one node's process as an actor sees to it, without Ray -------------------------------------


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.end()


def until_ended(node: Node, offset: int = 0) -> tuple[int, bytes]:
    deadline, output = time.monotonic() + 30, b""
    while time.monotonic() < deadline:
        status, more = node.look(offset + len(output))
        output += more
        if status is not None and not more:
            return status, output
        time.sleep(0.02)
    raise AssertionError(f"still running: {output!r}")


def test_output_and_status_are_fetched_piece_by_piece(node, tmp_path):
    program = "import os, sys; print(os.getcwd(), os.environ['WORD'], flush=True); sys.exit(3)"
    node.start([sys.executable, "-c", program], {"WORD": "hello"}, str(tmp_path))
    assert until_ended(node, offset=1) == (3, f"{tmp_path} hello\n".encode()[1:])


def test_a_signal_reaches_the_program_and_an_ended_one_ignores_it(node, tmp_path):
    program = "import signal, time; print('up', flush=True); time.sleep(99)"
    node.start([sys.executable, "-c", program], {}, str(tmp_path))
    while not node.look(0)[1]:
        time.sleep(0.02)
    node.signal(signal.SIGTERM)
    assert until_ended(node) == (128 + signal.SIGTERM, b"up\n")
    node.signal(signal.SIGTERM)


def test_the_end_of_a_node_ends_what_its_program_started(node, tmp_path):
    program = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '99']); "
        "print(p.pid, flush=True); time.sleep(99)"
    )
    node.start([sys.executable, "-c", program], {}, str(tmp_path))
    while not (output := node.look(0)[1]):
        time.sleep(0.02)
    node.end()
    assert not psutil.pid_exists(int(output))


def test_a_free_port_can_be_listened_on(node):
    assert 1024 <= node.free_port() < 65536
