"""Held-out prompts: their settings, their scores, and how a validation runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed
from torchmetrics import Metric

from lightning_grpo.errors import MOST, MOST_SAMPLES, ConfigError, require_number
from lightning_grpo.rollout.workflow import check_stop, sampling_of
from lightning_grpo.types import CI_HIGH, CI_LOW, Group, Sampling


@dataclass(frozen=True)
class Evaluation:
    """What validation samples for each held-out prompt.

    Args:
        num_samples: Sampled completions (k of avg@k and pass@k).
        greedy: Whether to answer each prompt once more at temperature 0.
        sampled: Whether to take the `num_samples` sampled completions at all.
        sampling: How held-out prompts are sampled, all of it; `top_p`, `top_k` and
            `min_new_tokens` are allowed here. Greedy answers take its lengths and stops. A call
            that ends earlier than its workflow's `sampling` (an agent's `max_tokens`) still does.
            None: as in training.
        pass_threshold: Reward from which a completion counts as right in pass@k.
        extract_answer: What a completion's text answers (a text, a number), or None where it
            answers nothing; then maj@k is logged: the reward of the most common answer. For
            mathematics `lightning_grpo.rewards.answers.last_boxed` or
            `lightning_grpo.rewards.answers.final_number`.
    """

    num_samples: int = 1
    greedy: bool = True
    sampled: bool = True
    pass_threshold: float = 0.5
    extract_answer: Callable[[str], Any] | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        """Refuse an evaluation that samples nothing, or the same again and again."""
        require_number(
            "evaluation.num_samples",
            self.num_samples,
            least=1,
            most=MOST_SAMPLES,
            whole=True,
            way_out="For greedy answers alone set `evaluation.sampled: false`.",
        )
        require_number("evaluation.pass_threshold", self.pass_threshold, least=-MOST)
        if not (self.greedy or self.sampled):
            raise ConfigError(
                "`evaluation` must sample something, got greedy: false and sampled: false. "
                "To skip validation set `trainer.limit_val_batches: 0`."
            )
        if self.sampling is None:
            return
        object.__setattr__(self, "sampling", sampling_of(self.sampling, "evaluation.sampling"))
        check_stop(self.sampling, "evaluation.sampling")
        if self.sampled and self.num_samples > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                "`evaluation.sampling.temperature` must be > 0 for more than one sample (they "
                f"would be equal), got 0.0 and num_samples: {self.num_samples}. For greedy answers "
                "set `evaluation.greedy: true`."
            )

    @property
    def num_answers(self) -> int:
        """Completions of each prompt."""
        return self.num_samples * int(self.sampled) + int(self.greedy)


@dataclass(frozen=True)
class EvaluationRecord:
    """One finished validation.

    Attributes:
        step: Optimizer steps taken before it.
        metrics: Logged values by name (`eval/avg_at_1`, ...).
        groups: Sampled (and greedy) trajectories by validation set; rank 0 only, else empty.
    """

    step: int
    metrics: dict[str, float]
    groups: dict[str, list[Group]] = field(default_factory=dict)


def pass_at_k(num_samples: Tensor, num_right: Tensor, k: int) -> Tensor:
    """The unbiased estimate of the chance that one of `k` samples is right, per prompt.

    Args:
        num_samples: Samples taken, int64 `[prompts]`, each >= k.
        num_right: How many of them are right, int64 `[prompts]`.
        k: Samples allowed.

    Returns:
        fp64 `[prompts]`: `1 - C(n - c, k) / C(n, k)`.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    n, c = num_samples.double(), num_right.double()
    # log C(n-c, k) - log C(n, k) through lgamma, exact enough for any n met here.
    wrong = (n - c).clamp_min(0)
    possible = wrong >= k
    log_ratio = (
        torch.lgamma(wrong + 1)
        - torch.lgamma((wrong - k).clamp_min(0) + 1)
        - torch.lgamma(n + 1)
        + torch.lgamma(n - k + 1)
    )
    return torch.where(possible, 1 - log_ratio.exp(), torch.ones_like(n))


def majority_reward(answers: Sequence[Hashable | None], rewards: Sequence[float]) -> float:
    """The reward of the most common answer of one prompt's completions.

    Answers that tie are drawn from at random, so theirs is averaged; completions with the same
    answer may differ in reward, so that is, too. No answer at all: 0.

    Args:
        answers: One of each completion; None does not vote.
        rewards: One of each completion.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    earned = [r for a, r in zip(answers, rewards, strict=True) if a in tied]
    # Each tied answer has the same number of votes, so one mean is the mean of their means.
    return sum(earned) / len(earned)


class PromptMean(Metric):
    """The mean over prompts of one number per prompt, with its 95 % confidence interval.

    The interval treats prompts as the sample: it covers both the choice of prompts and the noise
    of sampling, so that several samples of a prompt count as one number, their mean.

    Fractions of right answers, and chances of one, lie between 0 and 1 by what they are. Theirs is
    Wilson's interval, which lies there, too, with the numbers' own variance in the place of
    p (1 - p); for one answer to each prompt that is the same. All right or all wrong is no proof
    that the next one will be. Of other numbers the range is not known, also where all that were
    seen lie between 0 and 1: theirs is the normal approximation, and none (nan) if all are equal,
    since nothing says how far another could lie.

    Source: Wilson 1927, JASA 22, 209-212.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor
    others: Tensor
    least: Tensor
    most: Tensor

    def __init__(self) -> None:
        # Every rank has the scores of all prompts already. Gathering them would fail, too, where
        # the ranks' group moves GPU tensors only, also on a single rank.
        super().__init__(sync_on_compute=False)
        for name in ("total", "squares", "count", "others"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name, start in (("least", math.inf), ("most", -math.inf)):
            reduced = "min" if name == "least" else "max"
            self.add_state(name, torch.tensor(start, dtype=torch.float64), dist_reduce_fx=reduced)

    def update(self, values: Tensor, are_fractions: bool) -> None:
        """Add one number per prompt.

        Args:
            values: `[prompts]`.
            are_fractions: Whether each is a fraction of right answers, or a chance of one.
        """
        if not values.numel():
            return
        values = values.double()
        self.total += values.sum()
        self.squares += (values * values).sum()
        self.count += values.numel()
        self.others += 0 if are_fractions else values.numel()
        self.least = torch.minimum(self.least, values.min())
        self.most = torch.maximum(self.most, values.max())

    def compute(self) -> Tensor:
        """The mean; nan before the first update."""
        return self.total / self.count

    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % confidence interval; nan where there is none."""
        n, least, most = float(self.count), float(self.least), float(self.most)
        if n < 2:  # noqa: PLR2004 - a variance needs two
            return math.nan, math.nan
        mean = float(self.total) / n
        variance = max(float(self.squares) / n - mean * mean, 0.0) if least < most else 0.0
        if not float(self.others):
            center = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
            half = _Z / (1 + _Z**2 / n) * math.sqrt(variance / n + _Z**2 / (4 * n**2))
            # Of all right the end is 1 and its rounding.
            return max(center - half, 0.0), min(center + half, 1.0)
        half = _Z * math.sqrt(variance / (n - 1)) if least < most else math.nan
        return mean - half, mean + half


_Z = 1.959963984540054
"""The quantile of the normal distribution that leaves 2.5 % on each side."""


def score_matrix(groups: list[Group], num_samples: int) -> Tensor:
    """Rewards of sampled completions, fp64 `[prompts, num_samples]`."""
    rows = [[t.reward for t in g.trajectories[:num_samples]] for g in groups]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(groups), num_samples)


@dataclass(frozen=True)
class Scores:
    """What some prompts' completions came to; small, and the same on every rank.

    Attributes:
        sampled: Rewards of the sampled completions, fp64 `[prompts, k]`, or None.
        greedy: Reward of the greedy completion, fp64 `[prompts]`, or None.
        majority: Reward of the most common sampled answer, fp64 `[prompts]`, or None.
    """

    sampled: Tensor | None = None
    greedy: Tensor | None = None
    majority: Tensor | None = None


def score_groups(
    sampled: list[Group] | None, greedy: list[Group] | None, evaluation: Evaluation
) -> Scores:
    """The scores of groups, one group for each prompt.

    Args:
        sampled: With `num_samples` trajectories each.
        greedy: With one each.
        evaluation: What was sampled, and how answers are read.
    """
    majority = None
    if sampled is not None and evaluation.extract_answer is not None and evaluation.num_samples > 1:
        majority = torch.tensor(
            [_majority(group, evaluation.extract_answer) for group in sampled], dtype=torch.float64
        )
    return Scores(
        None if sampled is None else score_matrix(sampled, evaluation.num_samples),
        None if greedy is None else score_matrix(greedy, 1).squeeze(1),
        majority,
    )


def _majority(group: Group, extract_answer: Callable[[str], Any]) -> float:
    answers = [extract_answer(trajectory.text) for trajectory in group.trajectories]
    return majority_reward(answers, [trajectory.reward for trajectory in group.trajectories])


def sampled_metrics(rewards: Tensor, threshold: float) -> dict[str, Tensor]:
    """Per-prompt values of avg@k and pass@j for every power of two j <= k.

    Args:
        rewards: `[prompts, k]`.
        threshold: Reward from which a completion is right.

    Returns:
        `{"avg_at_k": [prompts], "pass_at_j": [prompts], ...}`, with the numbers in the names.
    """
    k = rewards.shape[1]
    values = {f"avg_at_{k}": rewards.mean(dim=1)}
    n = torch.full((rewards.shape[0],), k)
    right = (rewards >= threshold).sum(dim=1)
    j = 2
    while j <= k:
        values[f"pass_at_{j}"] = pass_at_k(n, right, j)
        j *= 2
    if k > 1 and f"pass_at_{k}" not in values:
        values[f"pass_at_{k}"] = pass_at_k(n, right, k)
    return values


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
        rewards = [each for each in (batch.sampled, batch.greedy) if each is not None]
        binary = all(bool(((each == 0) | (each == 1)).all()) for each in rewards)
        scores: dict[str, Tensor] = {}
        if batch.sampled is not None:
            scores |= sampled_metrics(batch.sampled, self._evaluation.pass_threshold)
        if batch.majority is not None:
            scores[f"maj_at_{self._evaluation.num_samples}"] = batch.majority
        if batch.greedy is not None:
            scores["greedy"] = batch.greedy
        for name, per_prompt in scores.items():
            mean = self._means.setdefault(prefix + name, PromptMean())
            mean.update(per_prompt, binary or name.startswith("pass_at_"))
        self._groups.setdefault(batch.name, []).extend(batch.groups)

    def record(self, step: int) -> EvaluationRecord:
        """The means with both ends of their 95 % confidence intervals."""
        metrics: dict[str, float] = {}
        for name, mean in self._means.items():
            metrics[name] = float(mean.compute())
            metrics[name + CI_LOW], metrics[name + CI_HIGH] = mean.interval()
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
        """Log the means with their 95 % confidence intervals, and keep the record."""
        step, self._loaded_step = self._loaded_step, None
        if self.trainer.state.fn == TrainerFn.FITTING:
            step = self.global_step
        at = {} if step is None else {"step": float(step)}
        step = self.global_step if step is None else step
        record = self._means.record(step)
        # Equal on all ranks already; Lightning would warn of what is not reduced, where there is
        # a process group, if only of one rank.
        # At its step of the curve: Lightning counts one less, and without `fit` none.
        self.log_dict(record.metrics | at, sync_dist=distributed.is_initialized())
        self.trainer.datamodule.evaluations.append(record)  # type: ignore[attr-defined]

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
