"""Servers on other nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_grpo.errors import ConfigError, ServerError, ServerStartError
from lightning_grpo.servers.base import ServerLoad, answer
from lightning_grpo.servers.other_nodes import (
    END,
    NodeMailbox,
    NodeServers,
    ServerNode,
    SlurmServers,
    TrainerMailbox,
    build_servers,
    describe_servers,
)
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import SGLangServers
from tests.fakes.small_servers import PythonServers


def answers(url):
    said = answer(url)
    return said is not None and said.status == 200


def test_each_node_is_sized_for_its_share_of_what_is_in_flight_and_decoded():
    servers = SlurmServers(num_nodes=2)
    servers.load = ServerLoad(4096, 2049, 1024, weight_bytes=1, kv_bytes_per_token=1, vocab_size=9)
    share = servers._node_load()
    assert (share["in_flight"], share["batch"]) == (2048, 1025)
    assert share["context_tokens"] == 1024


@contextmanager
def nodes(folder: Path, count: int) -> Iterator[list[threading.Thread]]:
    end = threading.Event()
    threads = [
        threading.Thread(target=ServerNode(folder, n, "127.0.0.1").serve, args=(end,))
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_every_node_starts_restarts_and_ends_its_servers_and_leaves_at_the_end(tmp_path):
    folder = tmp_path / "nodes"
    servers = NodeServers(2, str(folder), PythonServers(), connect_timeout_s=30)
    with nodes(folder, 2) as threads:
        handles = servers.start("model", tmp_path / "run")
        assert len(handles) == len({h.url for h in handles}) == 2
        assert all(answers(h.url) for h in handles)
        assert {h.log_path.parent.parent.name for h in handles} == {"node-0", "node-1"}
        assert not servers.is_gone(handles[0].url)
        assert servers.is_gone("http://127.0.0.1:1")
        again = servers.restart(handles[1].url)
        assert answers(again.url)
        assert servers.handles == [handles[0], again]
        with pytest.raises(ServerError, match="none of this run's servers"):
            servers.restart("http://127.0.0.1:1")
        servers.stop()
        assert not answers(handles[0].url)
        assert not answers(again.url)
        (folder / END).touch()
        for thread in threads:
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.mark.parametrize("asked", [False, True])
def test_servers_of_every_node_are_told_of_routes_and_determinism(asked, tmp_path):
    servers = NodeServers(1, str(tmp_path / "nodes"), PythonServers(), connect_timeout_s=30)
    servers.tells_routes = servers.deterministic = asked
    with nodes(tmp_path / "nodes", 1):
        (handle,) = servers.start("model", tmp_path / "run")
        said = handle.log_path.read_text()
        assert ("tells-routes" in said) is asked
        assert ("deterministic" in said) is asked
        servers.stop()


def test_a_server_that_does_not_start_is_told_with_the_node_and_its_log(tmp_path):
    servers = NodeServers(1, str(tmp_path), EmbeddedServers(), connect_timeout_s=30)
    with nodes(tmp_path, 1), pytest.raises(ServerStartError, match=r"on server node 0: .*\n.*log"):
        servers.start(str(tmp_path / "no-model"), tmp_path / "run")
    servers.stop()


def test_a_node_that_never_appears_is_named(tmp_path):
    NodeMailbox(tmp_path, 0, "n1").beat()
    trainer = TrainerMailbox(tmp_path, 2)
    with pytest.raises(ServerStartError, match="server node 1 did not appear"):
        trainer.wait_for_nodes(0.1, lambda: None)


def test_requests_are_read_once_in_order_and_replies_reach_the_one_who_asked(tmp_path):
    node, trainer = NodeMailbox(tmp_path, 0, "n1"), TrainerMailbox(tmp_path, 1)
    numbers = [trainer.ask(0, "start", model_path="m"), trainer.ask(0, "stop")]
    first, second = node.requests()
    assert (first.what, first.arguments, second.what) == ("start", {"model_path": "m"}, "stop")
    assert list(node.requests()) == []
    node.reply(second, {"handles": []})
    assert trainer.answered(numbers[0]) is None
    assert trainer.answered(numbers[1]) == {"handles": []}


def test_servers_are_described_and_built_again():
    described = describe_servers(SGLangServers(tp=2, flags={"dtype": "bfloat16"}))
    built = build_servers(described)
    assert isinstance(built, SGLangServers)
    assert (built.tp, built.flags, built.port_range) == (2, {"dtype": "bfloat16"}, (20000, 30000))


def test_no_nodes_at_all_are_refused():
    with pytest.raises(ConfigError, match="`num_nodes` must be >= 1, got 0"):
        NodeServers(0)
