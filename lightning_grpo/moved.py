"""Old paths of modules, for configs and checkpoints of earlier releases; kept for one release."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "agents.agent_workflow": "agents.workflows",
    "agents.chat_api": "agents.conversation",
    "agents.endpoint": "agents.conversation",
    "agents.multi_turn": "agents.workflows",
    "agents.record": "agents.turns",
    "agents.rewarded": "agents.turns",
    "agents.tool_calls": "agents.tools",
    "agents.tool_process": "agents.tools",
    "agents.tool_workflow": "agents.workflows",
    "algorithm.aggregation": "algorithm.losses",
    "algorithm.kl": "algorithm.losses",
    "algorithm.layout": "algorithm.batch",
    "algorithm.minibatch_loss": "objective",
    "algorithm.mismatch": "algorithm.metrics",
    "algorithm.packing": "loader",
    "algorithm.ratio": "algorithm.losses",
    "algorithm.rollout_metrics": "algorithm.metrics",
    "algorithm.routing": "algorithm.layers",
    "algorithm.scores": "algorithm.layers",
    "algorithm.sequences": "algorithm.batch",
    "algorithm.truncation": "algorithm.advantages",
    "algorithm.trust_losses": "algorithm.losses",
    "callbacks.baseline": "callbacks.recording",
    "callbacks.defaults": "callbacks.recording",
    "callbacks.final_checkpoint": "callbacks.recording",
    "callbacks.progress": "callbacks.screen",
    "callbacks.samples": "callbacks.recording",
    "callbacks.stop_flag": "callbacks.signals",
    "callbacks.summary": "callbacks.screen",
    "callbacks.timing": "callbacks.recording",
    "callbacks.trajectories": "callbacks.recording",
    "callbacks.views": "contract",
    "certify.parts": "certify.checks",
    "certify.rows": "certify.tiny",
    "certify.served": "certify.checks",
    "certify.table": "certify.run",
    "certify.trained": "certify.checks",
    "checks": "errors",
    "cli.check": "cli.mistakes",
    "cli.hints": "cli.mistakes",
    "cli.imports": "cli.mistakes",
    "cli.install_server": "cli.server",
    "cli.jobs": "cli.launch",
    "cli.problem": "cli.sources",
    "cli.refusals": "cli.mistakes",
    "cli.replay": "cli.fit",
    "cli.score": "cli.trajectories",
    "cli.serve": "cli.server",
    "cli.show": "cli.trajectories",
    "cli.test": "cli.fit",
    "cli.validate": "cli.fit",
    "describe": "contract",
    "distributed.exchange": "distributed.heartbeat",
    "distributed.heart": "distributed.heartbeat",
    "distributed.messenger": "distributed.channel",
    "distributed.metrics": "distributed.channel",
    "distributed.pulse": "distributed.heartbeat",
    "distributed.stops": "distributed.channel",
    "distributed.store": "distributed.heartbeat",
    "distributed.verdict": "distributed.heartbeat",
    "engine.about": "engine.http",
    "engine.admission": "engine.requests",
    "engine.checks": "engine.requests",
    "engine.door": "engine.http",
    "engine.errors": "engine.requests",
    "engine.intake": "engine.requests",
    "engine.kv": "engine.model",
    "engine.loop": "engine.scheduler",
    "engine.process_group": "engine.updates",
    "engine.protocol": "engine.requests",
    "engine.reading": "engine.scheduler",
    "engine.replies": "engine.http",
    "engine.request": "engine.requests",
    "engine.rows": "engine.batch",
    "engine.sampling": "engine.batch",
    "engine.server": "engine.http",
    "engine.slots": "engine.batch",
    "engine.stopping": "engine.batch",
    "engine.weights": "engine.updates",
    "evaluation": "validation",
    "launch.job": "launch.slurm",
    "launch.ray_cluster": "launch.ray",
    "launch.ray_node": "launch.ray",
    "launch.ray_plan": "launch.ray",
    "plan.seconds": "plan.hardware",
    "plan.text": "plan.plan",
    "policy._varlen": "policy.attention",
    "policy.export": "policy.load",
    "policy.head": "policy.packed",
    "policy.materialize": "policy.load",
    "policy.memory": "policy.check",
    "policy.norms": "policy.packed",
    "policy.rope": "policy.attention",
    "policy.snapshot_scorer": "session.proof",
    "reference": "module",
    "replay": "datamodule",
    "report.charts": "report.page",
    "report.text": "report.page",
    "rewards.boxed_answer": "rewards.answers",
    "rewards.final_answer": "rewards.answers",
    "rewards.format": "rewards.answers",
    "rewards.math_text": "rewards.answers",
    "rewards.program": "rewards.sandbox",
    "rollout.background": "serving.event_loop",
    "rollout.binding": "rollout.workflow",
    "rollout.client": "serving.client",
    "rollout.counters": "rollout.ledger",
    "rollout.curriculum": "rollout.stream",
    "rollout.dialects": "serving.fitness",
    "rollout.evaluate": "rollout.producer",
    "rollout.filters": "rollout.producer",
    "rollout.interruption": "serving.health",
    "rollout.limits": "rollout.ledger",
    "rollout.member": "serving.server",
    "rollout.mixture": "rollout.stream",
    "rollout.monitor": "serving.health",
    "rollout.partial": "serving.server",
    "rollout.per_dataset": "rollout.workflow",
    "rollout.pool": "serving.pool",
    "rollout.protocols": "rollout.workflow",
    "rollout.reward_worker": "rollout.scoring",
    "rollout.routing": "serving.pool",
    "rollout.runs": "rollout.producer",
    "rollout.service": "serving.event_loop",
    "rollout.sources": "rollout.prompts",
    "rollout.together": "serving.pool",
    "rollout.verify": "serving.fitness",
    "rollout.wire": "serving.wire",
    "servers.devices": "servers.process",
    "servers.embedded": "servers.process",
    "servers.environment": "servers.process",
    "servers.installed": "servers.sglang",
    "servers.mailbox": "servers.other_nodes",
    "servers.node": "servers.other_nodes",
    "servers.owned": "servers.process",
    "servers.ports": "servers.process",
    "servers.ray": "servers.other_nodes",
    "servers.remote": "servers.other_nodes",
    "servers.running": "servers.base",
    "servers.slurm": "servers.other_nodes",
    "servers.waiting": "servers.process",
    "serving.background": "serving.event_loop",
    "serving.completion": "serving.server",
    "serving.router": "serving.health",
    "session.gpu": "session.assembly",
    "session.heap": "session.assembly",
    "session.live": "session.assembly",
    "session.opening": "session.session",
    "session.protocol": "session.session",
    "session.ranks": "session.session",
    "session.replay": "session.session",
    "session.settings": "session.material",
    "session.state": "session.assembly",
    "strategies.gradient_sync": "strategies.fsdp2",
    "strategies.parallelize": "strategies.fsdp2",
    "strategies.restoring": "strategies.checkpoints",
    "weights.buckets": "weights.gather",
    "weights.choose": "session.assembly",
    "weights.collective": "weights.process_group",
    "weights.disk": "weights.transport",
    "weights.ipc": "weights.process_group",
    "weights.names": "weights.gather",
    "weights.probe": "weights.proof",
    "weights.report": "weights.publisher",
    "weights.rounding": "weights.gather",
    "weights.standstill": "weights.publisher",
    "weights.threads": "weights.process_group",
    "weights.turns": "weights.publisher",
}
"""Old path -> new path, both below the package."""

_PACKAGE = __name__.rpartition(".")[0]


class OldPaths(MetaPathFinder, Loader):
    """Gives the module of today under the path of before."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that moved; None for every other."""
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one: `exec_module` puts the real one in its place."""
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Have the old path name the module of today."""
        new = MOVED[module.__name__.partition(".")[2]]
        sys.modules[module.__name__] = importlib.import_module(f"{_PACKAGE}.{new}")


def serve_old_paths() -> None:
    """Let imports by an old path succeed, where there is no module of that name."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
