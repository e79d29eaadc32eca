"""Lets groups in, runs them, and hands the trainer exactly one batch at a time.

    prompts -> stream -> RolloutProducer -> EpisodeRunner -> workflow -> ServerPool, RewardScorer
                           | gate, ledger                       ... and back, as a finished group
    session <- take -------+------ advance <- published weights

One task admits, one task runs each group, `take` waits. All of them live on one event loop and
share plain fields between awaits. A prompt's way: admitted -> running (attempts) -> finished ->
taken, or filtered, failed, expired; a dropped one goes back to the front of the stream. A task that
raises ends the producer, and every `take` raises what it raised.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import anyio
import anyio.lowlevel
import msgspec

from lightning_grpo.errors import (
    CheckpointError,
    PromptError,
    RolloutError,
)
from lightning_grpo.rollout.admission import PromptMixture, StalenessGate
from lightning_grpo.rollout.episodes import (
    FATAL,
    Attempt,
    EpisodeRunner,
    evaluate,
    first_line,
    is_lost,
)
from lightning_grpo.rollout.ledger import Counters, Ledger, RolloutLimits
from lightning_grpo.rollout.scoring import told
from lightning_grpo.serving.event_loop import Background
from lightning_grpo.types import (
    Group,
    Outcome,
    Prompt,
    PromptKey,
    RolloutProgress,
    Sampling,
    Trajectory,
)

logger = logging.getLogger(__name__)

_decoder = msgspec.msgpack.Decoder(tuple[Trajectory, ...])


@dataclass(eq=False)
class GroupRun:
    """One admitted prompt, until it is taken or ends otherwise.

    Attributes:
        ticket: Its name at the gate.
        prompt: What is asked.
        attempts: Which attempt runs, from 1.
        num_lost: How many of the attempts before lost their servers.
        started_at: When that attempt began, on the loop's clock.
        attempt: The attempt's episodes.
        scope: Cancels it.
        group: The result, once it has finished.
        wanted: What `keep_group` said of the result.
    """

    ticket: int
    prompt: Prompt
    attempts: int
    num_lost: int = 0
    started_at: float = 0.0
    attempt: Attempt = field(default_factory=Attempt)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    group: Group | None = None
    wanted: bool = True

    @property
    def key(self) -> PromptKey:
        """The prompt's name."""
        return self.prompt.key

    @property
    def draw(self) -> int:
        """Which attempt by its seeds: what was lost by no fault of its own is sampled again."""
        return self.attempts - self.num_lost


class Backlog:
    """Which prompt comes next, which were put back, and which are at the gate.

    Args:
        stream: The endless stream of prompts.
        wants: Whether an entry is to be asked.
        skip: Told of every entry that is not.
    """

    def __init__(
        self,
        stream: PromptMixture,
        wants: Callable[[PromptKey], bool],
        skip: Callable[[PromptKey], None],
    ) -> None:
        self.stream = stream
        self._wants = wants
        self._skip = skip
        self.runs: dict[int, GroupRun] = {}
        self._again: dict[int, tuple[PromptKey, int]] = {}  # put back: ticket -> key, attempts

    def next(self) -> tuple[PromptKey, int, int | None]:
        """The key of the next prompt, which attempt at it comes, and the ticket it has, if any."""
        if self._again:
            ticket = min(self._again)
            return *self._again.pop(ticket), ticket
        key = self.stream.peek()
        while not self._wants(key):
            self._skip(key)
            self.stream.advance(asked=False)
            key = self.stream.peek()
        self.stream.advance()
        return key, 1, None

    def put_back(self, run: GroupRun) -> None:
        """Ask a prompt again, before any other."""
        self._again[run.ticket] = (run.key, run.draw)

    def state_dict(self, handed_over: Sequence[GroupRun] = ()) -> dict[str, Any]:
        """Finished groups whole; those that run are asked again after a resume, in their places.

        Args:
            handed_over: Groups that were taken but not trained on; they are finished again.
        """
        again, finished = dict(self._again), []
        running = {ticket: run for ticket, run in self.runs.items() if run.group is None}
        again |= {ticket: (run.key, run.draw) for ticket, run in running.items()}
        runs = [*handed_over, *(self.runs[ticket] for ticket in sorted(self.runs))]
        for run in runs:
            if run.group is not None:
                place = sum(ticket < run.ticket for ticket in again)
                finished.append(pack_group(run.group, run.wanted) | {"place": place})
        return {
            "stream": self.stream.state_dict(),
            "ask_again": [[list(again[t][0]), again[t][1]] for t in sorted(again)],
            "finished": finished,
        }

    def load_state_dict(self, state: dict[str, Any], gate: StalenessGate) -> None:
        """Go on from `state_dict`; the gate gives all groups new tickets in the old order."""
        self.stream.load_state_dict(state["stream"])
        self.runs, self._again = {}, {}
        ask_again = deque(state["ask_again"])
        for packed in state["finished"]:
            # Its place: how many that are asked again come before it.
            while ask_again and len(self._again) < packed.get("place", 0):
                self._reserve(ask_again.popleft(), gate)
            group = unpack_group(packed, self.stream.by_key)
            ticket = gate.restore_finished(group.admitted_version)
            run = GroupRun(ticket, group.prompt, group.attempts, group=group)
            run.wanted = bool(packed["wanted"])
            self.runs[ticket] = run
        for asked in ask_again:
            self._reserve(asked, gate)

    def _reserve(self, asked: list[Any], gate: StalenessGate) -> None:
        (pass_index, row), attempts = asked
        self._again[gate.reserve()] = ((pass_index, row), attempts)


def pack_group(group: Group, wanted: bool = True) -> dict[str, Any]:
    """A group without its prompt, which is made again from its key."""
    return {
        "key": list(group.prompt.key),
        "prompt_digest": _digest(group.prompt),
        "admitted_version": group.admitted_version,
        "attempts": group.attempts,
        "wanted": wanted,
        "trajectories": msgspec.msgpack.encode(group.trajectories),
    }


def unpack_group(packed: dict[str, Any], make_prompt: Callable[[PromptKey], Prompt]) -> Group:
    """The group that `pack_group` packed.

    Raises:
        CheckpointError: The prompt of that name isn't the one that was asked then.
    """
    pass_index, row = packed["key"]
    prompt = make_prompt((int(pass_index), int(row)))
    if _digest(prompt) != packed["prompt_digest"]:
        raise CheckpointError(
            f"prompt {prompt.key} is not the one of the checkpoint: the dataset, its order or the "
            "chat template changed. Resume with the prompts that the run was started with."
        )
    return Group(
        prompt=prompt,
        trajectories=_decoder.decode(packed["trajectories"]),
        admitted_version=int(packed["admitted_version"]),
        attempts=int(packed["attempts"]),
    )


def _digest(prompt: Prompt) -> str:
    return hashlib.blake2b(repr(prompt.input_ids).encode(), digest_size=8).hexdigest()


def has_variance(group: Group) -> bool:
    """Whether the rewards of a group differ: without it every advantage of the group is 0."""
    rewards = [trajectory.reward for trajectory in group.trajectories]
    return max(rewards) > min(rewards)


class RolloutProducer:
    """Keeps as many groups running as the gate allows; an async context manager.

    Consumes the stream's prompts. Waits for a slot of the gate, then for the group's episodes.
    Produces finished groups, `batch_size` of them for each `take`. Whoever waits in `take` goes on
    once the gate has a batch; the next groups, once `advance` frees slots.

    Args:
        stream: Where prompts come from.
        runner: Runs the episodes of a prompt.
        gate: Who may start, what may be taken.
        ledger: How each prompt ended.
        limits: Of time, failures and requests in flight.
        keep_group: Turns groups down (dynamic sampling); the next prompts replace them until
            `max_filtered_batches` are used up, then such groups fill the batch.
        on_event: Called with a name and data, in the order in which things happen.
    """

    def __init__(
        self,
        stream: PromptMixture,
        runner: EpisodeRunner,
        gate: StalenessGate,
        ledger: Ledger,
        limits: RolloutLimits | None = None,
        keep_group: Callable[[Group], bool] | None = None,
        on_event: Callable[..., None] | None = None,
    ) -> None:
        self.runner = runner
        self.gate = gate
        self.ledger = ledger
        self.limits = limits or RolloutLimits()
        self.counters = Counters()
        self._keep_group = keep_group
        self._num_filtered = 0  # for the batch that is being filled
        self._emit = on_event or _ignore
        all_groups = (gate.max_staleness + 1) * gate.batch_size
        in_flight = self.limits.max_in_flight or all_groups * runner.group_size
        self._max_running = max(1, in_flight // runner.group_size)
        self._backlog = Backlog(stream, self._wants, self._skip)
        self._handed_over: deque[list[GroupRun]] = deque()  # batches taken, weights not published
        self._errors: deque[str] = deque(maxlen=3)
        self._accepted_at = 0.0
        self._background = Background()

    async def __aenter__(self) -> Self:
        """Start to admit."""
        await self._background.__aenter__()
        self._accepted_at = anyio.current_time()
        self._background.spawn(self._admit_forever)
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        """Cancel every episode."""
        return await self._background.__aexit__(*error)

    async def take(self) -> list[Group]:
        """Wait for one rollout batch: exactly `batch_size` groups, oldest version first.

        Raises:
            FailureBudgetError: Too many groups failed.
            RolloutError: The producer ended, or there is nothing left to take.
        """
        began = anyio.current_time()
        while True:
            changed = self._background.next_change
            left_s = self._expire_stragglers(began)
            self._background.check()
            if self.gate.is_exhausted:
                raise RolloutError(f"all {self.gate.max_groups} groups of the run were taken.")
            if self.gate.policy == "strict" and self.gate.is_settled:
                self._filter_in_order()
            version = self.gate.batch_version
            tickets = self.gate.take()
            if tickets is not None:
                return self._hand_over(tickets, version)
            with anyio.move_on_after(left_s):
                await changed.wait()

    def progress(self) -> RolloutProgress:
        """How far the next rollout batch is."""
        size = self.gate.batch_size
        runs = [self._backlog.runs[ticket] for ticket in sorted(self._backlog.runs)[:size]]
        done = sum(
            len(run.attempt.trajectories if run.group is None else run.group.trajectories)
            for run in runs
        )
        wanted = size * self.runner.group_size
        return RolloutProgress(
            done, wanted, self.runner.num_evaluated, self.runner.num_tokens, self.explain_wait()
        )

    def advance(self, version: int) -> None:
        """The servers have new weights: slots of the batches trained on become free.

        Only now are their groups `trained`: a checkpoint from before gives them back.
        """
        before = self.gate.num_pending_batches
        self.gate.advance(version)
        for _ in range(before - self.gate.num_pending_batches):
            for run in self._handed_over.popleft():
                self._record(self.ledger, run, Outcome.TRAINED)
        self._emit("advance", version=version)
        self._drop_overdue()
        self._background.notify()

    def set_remaining_batches(self, num_batches: int | None) -> None:
        """Admit no more than the trainer will still take; None: no limit."""
        taken, size = self.gate.num_taken, self.gate.batch_size
        self.gate.max_groups = None if num_batches is None else taken + num_batches * size
        self._background.notify()

    async def evaluate(
        self, prompts: Iterable[Prompt], sampling: Sampling | None = None, num_samples: int = 1
    ) -> list[Group]:
        """Groups for each prompt, past the gate and before all other requests."""
        num_episodes = self._max_running * self.runner.group_size
        attempts = self.limits.max_attempts
        return await self._background.run(
            evaluate, self.runner, prompts, sampling, num_samples, attempts, num_episodes
        )

    @property
    def pass_index(self) -> int:
        """Which pass over the prompts it is in."""
        return self._backlog.stream.pass_index

    def explain_wait(self) -> str:
        """One line on why a batch isn't ready."""
        gate, idle_s = self.gate, anyio.current_time() - self._accepted_at
        errors = "; ".join(self._errors) or "none"
        return (
            f"no accepted group for {idle_s:.0f} s at version {gate.version}: "
            f"{gate.num_running} groups running, {gate.num_finished} finished, "
            f"{gate.num_pending_batches} batch(es) whose weights are not out; "
            f"last errors: {errors}"
        )

    def state_dict(self, num_trained: int = 0) -> dict[str, Any]:
        """Everything to go on from, as plain data; without an await, so it is one moment.

        Batches that were taken but whose weights are not published count as not taken.

        Args:
            num_trained: How many of those batches, oldest first, count as trained all the same.
        """
        handed_over = list(self._handed_over)
        ledger = copy.deepcopy(self.ledger)
        for run in itertools.chain.from_iterable(handed_over[:num_trained]):
            self._record(ledger, run, Outcome.TRAINED)
        given_back = list(itertools.chain.from_iterable(handed_over[num_trained:]))
        return {
            "backlog": self._backlog.state_dict(given_back),
            "num_filtered": self._num_filtered,
            "gate": self.gate.state_dict(num_trained),
            "ledger": ledger.state_dict(),
            "counters": self.counters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; what runs meanwhile is cancelled and forgotten."""
        for run in self._backlog.runs.values():
            run.scope.cancel()
        self._handed_over.clear()
        self.gate.load_state_dict(state["gate"])
        self.ledger.load_state_dict(state["ledger"])
        self.counters.load_state_dict(state["counters"])
        self._num_filtered = int(state["num_filtered"])
        self._backlog.load_state_dict(state["backlog"], self.gate)
        self._background.notify()

    async def _admit_forever(self) -> None:
        while True:
            changed = self._background.next_change
            while self.gate.may_admit() and self.gate.num_running < self._max_running:
                self._admit()
                await anyio.lowlevel.checkpoint()
            await changed.wait()

    def _admit(self) -> None:
        key, attempts, ticket = self._backlog.next()
        try:
            prompt = self._backlog.stream.by_key(key)
        except PromptError as error:
            self._give_up(key, error)
            return
        run = GroupRun(self.gate.admit(ticket), prompt, attempts, started_at=anyio.current_time())
        self._backlog.runs[run.ticket] = run
        self._emit("admit", key=run.key, version=self.gate.version, ticket=run.ticket)
        self._background.spawn(self._run, run)

    def _give_up(self, key: PromptKey, error: PromptError) -> None:
        """A row that can't be made a prompt: it was never asked, and the next one is."""
        self._errors.append(f"prompt {key}: {first_line(error)}")
        self.counters.failed += 1
        logger.warning("prompt %s is given up: %s", key, error)
        self._emit(str(Outcome.FAILED), key=key)
        self.ledger.record(key, Outcome.FAILED, str(error), asked=False)

    async def _run(self, run: GroupRun) -> None:
        with run.scope:
            while run.group is None and run.ticket in self._backlog.runs:
                await self._try_once(run)

    async def _try_once(self, run: GroupRun) -> None:
        version = self.gate.admitted_version(run.ticket)
        run.attempt = Attempt(run.draw, version, group_key=run.key)
        try:
            trajectories = await self.runner.run(run.prompt, run.attempt)
            group = Group(run.prompt, trajectories, version, run.attempts)
            run.wanted = self._keep_group is None or bool(self._keep_group(group))
        except FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - counted, named, and tried again
            if not run.scope.cancel_called:
                self._attempt_failed(run, error)
            return
        if not run.scope.cancel_called:
            self._finish(run, group)

    def _finish(self, run: GroupRun, group: Group) -> None:
        run.group = group
        self._accepted_at = anyio.current_time()
        self.counters.tokens += run.attempt.num_tokens
        if self.gate.policy != "strict" and self._turn_down(run):
            return
        self.gate.finish(run.ticket)
        self._emit("finish", key=run.key, ticket=run.ticket)
        self._background.notify()

    def _turn_down(self, run: GroupRun) -> bool:
        budget = self.limits.max_filtered_batches * self.gate.batch_size
        if run.wanted or self._num_filtered >= budget:
            return False
        self._num_filtered += 1
        self.counters.filtered += 1
        self._end(run, Outcome.FILTERED)
        return True

    def _filter_in_order(self) -> None:
        # In the order of admission, whoever finished first; then the replacements must finish.
        kept = 0
        for ticket in sorted(self._backlog.runs):
            if kept < self.gate.batch_size and not self._turn_down(self._backlog.runs[ticket]):
                kept += 1

    def _attempt_failed(self, run: GroupRun, error: Exception) -> None:
        self._errors.append(f"prompt {run.key}: {first_line(error)}")
        if run.attempts < self.limits.max_attempts:
            run.attempts += 1
            run.num_lost += is_lost(error)
            run.started_at = anyio.current_time()
            self.counters.retried += 1
            self.gate.retry(run.ticket)
            self._emit("retry", key=run.key, attempt=run.attempts)
            self._background.notify()
            return
        self.counters.failed += 1
        logger.warning("prompt failed %d times: %s", run.attempts, self._errors[-1])
        logger.debug("prompt %s failed", run.key, exc_info=error)
        self._end(run, Outcome.FAILED, told(error))

    def _end(self, run: GroupRun, outcome: Outcome, error: str | None = None) -> None:
        self._emit(str(outcome), key=run.key)
        self._forget(run)
        self._record(self.ledger, run, outcome, error)

    def _record(
        self, ledger: Ledger, run: GroupRun, outcome: Outcome, error: str | None = None
    ) -> None:
        success = None if run.group is None else self._backlog.stream.success(run.group)
        ledger.record(run.key, outcome, error, success)

    def _wants(self, key: PromptKey) -> bool:
        return self._backlog.stream.wants(key, self.ledger.success(key[1]))

    def _skip(self, key: PromptKey) -> None:
        self.counters.skipped += 1
        self.ledger.skip(key)
        self._emit("skipped", key=key)

    def _forget(self, run: GroupRun) -> None:
        del self._backlog.runs[run.ticket]
        self.gate.release(run.ticket)
        run.scope.cancel()
        self._background.notify()

    def _hand_over(self, tickets: list[int], version: int) -> list[Group]:
        runs = [self._backlog.runs.pop(ticket) for ticket in tickets]
        self._handed_over.append(runs)
        groups = [run.group for run in runs if run.group is not None]
        self.counters.filled += sum(not run.wanted for run in runs)
        self._num_filtered = 0
        self.counters.took(groups, version)
        self._emit("take", version=version, keys=[run.key for run in runs])
        self._drop_overdue()
        self._background.notify()
        return groups

    def _drop_overdue(self) -> None:
        for ticket in reversed(self.gate.overdue()):
            run = self._backlog.runs[ticket]
            self.counters.dropped_groups += 1
            self.counters.dropped_tokens += run.attempt.num_tokens
            self._backlog.put_back(run)
            self._emit("drop", key=run.key)
            self._forget(run)

    def _expire_stragglers(self, began: float) -> float | None:
        """End the groups that the batch has waited too long for; seconds to the next such."""
        timeout = self.limits.straggler_timeout_s
        if timeout is None:
            return None
        now, left = anyio.current_time(), []
        for run in [self._backlog.runs[ticket] for ticket in self.gate.awaited()]:
            left.append(max(run.started_at, began) + timeout - now)
            if left[-1] <= 0:
                self.counters.expired += 1
                self._end(run, Outcome.EXPIRED)
        return min(left, default=None)


def _ignore(name: str, **data: Any) -> None:
    """No one listens."""
