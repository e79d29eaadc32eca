"""A plan, and how it came out, as a page of a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_grpo.plan.plan import GIB, Change, GPUUse, Plan, RunFacts
from lightning_grpo.policy.size import kept_numbers

WIDTH = 80
_MIB = 1 << 20
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
    each = size.layers * kept_numbers(size, compiled=setup.compiled) * setup.bytes_each / _MIB
    kept = f"{tokens.max_tokens:,} tokens in a micro-batch x {each:.1f} MiB"
    if setup.checkpointing:
        kept = f"{tokens.max_tokens:,} tokens: blocks' inputs, and one block's own"
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
