"""Servers on other nodes."""

from lightning_grpo.servers.base import ServerLoad
from lightning_grpo.servers.other_nodes import SlurmServers


def test_each_node_is_sized_for_its_share_of_what_is_in_flight_and_decoded():
    servers = SlurmServers(num_nodes=2)
    servers.load = ServerLoad(4096, 2049, 1024, weight_bytes=1, kv_bytes_per_token=1, vocab_size=9)
    share = servers._node_load()
    assert (share["in_flight"], share["batch"]) == (2048, 1025)
    assert share["context_tokens"] == 1024
