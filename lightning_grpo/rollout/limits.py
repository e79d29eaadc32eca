"""The limits under which rollouts run: those of the user, and the machine's."""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass
from typing import Literal

import psutil

from lightning_grpo.checks import require_count, require_number, require_seconds
from lightning_grpo.errors import ConfigError

logger = logging.getLogger(__name__)

SPARE_FILES = 96
"""What a run opens after its start beside connections: logs, checkpoints, rewards' processes."""
FILES_PER_SERVER = 4
"""Its pipes, its health check, its weights."""
MOST_FILES = 1 << 20
"""Nobody needs more, and a hard limit may be infinite."""


MOST_PROCESSES = 4096
_AT_LEAST = {"max_attempts": 1, "max_filtered_batches": 0, "max_server_restarts": 0}


@dataclass(frozen=True)
class RolloutLimits:
    """How much runs at once, how long it may take, and how much may fail.

    Args:
        max_in_flight: Episodes that run at once (each has at most one request in flight, as a
            rule); None is `(max_staleness + 1) * batch_size * group_size`. Groups are let in whole.
        request_timeout_s: Longest that a request is left to one server. It is called back before,
            if it is late by its tokens and the speed seen, and goes on with what it has.
        reward_timeout_s: Longest time of one call of a reward; its process is killed then.
        reward_processes: Processes that run rewards; 0 runs them in-line, for a debugger.
        max_attempts: How often a prompt is tried before it counts as failed.
        max_failed_fraction: Of the last 10 batches' groups; above it the run ends with the first
            failure's traceback.
        max_filtered_batches: How many batches' worth of groups `keep_group` may turn down for one
            batch; then the groups it doesn't want fill the batch.
        straggler_policy: `wait` for a group at its last admissible version, or `drop` it (its
            prompt is asked again).
        straggler_timeout_s: Longest time that a batch waits for a group; it expires then, and the
            next prompt takes its place. None: as long as its requests take.
        rank_timeout_s: Silence of a rank after which it counts as lost.
        server_timeout_s: How long a server that is not this machine's own may be silent, or fail to
            prove its weights; it is asked again meanwhile. Then it is started again where the run
            may do that; else it is lost, and comes back when it answers.
        max_server_restarts: How often a server may die, or send what can't be, before it is lost;
            each time is forgotten after a minute of service.
    """

    max_in_flight: int | None = None
    request_timeout_s: float = 600.0
    reward_timeout_s: float = 15.0
    reward_processes: int = 2
    max_attempts: int = 3
    max_failed_fraction: float = 0.1
    max_filtered_batches: int = 3
    straggler_policy: Literal["wait", "drop"] = "wait"
    straggler_timeout_s: float | None = None
    rank_timeout_s: float = 60.0
    server_timeout_s: float = 300.0
    max_server_restarts: int = 3

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        for name, least in _AT_LEAST.items():
            require_count(name, vars(self)[name], least)
        for name in (name for name in vars(self) if name.endswith("_timeout_s")):
            if vars(self)[name] is not None:
                require_seconds(name, vars(self)[name])
        if self.max_in_flight is not None:
            require_number(
                "max_in_flight",
                self.max_in_flight,
                least=1,
                whole=True,
                way_out="Null is for all that the staleness allows.",
            )
        require_count("reward_processes", self.reward_processes, 0, MOST_PROCESSES)
        require_number("max_failed_fraction", self.max_failed_fraction, least=0, most=1)
        if self.straggler_policy not in ("wait", "drop"):
            raise ConfigError(
                f"`straggler_policy` must be 'wait' or 'drop', got {self.straggler_policy!r}."
            )


def raise_file_limit() -> int:
    """Raise the soft limit of open files as far as the hard one allows; how many may be open then.

    What is started afterwards has it, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def room_for_connections(wanted: int, num_servers: int, most_files: int) -> int:
    """How many requests may be in flight with the files that this process may open.

    Args:
        wanted: Requests that are to be in flight.
        num_servers: Each is asked for its health, and gets weights, beside them.
        most_files: That may be open at once, these included.

    Raises:
        ConfigError: There is room for none.
    """
    others = psutil.Process().num_fds() + SPARE_FILES + FILES_PER_SERVER * num_servers
    room = most_files - others
    needed = (
        f"this process may open {most_files} files (`ulimit -Hn`), {wanted + others} are needed for"
        f" {wanted} requests in flight and {num_servers} servers"
    )
    way_out = f"Raise it before the start (`ulimit -n {wanted + others}`)"
    if room < 1:
        raise ConfigError(f"{needed}. {way_out}.")
    if room < wanted:
        logger.warning(
            "%s: %d are sent at once. %s, or lower `limits.max_in_flight`.", needed, room, way_out
        )
    return room
