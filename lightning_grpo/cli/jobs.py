"""What `launch slurm` and `launch ray` read alike: nodes, ranks, and the config's servers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.cli.fit import split_configs
from lightning_grpo.cli.problem import ConfigProblem, Parser
from lightning_grpo.cli.sources import collect


def job_parser(kind: str, usage: str) -> argparse.ArgumentParser:
    """The options of every cluster."""
    parser = Parser(
        prog=f"lightning-grpo launch {kind}",
        description=usage.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Every other option is one of `lightning-grpo fit`.",
    )
    parser.add_argument("--train-nodes", type=int, default=1, help="nodes with trainer ranks")
    parser.add_argument("--server-nodes", type=int, default=1, help="nodes with servers")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="to ask for on every node")
    parser.add_argument("--ranks-per-node", type=int, help="default: its GPUs, else 1")
    parser.add_argument("--name", help="of the job; default: the config's")
    parser.add_argument("--folder", default="runs", help="for runs and logs, shared by all nodes")
    return parser


def job_settings(options: argparse.Namespace, fit: Sequence[str]) -> dict[str, Any]:
    """The fields of a `Job`, from its options and from those of `fit`.

    Raises:
        ConfigProblem: There is no config, or it names no servers.
    """
    configs, others = split_configs(fit)
    if not configs:
        raise ConfigProblem("--config", "needs the name of a file", "command line")
    servers = collect(configs, others).plain().get("data", {}).get("servers")
    ranks = options.ranks_per_node
    return {
        "program": (sys.executable, "-m", "lightning_grpo.cli.main"),
        "fit": [*(word for _, path in configs for word in ("--config", str(path))), *others],
        "servers": _class_and_arguments(servers),
        "train_nodes": options.train_nodes,
        "server_nodes": options.server_nodes,
        "ranks_per_node": (options.gpus_per_node or 1) if ranks is None else ranks,
        "gpus_per_node": options.gpus_per_node,
        "name": options.name or configs[0][1].stem,
        "folder": options.folder,
    }


def _class_and_arguments(servers: Any) -> Mapping[str, Any]:
    """The config's `data.servers` with both of its keys."""
    if servers is None:
        raise ConfigProblem("data.servers", "is missing in the config")
    if isinstance(servers, str):
        return {"class_path": servers}
    if not isinstance(servers, dict):
        raise ConfigProblem("data.servers", f"must be a class of servers, got {servers!r}")
    return servers
