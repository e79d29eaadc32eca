"""Runs on Ray: the plan, the nodes and the cluster."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_grpo.errors import ConfigError
from lightning_grpo.launch.slurm import Job, require_at_least
from lightning_grpo.servers import supervisor
from lightning_grpo.servers.base import child_environment
from lightning_grpo.serving.server import read_tail

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


CHUNK_BYTES = 1 << 20


class Node:
    """What an actor does on its node."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._folder = Path(tempfile.mkdtemp(prefix="grpo-"))
        self._log = self._folder / "log"

    def host(self) -> str:
        """The address that other nodes reach this one by."""
        address: str = importlib.import_module("ray.util").get_node_ip_address()
        return address

    def free_port(self) -> int:
        """A port that nobody listens on now."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
            return port

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        """Start the program in `folder`, under a supervisor that ends it with this process."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, "--", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=child_environment(environment),
                cwd=folder,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._pid = int(self._process.stdout.readline().split()[1])

    def look(self, offset: int) -> tuple[int | None, bytes]:
        """The exit status, None while it runs, and output from that byte on (some of it)."""
        assert self._process is not None
        status = self._process.poll()  # before the output: what is read then is all there is
        with self._log.open("rb") as log:
            log.seek(offset)
            return status, log.read(CHUNK_BYTES)

    def signal(self, number: int) -> None:
        """Signal the program, if it runs."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._pid, number)

    def end(self) -> None:
        """End the program and all that it started; returns when they are gone."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(supervisor.GRACE_S + 10.0)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


POLL_S = 0.5
ANSWER_S = 60.0
"""An actor that does not answer for so long is lost."""

SAVE_S = 120.0
"""Time for the trainer to save and leave once it was told to end."""

_MISUSED = 2
_FAILED = 1


@dataclass(frozen=True)
class NodeOutcome:
    """How one start of the run ended.

    Attributes:
        status: The exit status of the run.
        said: What ended it, with the end of that node's output; empty if it is done.
    """

    status: int
    said: str = ""

    @property
    def can_restart(self) -> bool:
        """Whether beginning again may help: not with a mistake in the configuration."""
        return self.status not in (0, _MISUSED)


class StopRequest:
    """Ctrl-C and SIGTERM, while a job is under way."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take over both signals (in the main thread; elsewhere nobody sends any)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


class WatchedNode:
    """One node of one start, as the driver sees it."""

    def __init__(self, ray: Any, actor: Any, task: NodeTask, log: Path) -> None:
        self._ray, self._actor, self.task, self.log = ray, actor, task, log
        self._offset = 0
        self.status: int | None = None
        self.lost = ""
        log.parent.mkdir(parents=True, exist_ok=True)

    def start(self, folder: str) -> None:
        """Start what is to run there."""
        self._call("start", list(self.task.command), dict(self.task.environment), folder)

    def look(self) -> bytes:
        """Fetch status and output; the output is appended to the log, and returned."""
        if self.ended:
            return b""
        found = self._call("look", self._offset)
        if found is None:
            return b""
        status, output = found
        self._offset += len(output)
        with self.log.open("ab") as log:
            log.write(output)
        # While there is output the program has more to say than its status.
        self.status = None if output else status
        return bytes(output)

    def signal(self, number: int) -> None:
        """Signal the program."""
        if not self.ended:
            self._call("signal", int(number))

    def end(self) -> None:
        """End the program and its actor."""
        if not self.lost:
            self._call("end")
        self._ray.kill(self._actor)

    @property
    def ended(self) -> bool:
        """Whether nothing runs there any more."""
        return bool(self.lost) or self.status is not None

    @property
    def failure(self) -> str:
        """What went wrong there; empty if nothing did."""
        if self.lost:
            return f"{self.task.name} was lost: {self.lost}"
        if self.status is None or (self.task.trains and self.status == 0):
            return ""
        tail = read_tail(self.log)
        return f"{self.task.name} ended with status {self.status}" + (f":\n{tail}" if tail else ".")

    def _call(self, method: str, *arguments: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            call = getattr(self._actor, method).remote(*arguments)
            return self._ray.get(call, timeout=ANSWER_S)
        except (exceptions.RayActorError, exceptions.GetTimeoutError) as error:
            self.lost = str(error).strip().splitlines()[0]
            return None


class RayRun:
    """Runs a job on a cluster, as often as is allowed.

    Args:
        job: What to run.
        address: Of the cluster; `auto` is the one that this machine belongs to.
        wait_s: How long the cluster may take to have room.
        say: Where lines for the user go, and the first trainer node's output.
    """

    def __init__(
        self, job: RayJob, address: str, wait_s: float, say: Callable[[str], None]
    ) -> None:
        self.job, self._address, self._wait_s, self._say = job, address, wait_s, say
        self._ray = import_ray()
        self._stop = StopRequest()
        self._run = Path(job.folder).absolute() / job.name

    def run(self) -> int:
        """Run to the end; returns the exit status.

        Raises:
            ConfigError: There is no such cluster, or it has no room for the job.
        """
        with self._connected(), self._stop.taken():
            for start in range(self.job.max_restarts + 1):
                outcome = self._start(start)
                if outcome.said:
                    self._say(f"{outcome.said}\n")
                if self._stop.signal or not outcome.can_restart:
                    break
                if start < self.job.max_restarts:
                    self._say(f"restart {start + 1} of {self.job.max_restarts}\n")
            return outcome.status

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise ConfigError(
                f"`--address` must be that of a Ray cluster, got {self._address!r}: {error}. "
                "Start one with `ray start --head`."
            ) from error
        try:
            yield
        finally:
            self._ray.shutdown()

    def _start(self, number: int) -> NodeOutcome:
        ray_util = importlib.import_module("ray.util")
        group = ray_util.placement_group(bundles(self.job), strategy="STRICT_SPREAD")
        try:
            self._await_room(group)
            nodes = self._place(group, number)
            try:
                for node in nodes:
                    node.start(str(Path.cwd()))
                return self._watch(nodes)
            finally:
                for node in nodes:
                    node.end()
        finally:
            ray_util.remove_placement_group(group)

    def _await_room(self, group: Any) -> None:
        deadline, ready = time.monotonic() + self._wait_s, group.ready()
        while not self._ray.wait([ready], timeout=POLL_S)[0]:
            if time.monotonic() < deadline and not self._stop.signal:
                continue
            job, alive = self.job, [node for node in self._ray.nodes() if node["Alive"]]
            had = "; ".join(
                f"{n['NodeManagerAddress']}: {n['Resources'].get('CPU', 0):g} CPUs, "
                f"{n['Resources'].get('GPU', 0):g} GPUs"
                for n in alive
            )
            raise ConfigError(
                f"the cluster must have {job.num_nodes} nodes (`--train-nodes` + `--server-nodes`) "
                f"with {job.cpus_per_node} CPUs and {job.gpus_per_node} GPUs free on each, and has "
                f"not had them for {self._wait_s:g} s. It has: {had}. Ask for less, or `--wait` "
                "longer."
            )

    def _place(self, group: Any, number: int) -> list[WatchedNode]:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        actor_class = self._ray.remote(Node)
        actors = [
            actor_class.options(
                num_cpus=self.job.cpus_per_node,
                num_gpus=self.job.gpus_per_node,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(self.job.num_nodes)
        ]
        hosts = self._ray.get([actor.host.remote() for actor in actors])
        port = self._ray.get(actors[0].free_port.remote())
        mail = self._run / f"nodes-{uuid.uuid4().hex[:8]}"
        start = Start(hosts, port, str(self._run), str(mail), resume=number > 0)
        logs = self._run / "logs"
        return [
            WatchedNode(self._ray, actor, task, logs / f"{task.name}.{number}.log")
            for actor, task in zip(actors, node_tasks(self.job, start), strict=True)
        ]

    def _watch(self, nodes: Sequence[WatchedNode]) -> NodeOutcome:
        trainers = [node for node in nodes if node.task.trains]
        while True:
            self._look(nodes)
            failed = next((node for node in nodes if node.failure), None)
            if self._stop.signal:
                self._end_in_order(nodes, trainers, self._stop.signal)
                return NodeOutcome(trainers[0].status or 128 + self._stop.signal)
            if failed is not None:
                said = failed.failure
                self._end_in_order(nodes, trainers, signal.SIGTERM)
                return NodeOutcome(failed.status or _FAILED, said)
            if all(node.ended for node in trainers):
                return NodeOutcome(0)
            time.sleep(POLL_S)

    def _end_in_order(
        self, nodes: Sequence[WatchedNode], trainers: Sequence[WatchedNode], number: int
    ) -> None:
        """Let the ranks that are left save the last boundary and leave."""
        for node in trainers:
            node.signal(number)
        deadline = time.monotonic() + SAVE_S
        while not all(node.ended for node in trainers) and time.monotonic() < deadline:
            self._look(nodes)
            time.sleep(POLL_S)

    def _look(self, nodes: Sequence[WatchedNode]) -> None:
        for node in nodes:
            output = node.look()
            if node.task.name == "train-0":
                self._say(output.decode("utf-8", "replace"))


def import_ray() -> Any:
    """The package, which is an extra.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "`lightning-grpo launch ray` needs Ray, which is not installed. "
            "`pip install 'lightning-grpo[ray]'`, on every node."
        ) from error
