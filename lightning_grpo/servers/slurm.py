"""Servers on other nodes of the same Slurm job."""

from __future__ import annotations

from lightning_grpo.servers.remote import NodeServers


class SlurmServers(NodeServers):
    """Servers on other nodes of the job that `lightning-grpo launch slurm` writes.

    Each server node starts `servers` when the trainer asks, on all of its GPUs; the trainer learns
    the URLs through a folder that all nodes share.

    Args:
        num_nodes: Server nodes.
        folder: Shared by all nodes; a new one for each job, and each time it is requeued.
        servers: What every server node starts; None is `SGLangServers()`.
        connect_timeout_s: How long the nodes may take to appear.
    """
