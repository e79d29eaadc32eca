"""Servers on other nodes of a Ray cluster."""

from __future__ import annotations

from lightning_grpo.servers.remote import NodeServers


class RayServers(NodeServers):
    """Servers on the nodes that `lightning-grpo launch ray` has placed for them.

    Each server node starts `servers` when the trainer asks, on all of its GPUs; the trainer learns
    the URLs through a folder that all nodes share.

    Args:
        num_nodes: Server nodes.
        folder: Shared by all nodes; a new one for each start of the run.
        servers: What every server node starts; None is `SGLangServers()`.
        connect_timeout_s: How long the nodes may take to appear.
    """
