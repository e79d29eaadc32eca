"""What every cluster is asked for: nodes that train, nodes that serve, and what runs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """A run of `lightning-grpo fit` on several nodes.

    Attributes:
        program: The command line up to `lightning-grpo`'s own arguments.
        fit: `--config ...` and other options of `fit`.
        servers: Class and arguments of the servers that the config names.
        train_nodes: Nodes with trainer ranks.
        server_nodes: Nodes with servers; 0: the first trainer node serves, as on one machine.
        ranks_per_node: Trainer ranks on each node.
        gpus_per_node: GPUs to ask for on every node; 0 asks for none.
        name: Of the job.
        folder: Where the job's runs, logs and messages go; shared by all nodes.
    """

    program: Sequence[str]
    fit: Sequence[str]
    servers: Mapping[str, Any]
    train_nodes: int = 1
    server_nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    name: str = "grpo"
    folder: str = "runs"

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"train_nodes": 1, "server_nodes": 0, "ranks_per_node": 1, "gpus_per_node": 0}
        for name, smallest in least.items():
            require_at_least(name, vars(self)[name], smallest)

    def fit_options(self) -> list[str]:
        """Of `fit`: the user's, and how many ranks there are."""
        return [
            *self.fit,
            *("--trainer.num_nodes", str(self.train_nodes)),
            *("--trainer.devices", str(self.ranks_per_node)),
        ]


def require_at_least(name: str, value: int, smallest: int) -> None:
    """Refuse a number by the option that it was given as."""
    if value < smallest:
        raise ConfigError(f"`--{name.replace('_', '-')}` must be >= {smallest}, got {value}.")
