"""Held-out prompts as a validation dataloader; the trainer waits, the servers don't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed

from lightning_grpo.evaluation import (
    Evaluation,
    EvaluationRecord,
    PromptMean,
    sampled_metrics,
)
from lightning_grpo.types import Group


@dataclass(frozen=True)
class EvaluationBatch:
    """Some held-out prompts, answered.

    Attributes:
        name: The validation set; empty if there is only one.
        sampled: Rewards of the sampled completions, fp64 `[prompts, k]`, or None.
        greedy: Reward of the greedy completion, fp64 `[prompts]`, or None.
        groups: The trajectories (greedy last); rank 0 only, else empty.
        majority: Reward of the most common sampled answer, fp64 `[prompts]`, or None.
    """

    name: str
    sampled: Tensor | None
    greedy: Tensor | None
    groups: list[Group]
    majority: Tensor | None = None


Answer = Callable[[str, int, int], EvaluationBatch]
"""`(set name, first row, last row) -> batch`, called on all ranks at the same point."""


class EvaluationLoader:
    """One validation set in chunks, answered one chunk ahead of the trainer's reading.

    Args:
        name: Which set.
        num_prompts: How many prompts it has.
        chunk: Prompts of one batch.
        ask: Starts a chunk: `(name, first, last)`.
        answer: Waits for a chunk that was started.
        limit: Chunks that will be read, or which part of them, as the Trainer's limits say it;
            None: all.
        per_prompt: Completions of each prompt.

    Attributes:
        num_answers: Completions of all prompts that will be asked.
    """

    def __init__(
        self,
        name: str,
        num_prompts: int,
        chunk: int,
        ask: Callable[[str, int, int], None],
        answer: Answer,
        limit: float | None = None,
        per_prompt: int = 1,
    ) -> None:
        self.name = name
        self._bounds = [(i, min(i + chunk, num_prompts)) for i in range(0, num_prompts, chunk)]
        self._ask = ask
        self._answer = answer
        part = 1.0 if limit is None else limit
        self._limit = int(part * len(self._bounds)) if isinstance(part, float) else part
        self.num_answers = per_prompt * sum(b - a for a, b in self._bounds[: self._limit])

    def __len__(self) -> int:
        """Batches of this set."""
        return len(self._bounds)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Ask for the next chunk before waiting for this one, so that the servers stay busy."""
        bounds = self._bounds[: self._limit]
        if bounds:
            self._ask(self.name, *bounds[0])
        for k, (first, last) in enumerate(bounds):
            if k + 1 < len(bounds):
                self._ask(self.name, *bounds[k + 1])
            yield self._answer(self.name, first, last)


class AnswersPrompts(Protocol):
    """A session of rollouts, as far as validation needs one."""

    num_val_prompts: dict[str, int]

    def ask(self, name: str, first: int, last: int) -> None:
        """Start to answer prompts `first` to `last` (exclusive)."""

    def answer(self, name: str, first: int, last: int) -> EvaluationBatch:
        """Wait for prompts that were asked."""


def evaluation_loaders(
    session: AnswersPrompts, chunk: int, limit: float | None, per_prompt: int = 1
) -> list[EvaluationLoader]:
    """One loader for each set of held-out prompts; see `EvaluationLoader`."""
    return [
        EvaluationLoader(name, count, chunk, session.ask, session.answer, limit, per_prompt)
        for name, count in session.num_val_prompts.items()
    ]


class EvaluationMeans:
    """The metrics of one validation, collected batch by batch.

    Args:
        evaluation: What is sampled for each prompt.
        prefix: What the metrics' names begin with.
    """

    def __init__(self, evaluation: Evaluation, prefix: str = "eval") -> None:
        self._evaluation = evaluation
        self._prefix = prefix
        self._means: dict[str, PromptMean] = {}
        self._groups: dict[str, list[Group]] = {}

    def update(self, batch: EvaluationBatch) -> None:
        """Add the scores of some prompts."""
        prefix = f"{self._prefix}/{batch.name}/" if batch.name else f"{self._prefix}/"
        scores: dict[str, Tensor] = {}
        if batch.sampled is not None:
            scores |= sampled_metrics(batch.sampled, self._evaluation.pass_threshold)
        if batch.majority is not None:
            scores[f"maj_at_{self._evaluation.num_samples}"] = batch.majority
        if batch.greedy is not None:
            scores["greedy"] = batch.greedy
        for name, per_prompt in scores.items():
            self._means.setdefault(prefix + name, PromptMean()).update(per_prompt)
        self._groups.setdefault(batch.name, []).extend(batch.groups)

    def record(self, step: int) -> EvaluationRecord:
        """The means with half of their 95 % confidence intervals (`..._ci95`)."""
        metrics: dict[str, float] = {}
        for name, mean in self._means.items():
            metrics[name] = float(mean.compute())
            metrics[f"{name}_ci95"] = mean.half_width()
        return EvaluationRecord(step, metrics, self._groups)


def joined_groups(groups: list[list[Group]]) -> list[Group]:
    """One group per prompt: sampled trajectories first, the greedy one last."""
    if len(groups) < 2 or not groups[0]:  # noqa: PLR2004 - sampled and greedy
        return groups[0] if groups else []
    return [
        Group(a.prompt, (*a.trajectories, *b.trajectories), a.admitted_version)
        for a, b in zip(*groups, strict=True)
    ]


class EvaluatedModule(L.LightningModule):
    """The validation (and test) loop of a module whose data module answers held-out prompts."""

    _loaded_step: int | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the checkpoint's step: without `fit` the Trainer doesn't."""
        self._loaded_step = int(checkpoint["global_step"])

    def on_validation_epoch_start(self) -> None:
        """Start new means."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        tests = self.trainer.state.fn == TrainerFn.TESTING and data.test_prompts
        self._means = EvaluationMeans(data.evaluation, "test" if tests else "eval")

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the scores of some held-out prompts; every rank has all of them."""
        self._means.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means with half of their 95 % confidence intervals, and keep the record."""
        step, self._loaded_step = self._loaded_step, None
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if step is None or fitting:
            step = self.global_step
        record = self._means.record(step)
        # Equal on all ranks already; Lightning would warn of what is not reduced, where there is
        # a process group, if only of one rank.
        # In training's curve at its step; Lightning would count one less.
        logged = record.metrics | ({"step": float(step)} if fitting else {})
        self.log_dict(logged, sync_dist=distributed.is_initialized())
        self.trainer.datamodule.evaluations.append(record)  # type: ignore[attr-defined]

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
