"""A Ray job as a plan: what each node must have, and what runs on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_grpo.launch.job import Job, require_at_least

_RAY_SERVERS = "lightning_grpo.RayServers"


@dataclass(frozen=True)
class RayJob(Job):
    """What is asked of Ray.

    Attributes:
        cpus_per_node: CPUs to ask for on every node.
        max_restarts: How often the run is begun again, from its last checkpoint, when a trainer
            rank, a server node or a machine is lost.
    """

    cpus_per_node: int = 1
    max_restarts: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        require_at_least("cpus_per_node", self.cpus_per_node, 1)
        require_at_least("max_restarts", self.max_restarts, 0)

    @property
    def num_nodes(self) -> int:
        """All nodes, those that train first."""
        return self.train_nodes + self.server_nodes


@dataclass(frozen=True)
class NodeTask:
    """What runs on one node.

    Attributes:
        name: `train-0`, `server-0`, ...
        command: The program and its arguments.
        environment: On top of the node's own.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]

    @property
    def trains(self) -> bool:
        """Whether trainer ranks run here."""
        return self.name.startswith("train-")


@dataclass(frozen=True)
class Start:
    """One start of the run; a restart has its own.

    Attributes:
        hosts: Addresses of the nodes, those that train first.
        port: Free on the first of them: there the ranks meet.
        run: The run's folder.
        mail: A new folder for messages between trainer and server nodes.
        resume: Whether to go on from the run's last checkpoint.
    """

    hosts: Sequence[str]
    port: int
    run: str
    mail: str
    resume: bool = False


def bundles(job: RayJob) -> list[dict[str, float]]:
    """Resources of each node's placement: the bundles of one placement group."""
    one: dict[str, float] = {"CPU": job.cpus_per_node}
    if job.gpus_per_node:
        one["GPU"] = job.gpus_per_node
    return [dict(one) for _ in range(job.num_nodes)]


def node_tasks(job: RayJob, start: Start) -> list[NodeTask]:
    """What each node runs, those that train first."""
    fit = ["fit", *job.fit_options(), "--trainer.default_root_dir", start.run]
    if job.server_nodes:
        fit += ["--data.servers", _RAY_SERVERS, "--data.servers.folder", start.mail]
        fit += ["--data.servers.num_nodes", str(job.server_nodes)]
        fit += ["--data.servers.servers", json.dumps(job.servers)]
    if start.resume:
        fit += ["--ckpt_path", "last-or-none"]
    meeting = {"MASTER_ADDR": start.hosts[0], "MASTER_PORT": str(start.port)}
    tasks = []
    for node in range(job.train_nodes):
        environment = {"PYTHONUNBUFFERED": "1", **meeting, "NODE_RANK": str(node)}
        tasks.append(NodeTask(f"train-{node}", [*job.program, *fit], environment))
    for node, host in enumerate(start.hosts[job.train_nodes :]):
        serve = ["launch", "server-node", "--folder", start.mail]
        serve += ["--node", str(node), "--host", host]
        environment = {"PYTHONUNBUFFERED": "1"}
        tasks.append(NodeTask(f"server-{node}", [*job.program, *serve], environment))
    return tasks
