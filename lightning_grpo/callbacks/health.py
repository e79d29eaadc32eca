"""HealthMonitor: what is wrong with a run, in one line, once."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.screen import waiting_fraction
from lightning_grpo.contract import Rolling, logged_numbers
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import require_seconds
from lightning_grpo.loader import Minibatch

log = logging.getLogger(__name__)

Window = Sequence[Mapping[str, float]]
"""Metrics of the last rollout batches, oldest first."""

BASELINE = "health/mismatch_baseline"
"""The run's first `mismatch/abs_logprob_diff`: alarms are relative to it."""

GROUPS = "health/groups"
"""Groups of the rollout batch, to hold counts against."""

ENOUGH, MORE, WAITING = "health/servers_enough", "health/servers_more", "health/trainer_waiting"
"""How many servers would do, how many more would help, and the trainer's share of waiting for
them: said of servers that come and go."""

_IDLE, _BUSY = 0.3, 0.1
"""Who waits for the other so much of its time, and who so little, that servers are too many, or too
few. Where both wait in turn, as without staleness, their number is not to blame."""
_MISMATCH_FACTOR, _MISMATCH_FLOOR = 3.0, 0.01
_NEARLY_ALL, _MOST, _LAG_S = 0.99, 0.5, 1.0


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    Attributes:
        name: Its short name.
        batches: How many rollout batches in a row must show it.
        holds: Whether one batch's metrics show it.
        sentence: What to say and what to do, with `{metric/name}` filled from the last batch.
    """

    name: str
    batches: int
    holds: Callable[[Mapping[str, float]], bool]
    sentence: str

    def applies(self, window: Window) -> bool:
        """Whether the last `batches` batches all show it."""
        recent = window[-self.batches :]
        return len(recent) == self.batches and all(self.holds(metrics) for metrics in recent)


def _at_least(name: str, bound: float) -> Callable[[Mapping[str, float]], bool]:
    return lambda metrics: metrics.get(name, float("-inf")) >= bound


def _equals(name: str, value: float) -> Callable[[Mapping[str, float]], bool]:
    return lambda metrics: metrics.get(name) == value


def _waits(metrics: Mapping[str, float]) -> bool:
    return (waiting_fraction(metrics) or 0.0) > 0.9  # noqa: PLR2004 - nine tenths


def _mostly_filtered(metrics: Mapping[str, float]) -> bool:
    filtered, kept = metrics.get("rollout/filtered", 0.0), metrics.get(GROUPS, 0.0)
    return kept > 0 and filtered / (filtered + kept) > _MOST


def _mismatched(metrics: Mapping[str, float]) -> bool:
    baseline = metrics.get(BASELINE)
    now = metrics.get("mismatch/abs_logprob_diff")
    if baseline is None or now is None:
        return False
    # What the last sync's proof saw is rounding, too, and follows the policy as it changes.
    rounding = max(baseline, metrics.get("mismatch/probe", 0.0))
    return now > max(_MISMATCH_FACTOR * rounding, _MISMATCH_FLOOR)


def servers_advised(metrics: Mapping[str, float], steps_per_rollout: int = 1) -> dict[str, float]:
    """How many servers fit what they and the trainer waited; empty where that is about right.

    Args:
        metrics: Of a rollout batch, with the number of servers and both idle fractions.
        steps_per_rollout: Optimizer steps on it; the trainer's fraction is of the first one's time.
    """
    servers, first = metrics.get("rollout/servers", 0.0), metrics.get("idle/trainer_fraction")
    idle = metrics.get("idle/server_fraction")
    if first is None or idle is None or not servers:
        return {}
    waiting = first / max(first + steps_per_rollout * (1.0 - first), 1e-9)
    enough = math.ceil(servers * (1.0 - idle))
    if idle >= _IDLE and waiting <= _BUSY and enough < servers:
        return {ENOUGH: max(1.0, enough)}
    if waiting >= _IDLE and idle <= _BUSY:
        more = round(servers * waiting / max(1.0 - waiting, 1e-9))
        return {MORE: min(max(1.0, more), servers), WAITING: waiting}  # then one sees again
    return {}


RULES: tuple[Rule, ...] = (
    Rule(
        "constant reward",
        3,
        _equals("reward/std", 0.0),
        "every completion of the last 3 rollout batches got the same reward ({reward/mean:.3g}): "
        "nothing can be learned from it. Look at what the reward sees: `lightning-grpo show`.",
    ),
    Rule(
        "no variance within groups",
        3,
        _at_least("reward/zero_variance_fraction", 0.9),
        "{reward/zero_variance_fraction:.0%} of the groups have equal rewards, so they train on "
        "nothing: the prompts are too easy or too hard, or `group_size` is too small. "
        "`keep_group: lightning_grpo.rollout.has_variance` replaces such groups.",
    ),
    Rule(
        "zero loss",
        2,
        lambda metrics: metrics.get("policy/loss") == 0.0 == metrics.get("policy/grad_norm"),
        "loss and gradient are exactly zero: every advantage is zero, or no token is trained on. "
        "See reward/zero_variance_fraction and completion/length_mean.",
    ),
    Rule(
        "all truncated",
        2,
        _at_least("completion/truncated_fraction", _NEARLY_ALL),
        "{completion/truncated_fraction:.0%} of the completions hit `max_new_tokens` "
        "(mean length {completion/length_mean:.0f}): raise it, or ask for shorter answers; a "
        "model that never ends its answer may lack its chat template's end token.",
    ),
    Rule(
        "most groups filtered",
        2,
        _mostly_filtered,
        "{rollout/filtered:.0f} groups were filtered for {health/groups:.0f} kept: most of the "
        "sampling is thrown away. Relax `keep_group`, or take prompts nearer the model's level.",
    ),
    Rule(
        "waiting for rollouts",
        5,
        _waits,
        "the trainer waits for rollouts more than 90 % of its time: give the servers more of the "
        "GPUs, raise `max_staleness`, or shorten the completions.",
    ),
    Rule(
        "too many servers",
        5,
        _at_least(ENOUGH, 1),
        "the servers are idle {idle/server_fraction:.0%} of their time and the trainer does not "
        "wait for them: {health/servers_enough:.0f} of the {rollout/servers:.0f} would do.",
    ),
    Rule(
        "too few servers",
        5,
        _at_least(MORE, 1),
        "the trainer waits for rollouts {health/trainer_waiting:.0%} of its time and the servers "
        "are never idle: {health/servers_more:.0f} more than the {rollout/servers:.0f} would help.",
    ),
    Rule(
        "mismatch",
        1,
        _mismatched,
        "trainer and servers disagree on the same weights: mean |difference of logprobs| is "
        "{mismatch/abs_logprob_diff:.3g}, at the start of the run it was "
        "{health/mismatch_baseline:.3g}. The servers may hold old or damaged weights.",
    ),
    Rule(
        "correction drops tokens",
        2,
        _at_least("correction/dropped_fraction", _MOST),
        "the correction gives weight 0 to {correction/dropped_fraction:.0%} of the tokens: data "
        "are too old (lower `max_staleness`) or its bounds too narrow.",
    ),
    Rule(
        "event loop is late",
        2,
        _at_least("health/event_loop_lag_s", _LAG_S),
        "the rollout client's event loop is {health/event_loop_lag_s:.1f} s late: too few CPU "
        "cores, or a reward or workflow that blocks (use `context.score`, or `await` inside).",
    ),
)


class HealthMonitor(Callback):
    """Explains a sick run: each fault is said once, and again only after it had cleared.

    Args:
        starving_after_s: Seconds without a rollout batch after which a line says so.
        rules: What is looked for.
    """

    def __init__(
        self, starving_after_s: float = 300.0, rules: Sequence[Rule] | None = None
    ) -> None:
        require_seconds("starving_after_s", starving_after_s)
        self._starving_after_s = starving_after_s
        self._rules = RULES if rules is None else tuple(rules)
        longest = max((rule.batches for rule in self._rules), default=1)
        self._window: deque[dict[str, float]] = deque(maxlen=longest)
        self._said: set[str] = set()
        self._baseline: float | None = None
        self._last_batch_s = 0.0
        self._validating = False
        self._stopped = threading.Event()
        self._watch: threading.Thread | None = None

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        """Take one rollout batch's metrics in; the sentences of the faults that are new."""
        if self._baseline is None:
            self._baseline = metrics.get("mismatch/abs_logprob_diff")
        known = {} if self._baseline is None else {BASELINE: self._baseline}
        self._window.append({**metrics, **known})
        window = list(self._window)
        holding = {rule.name: rule for rule in self._rules if rule.applies(window)}
        new = [rule for name, rule in holding.items() if name not in self._said]
        self._said = set(holding)
        return [fill(rule.sentence, window[-1]) for rule in new]

    def starving(self, now_s: float, data: Any = None) -> str | None:
        """The line on a run that got no rollout batch for long; None when there is nothing new.

        Args:
            now_s: By the monotonic clock.
            data: Where batches come from; asked why there is none.
        """
        waited_s = now_s - self._last_batch_s
        if self._validating or waited_s < self._starving_after_s or "starving" in self._said:
            return None
        self._said.add("starving")
        progress = data.progress() if isinstance(data, Rolling) else None
        why = f" ({progress.why})" if progress is not None and progress.why else ""
        return (
            f"no rollout batch for {waited_s:.0f} s{why}. Look at the servers' logs, at "
            "`reward_timeout_s`, and at `keep_group` if one is set."
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch for a run that starves: such a run reaches no other hook."""
        self._last_batch_s = time.monotonic()
        if trainer.is_global_zero:
            self._stopped.clear()
            data = trainer.datamodule  # type: ignore[attr-defined]
            self._watch = threading.Thread(
                target=self._keep_watch, args=(data,), name="health", daemon=True
            )
            self._watch.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Look at each finished rollout batch."""
        self._last_batch_s = time.monotonic()
        if not batch.is_last or batch.rollout.groups is None:
            return
        metrics = {**logged_numbers(trainer), GROUPS: float(len(batch.rollout.groups))}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RolloutDataModule) and data.servers and data.servers.listed_in:
            metrics |= servers_advised(metrics, data.steps_per_rollout)
        for sentence in self.observe(metrics):
            log.warning(sentence)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time spent on held-out prompts is no starving."""
        self._validating = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training goes on."""
        self._last_batch_s = time.monotonic()
        self._validating = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop watching."""
        self._stop()

    def _keep_watch(self, data: Any) -> None:
        while not self._stopped.wait(self._starving_after_s / 10):
            if sentence := self.starving(time.monotonic(), data):
                log.warning(sentence)

    def _stop(self) -> None:
        self._stopped.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None


class _Numbers(dict[str, float]):
    """Metrics for a sentence: one that was not logged reads as nan."""

    def __missing__(self, key: str) -> float:
        return float("nan")


def fill(sentence: str, metrics: Mapping[str, float]) -> str:
    """A rule's sentence with the metrics' values in it."""
    return sentence.format_map(_Numbers(metrics))
