"""What a run would take of its machine, how long its steps would be, and what to change first."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_grpo.plan.hardware import (
    MIB,
    Serving,
    Speed,
    Workload,
    optimizer_seconds,
    rollout_seconds,
    scoring_seconds,
    sync_seconds,
    training_seconds,
)
from lightning_grpo.policy.size import (
    ModelSize,
    TrainingMemory,
    TrainingSetup,
    kept_numbers,
    training_memory,
)
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
    passes = training_seconds(size, setup, micro_batches, predicted, speed) * work.steps
    scoring = scoring_seconds(size, setup, micro_batches, predicted, speed)
    passes += work.scorings * work.minibatches * scoring
    optimizer = optimizer_seconds(size, setup, speed) * work.steps
    in_flight = min(work.completions * work.staleness, serving.servers * serving.running)
    had = work.completion / 2
    sync = sync_seconds(size, setup, in_flight, speed, servers=serving.servers, tokens=had)
    rollout = rollout_seconds(size, work, serving, speed)
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
        uneven = split % setup.row_ranks or (len(present) - split) % servers.tp
        if split == len(facts.training) or uneven:
            continue
        other = copy.copy(servers)
        other.devices = present[split:]
        training = tuple(present[:split])
        there = replace(setup, ranks=split, keeps=split == 1 if is_default else setup.keeps)
        options = f"--data.servers.devices [{','.join(map(str, other.devices))}]"
        yield options, replace(facts, servers=other, training=training, setup=there)


# -- a plan in words -------------------------------------------------------------------------------

WIDTH = 80
_FEW = 2
_MINUTE, _HUNDRED = 60.0, 100.0
_LOST = 1 / 6
"""13 of 80 GiB, seen once on an H200 (`h200_async_run.json`)."""


def describe(plan: Plan, facts: RunFacts, title: str, assumed: Sequence[str]) -> str:
    """The whole page."""
    lines = [title, "", *_verdict(plan, facts)]
    for role in ((True, True), (True, False), (False, True)):
        alike = [gpu for gpu in plan.gpus if (bool(gpu.training), gpu.num_servers > 0) == role]
        lines += ["", *_gpu(alike, facts)] if alike else []
    if plan.servers and not plan.problems:
        lines.append(_row("", "servers", f"each: {'; '.join(plan.servers)}"))
    if plan.parts is not None:
        lines += ["", *_step(plan, facts)]
    lines += ["", "Assumed", *(line for text in assumed for line in _item(text))]
    if plan.changes:
        head = "Change first" if plan.problems else "Faster"
        lines += ["", head, *(line for each in plan.changes for line in _item(_change(each)))]
    return "\n".join(lines) + "\n"


def _verdict(plan: Plan, facts: RunFacts) -> list[str]:
    if plan.problems:
        said = f"It does not fit: {' '.join(plan.problems)}"
        if not plan.changes:
            said += " No change of one or two options makes it fit: more GPUs, or a smaller model."
        return textwrap.wrap(said, WIDTH)
    fits = "It fits." if facts.training else "It runs on the CPU."
    room = facts.machine.gpu_bytes
    spare = (_LOST * sum(gpu.training.values()) + gpu.taken for gpu in plan.gpus)
    if facts.training and max(spare) > room:
        fits = "It fits narrowly: torch may lose a sixth of what training takes to fragments."
    if facts.training and not room:
        fits = "Whether it fits is not known: the driver does not tell the GPU's memory."
    if plan.parts is None:
        said = f"{fits} How long a step takes is not known of this GPU, or of these servers."
        return textwrap.wrap(said, WIDTH)
    tokens = facts.work.completions * facts.work.completion / plan.parts.step
    said = f"{fits} A step takes about {_seconds(plan.parts.step)}, {tokens:,.0f} tokens/s."
    if facts.work.staleness and not any(g.training and g.num_servers for g in plan.gpus):
        said += f" The limit is the {'servers' if plan.parts.waiting else 'trainer'}."
    if plan.process:
        said += f" The trainer's process takes {plan.process / GIB:.1f} GiB at most."
    return textwrap.wrap(said, WIDTH)


def _gpu(alike: list[GPUUse], facts: RunFacts) -> Iterator[str]:
    """GPUs with one task."""
    gpu, s = alike[0], "s" * (len(alike) == 1)
    trains, serves = f"train{s}" * bool(gpu.training), f"serve{s}" * bool(gpu.num_servers)
    indices = [each.index for each in alike]
    named = ", ".join(map(str, indices))
    if len(indices) > _FEW and indices[-1] - indices[0] == len(indices) - 1:
        named = f"{indices[0]} to {indices[-1]}"
    name = f"GPU{'s' * (not s)} {named}"
    room = f" of {facts.machine.gpu_bytes / GIB:.0f}" if facts.machine.gpu_bytes else ""
    each = "" if s else " each"
    does = " and ".join(word for word in (trains, serves) if word)
    yield f"{name} {does}: {gpu.taken / GIB:.0f}{room} GiB{each}"
    for part, taken in gpu.training.items():
        yield _row(f"{taken / GIB:.1f}", part, _training_words(part, facts))
    for part, taken in gpu.serving.items():
        servers = "the server" if gpu.num_servers == 1 else f"{gpu.num_servers} servers"
        yield _row(f"{taken / GIB:.1f}", f"{part} of {servers}", "")


def _training_words(part: str, facts: RunFacts) -> str:
    size, setup, work = facts.size, facts.setup, facts.work
    tokens = setup.bounded(work.completions // work.minibatches, facts.load.context_tokens)
    sharded = f", over {setup.shards} GPUs" if setup.shards > 1 else ""
    each = size.layers * kept_numbers(size, compiled=setup.compiled) * setup.bytes_each / MIB
    together = f", over {setup.row_ranks} GPUs" if setup.row_ranks > 1 else ""
    kept = f"{tokens.max_tokens:,} tokens in a micro-batch x {each:.1f} MiB{together}"
    if setup.checkpointing:
        kept = f"{tokens.max_tokens:,} tokens{together}: blocks' inputs, and one block's own"
    return {
        "weights": f"{size.parameters / 1e9:.2f}B parameters in fp32{sharded}",
        "gradients": "fp32, summed over micro-batches, whole on each rank",
        "optimizer": f"Adam's two moments in fp32{sharded}",
        "copies": "the weights in bf16: to compute with, and to send",
        "reference": "the KL penalty's, in fp32",
        "activations": kept,
        "logits": f"of one chunk of tokens x {size.vocab:,}, five times in fp32",
        "context": "CUDA's own, and what the allocator can't use",
    }[part]


def _step(plan: Plan, facts: RunFacts) -> Iterator[str]:
    parts, work = plan.parts, facts.work
    assert parts is not None
    yield f"A step of {work.batch} prompts x {work.group} completions, in seconds"
    rate = work.completions * work.completion / parts.rollout
    overlap = "while the trainer works" if work.staleness else "nothing runs beside them"
    yield _row(_number(parts.rollout), "rollouts", f"{rate:,.0f} tokens/s; {overlap}")
    idle = f"{parts.waiting / parts.step:.0%} of the step the trainer is idle"
    yield _row(_number(parts.waiting), "waiting", idle)
    packed = work.micro_batches(facts.setup)
    words = f"{len(packed) * work.steps} micro-batches a rank"
    if work.scorings:
        words += f", and {work.scorings} more forward pass{'es' * (work.scorings > 1)}"
    if (
        parts.forward_backward > 0
        and work.staleness
        and any(g.training and g.serving for g in plan.gpus)
    ):
        words += ", slowed by rollouts on the same GPU"
    yield _row(_number(parts.forward_backward), "forward/backward", words)
    yield _row(_number(parts.optimizer), "optimizer", f"{work.steps} step{'s' * (work.steps > 1)}")
    yield _row(_number(parts.sync), "weight sync", "weights to the servers, and their proof")
    yield _row(_number(parts.other), "the rest", "packing, logging, recording")


def _change(change: Change) -> str:
    says = [f"{change.taken / GIB:.0f} GiB at most of a GPU"] if change.taken else []
    if change.step is not None:
        says.append(f"{_seconds(change.step)} a step")
    return f"{change.options}: then {' and '.join(says)}"


@dataclass(frozen=True)
class Compared:
    """One line of `plan --check`.

    Attributes:
        what: Was predicted.
        predicted: By the plan.
        measured: By the run.
        unit: Of both.
    """

    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None where that is nothing."""
        return self.predicted / self.measured if self.measured else None


def describe_check(lines: Sequence[Compared], title: str, notes: Sequence[str]) -> str:
    """Predicted beside measured."""
    out = [title, "", f"{'':<26}{'predicted':>12}{'measured':>12}   predicted/measured"]
    for line in lines:
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        figures = f"{_number(line.predicted):>12}{_number(line.measured):>12}"
        out.append(f"{line.what:<26}{figures} {line.unit:<9}{ratio:>9}")
    out += ["", *(wrapped for note in notes for wrapped in _item(note))]
    return "\n".join(out) + "\n"


def _row(figure: str, name: str, words: str) -> str:
    line = f"{figure:>8}  {name:<17} {words}"
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * 28))


def _item(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _number(value: float) -> str:
    """With three digits that count."""
    digits = next((n for n, least in enumerate((_HUNDRED, 10.0)) if value >= least), 2)
    return f"{value:,.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value / _MINUTE:.1f} min" if value >= 2 * _MINUTE else f"{_number(value)} s"
