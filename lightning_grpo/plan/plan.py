"""What a run would take of its machine, how long its steps would be, and what to change first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_grpo.plan import seconds
from lightning_grpo.plan.hardware import Speed
from lightning_grpo.plan.seconds import Serving, Workload
from lightning_grpo.policy.size import ModelSize, TrainingMemory, TrainingSetup, training_memory
from lightning_grpo.servers.base import Machine, ServerLoad, Servers
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.servers.sizing import MIN_OVERHEAD, ServerLayout, ServersTooLargeError

GIB = 1 << 30
USABLE = 0.96
"""Of a GPU's memory, that trainer and servers may take (as `servers/sizing.py` has it)."""
PROCESS_BYTES = 600 << 20
"""Of a process that has torch and transformers."""
FASTER = 0.95
"""Of a step's time, at most, that a change is worth naming for."""
LEAST_TOKENS = 1024
"""Of a micro-batch: below, the host's launches are all of its time."""


@dataclass(frozen=True)
class RunFacts:
    """A run as `fit` would resolve it.

    Attributes:
        size: Of the model.
        setup: How it is trained.
        work: What a rollout batch asks.
        servers: Which would be started, with the machine that they are planned for.
        load: What is asked of them.
        machine: What all run on.
        training: The GPUs that train; none where the CPU does.
        speed: What the hardware achieves; None where that is not known.
    """

    size: ModelSize
    setup: TrainingSetup
    work: Workload
    servers: Servers
    load: ServerLoad
    machine: Machine
    training: tuple[int, ...]
    speed: Speed | None


@dataclass(frozen=True)
class StepParts:
    """Seconds of one rollout batch, from the end of the one before.

    Attributes:
        rollout: What servers take for it, also while the trainer works.
        waiting: Of that, what the trainer waits.
        forward_backward: With rollouts beside it on the same GPU, where they share it.
        optimizer: All optimizer steps.
        sync: Weights to the servers, and their proof.
        other: Packing, logging, recording.
    """

    rollout: float
    waiting: float
    forward_backward: float
    optimizer: float
    sync: float
    other: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.waiting + self.forward_backward + self.optimizer + self.sync + self.other


def step_parts(
    size: ModelSize, setup: TrainingSetup, work: Workload, serving: Serving, speed: Speed
) -> StepParts:
    """Add up the parts of a step.

    Rollouts of the next batches run while the trainer works, but where `staleness` is 0. Where both
    share a processor neither is spared: passes take as much longer as rollouts get done meanwhile.

    Args:
        size: Of the model.
        setup: How it is trained.
        work: What a rollout batch asks.
        serving: Who answers.
        speed: What the hardware achieves.
    """
    micro_batches = work.micro_batches(setup)
    predicted = work.completion / (work.prompt + work.completion)
    passes = seconds.training_seconds(size, setup, micro_batches, predicted, speed) * work.steps
    scoring = seconds.scoring_seconds(size, setup, micro_batches, predicted, speed)
    passes += work.scorings * work.minibatches * scoring
    optimizer = seconds.optimizer_seconds(size, setup, speed) * work.steps
    in_flight = min(work.completions * work.staleness, serving.servers * serving.running)
    had = work.completion / 2
    sync = seconds.sync_seconds(size, setup, in_flight, speed, servers=serving.servers, tokens=had)
    rollout = seconds.rollout_seconds(size, work, serving, speed)
    beside = passes + optimizer + speed.other_s  # in a sync servers stand still
    waiting = rollout if work.staleness == 0 else max(0.0, rollout - beside)
    if serving.shared and work.staleness:
        at_once = min(passes, rollout)  # both take turns, and each gets half
        waiting, passes = rollout - at_once, passes + at_once
    return StepParts(rollout, waiting, passes, optimizer, sync, speed.other_s)


@dataclass(frozen=True)
class GPUUse:
    """What one GPU is for.

    Attributes:
        index: Of the GPU.
        training: What the trainer takes by part, in bytes; empty where it does not use it.
        serving: What servers take by part; empty where none does, or nobody knows.
        num_servers: On it.
    """

    index: int
    training: dict[str, int]
    serving: dict[str, int]
    num_servers: int

    @property
    def taken(self) -> int:
        """Bytes of it."""
        return sum(self.training.values()) + sum(self.serving.values())


@dataclass(frozen=True)
class Change:
    """Options to add to the command, and what a plan with them says.

    Attributes:
        options: Of `fit`.
        fits: Whether it fits with them.
        taken: Bytes of the fullest GPU.
        step: Seconds; None where it is not known.
    """

    options: str
    fits: bool
    taken: int
    step: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        gpus: What each is for.
        process: Bytes of the trainer's process where it trains on the CPU; 0 where it does not.
        problems: Why it does not fit; none where it does.
        servers: What was chosen for them, in words.
        parts: Seconds of a rollout batch by part; None where the hardware's speed is not known.
        changes: What to change first.
    """

    gpus: list[GPUUse]
    process: int
    problems: list[str]
    servers: list[str]
    parts: StepParts | None
    changes: list[Change] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """Bytes of the fullest GPU."""
        return max((gpu.taken for gpu in self.gpus), default=0)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self) | {"fits": not self.problems}
        if self.parts is not None:
            found["parts"]["step"] = self.parts.step
        return found


def make_plan(facts: RunFacts) -> Plan:
    """Plan a run, with what to change first."""
    plan = _plan(facts)
    named = _ways_to_fit(facts) if plan.problems else _ways_to_speed(facts)
    changes = [_tried(options, changed) for options, changed in named]
    if plan.problems:
        fitting = {_names(change): change for change in reversed(changes) if change.fits}
        return replace(plan, changes=list(reversed(fitting.values()))[:2])
    now = plan.parts.step if plan.parts is not None else 0.0
    faster = [c for c in changes if c.fits and c.step is not None and c.step < FASTER * now]
    return replace(plan, changes=sorted(faster, key=lambda change: change.step or 0.0)[:2])


def _names(change: Change) -> tuple[str, ...]:
    """Of its options: of several values of them the first that fits is enough."""
    return tuple(word for word in change.options.split() if word.startswith("--"))


def _tried(options: str, facts: RunFacts) -> Change:
    plan = _plan(facts)
    step = plan.parts.step if plan.parts is not None else None
    return Change(options, not plan.problems, plan.taken, step)


def _plan(facts: RunFacts) -> Plan:
    memory = memory_of(facts)
    layout, problems = None, []
    if isinstance(facts.servers, SGLangServers):
        try:
            layout = layout_of(facts, memory)
        except ServersTooLargeError as error:
            problems.append(error.sentence)
    gpus = _uses(facts, memory, layout)
    room = USABLE * facts.machine.gpu_bytes
    for gpu in gpus:
        if room and not problems and gpu.taken > room:
            whose = {f"the trainer's {part}": taken for part, taken in gpu.training.items()}
            whose |= {f"the servers' {part}": taken for part, taken in gpu.serving.items()}
            most = max(whose, key=lambda part: whose[part])
            problems.append(
                f"GPU {gpu.index} has {facts.machine.gpu_bytes / GIB:.0f} GiB and would need "
                f"{gpu.taken / GIB:.0f}, most of it ({whose[most] / GIB:.0f}) for {most}"
            )
    words = list(layout.size.notes) if layout is not None and layout.size is not None else []
    parts = None if problems else _parts(facts, layout)
    process = 0 if facts.training else PROCESS_BYTES + memory.allocated
    return Plan(gpus, process, problems, words, parts)


def memory_of(facts: RunFacts) -> TrainingMemory:
    """What a rank takes at most."""
    work = facts.work
    bounded = facts.setup.bounded(work.completions // work.minibatches, facts.load.context_tokens)
    return training_memory(facts.size, bounded)


def layout_of(facts: RunFacts, memory: TrainingMemory) -> ServerLayout:
    """What the servers would be, by their own choice.

    Raises:
        ServersTooLargeError: They don't fit.
    """
    servers = copy.copy(facts.servers)
    assert isinstance(servers, SGLangServers)
    work = facts.work
    servers.machine = facts.machine
    servers.load = replace(
        facts.load,
        in_flight=work.completions * (work.staleness + 1),
        batch=work.completions,
        trainer_bytes=memory.total,
    )
    return servers.layout()


def _uses(facts: RunFacts, memory: TrainingMemory, layout: ServerLayout | None) -> list[GPUUse]:
    groups = layout.groups if layout is not None else []
    serving = _server_bytes(facts, layout) if layout is not None else {}
    found = []
    for index in sorted({*facts.training, *(device for group in groups for device in group)}):
        count = sum(index in group for group in groups)
        parts = {part: taken for part, taken in memory.parts.items() if taken}
        trains = parts if index in facts.training else {}
        found.append(GPUUse(index, trains, serving if count else {}, count))
    return found


def _server_bytes(facts: RunFacts, layout: ServerLayout) -> dict[str, int]:
    """What the servers of one GPU take of it by part; empty where nobody knows."""
    size, fraction = layout.size, getattr(facts.servers, "memory_fraction", None)
    if size is None:
        return {}
    found = {"weights": size.weight_bytes, "cache": size.cache_bytes}
    found["graphs, logits, kernels"] = size.overhead_bytes
    if fraction is not None:  # the user's own
        found = {"weights and cache": int(fraction * facts.machine.gpu_bytes)}
        found["graphs, logits, kernels"] = MIN_OVERHEAD
    return {part: layout.per_gpu * taken for part, taken in found.items() if taken}


def _parts(facts: RunFacts, layout: ServerLayout | None) -> StepParts | None:
    if facts.speed is None:
        return None
    serving = Serving(1, max(1, facts.load.batch), shared=facts.machine.cores == 1)
    if isinstance(facts.servers, EmbeddedServers):
        running = facts.servers.max_running_requests
        serving = replace(serving, servers=facts.servers.num_servers, running=running)
    elif layout is not None and layout.size is not None:
        running, cache = layout.size.running, layout.size.flags.get("max-total-tokens")
        if cache:
            running = min(running, int(cache / (facts.work.prompt + facts.work.completion)))
        tp = len(layout.groups[0]) or 1
        shared = bool({device for group in layout.groups for device in group} & {*facts.training})
        serving = Serving(len(layout.groups), max(1, running), layout.per_gpu, tp, shared)
    return step_parts(facts.size, facts.setup, facts.work, serving, facts.speed)


# -- what to change first --------------------------------------------------------------------------

_CHECKPOINTING = "--model.gradient_checkpointing true"
_TOKENS = "--model.max_tokens_per_microbatch"


def _ways_to_fit(facts: RunFacts) -> Iterator[tuple[str, RunFacts]]:
    """From what changes least to what changes most."""
    setup, servers = facts.setup, facts.servers
    if not setup.checkpointing:
        yield _CHECKPOINTING, replace(facts, setup=replace(setup, checkpointing=True))
    tokens = setup.max_tokens // 2
    while tokens >= max(LEAST_TOKENS, facts.load.context_tokens or 0):
        less = replace(setup, max_tokens=tokens)
        yield f"{_TOKENS} {tokens}", replace(facts, setup=less)
        if not setup.checkpointing:
            both = replace(less, checkpointing=True)
            yield f"{_CHECKPOINTING} {_TOKENS} {tokens}", replace(facts, setup=both)
        tokens //= 2
    if isinstance(servers, SGLangServers):
        tp = 2 * servers.tp
        if facts.machine.gpus > tp:
            wider = copy.copy(servers)
            wider.tp = tp
            yield f"--data.servers.tp {tp}", replace(facts, servers=wider)
    least = replace(setup, checkpointing=True, max_tokens=min(setup.max_tokens, 4 * LEAST_TOKENS))
    if setup.sharded and not setup.offloaded:
        strategy = "lightning_grpo.FSDP2Strategy --trainer.strategy.cpu_offload true"
        options = f"{_CHECKPOINTING} {_TOKENS} {least.max_tokens} --trainer.strategy {strategy}"
        yield options, replace(facts, setup=replace(least, offloaded=True))
    context, longest = facts.load.context_tokens, int(facts.work.longest)
    if context is not None and longest > 1:
        shorter = replace(facts.load, context_tokens=context - longest // 2)
        work = replace(facts.work, longest=longest // 2)
        work = replace(work, completion=min(work.completion, longest // 2))
        options = f"{_CHECKPOINTING} {_TOKENS} {least.max_tokens}"
        options += f" --data.workflow.init_args.sampling.max_new_tokens {longest // 2}"
        yield options, replace(facts, setup=least, load=shorter, work=work)


def _ways_to_speed(facts: RunFacts) -> Iterator[tuple[str, RunFacts]]:
    """What fits and costs nothing but memory, or trains on older tokens."""
    setup, work = facts.setup, facts.work
    if work.staleness == 0:
        yield "--data.max_staleness 1", replace(facts, work=replace(work, staleness=1))
    if setup.checkpointing:
        options = "--model.gradient_checkpointing false"
        yield options, replace(facts, setup=replace(setup, checkpointing=False))
    if facts.training and not setup.half:
        sharded = replace(setup, sharded=True, half=True, keeps=setup.ranks == 1)
        yield "--trainer.strategy fsdp2", replace(facts, setup=sharded)
    if facts.training and not setup.compiled:
        yield "--model.compile true", replace(facts, setup=replace(setup, compiled=True))
    more = replace(setup, max_tokens=2 * setup.max_tokens)
    yield f"{_TOKENS} {more.max_tokens}", replace(facts, setup=more)
    if isinstance(facts.servers, SGLangServers):
        yield from _other_servers(facts, facts.servers)


def _other_servers(facts: RunFacts, servers: SGLangServers) -> Iterator[tuple[str, RunFacts]]:
    """One server on each GPU, and more or fewer GPUs that serve."""
    if servers.num_servers is None:
        single = copy.copy(servers)
        single.num_servers = len(servers.planned_devices) // servers.tp
        options = f"--data.servers.num_servers {single.num_servers}"
        yield options, replace(facts, servers=single)
    setup, present = facts.setup, facts.machine.present
    is_default = setup.keeps == (setup.ranks == 1)
    for split in range(1, len(present) if len(facts.training) == facts.setup.ranks else 0):
        if split == len(facts.training) or (len(present) - split) % servers.tp:
            continue
        other = copy.copy(servers)
        other.devices = present[split:]
        training = tuple(present[:split])
        there = replace(setup, ranks=split, keeps=split == 1 if is_default else setup.keeps)
        options = f"--data.servers.devices [{','.join(map(str, other.devices))}]"
        yield options, replace(facts, servers=other, training=training, setup=there)
