"""Run the episodes of one prompt, for training or evaluation: contexts, seeds, attempts."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Coroutine, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from lightning_grpo.errors import (
    ConfigError,
    FailureBudgetError,
    RequestError,
    RolloutError,
    ServerError,
    ServersLostError,
    require_count,
)
from lightning_grpo.rollout.chat import Tokenizer, spellable, with_arguments
from lightning_grpo.rollout.scoring import Reward, RewardValue, told
from lightning_grpo.rollout.workflow import (
    Generator,
    RolloutWorkflow,
    Scorer,
    check_sampling,
    check_trajectory,
    sampling_of,
)
from lightning_grpo.types import (
    NO_VERSION,
    AnySampling,
    Completion,
    Group,
    Prompt,
    Sampling,
    Trajectory,
)

_SEED_BITS = 31  # fits every server's signed 32-bit field


def derive_seed(*path: int) -> int:
    """A seed for a path such as (run seed, pass, row, attempt, sample, turn): the same each run."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**_SEED_BITS


@dataclass(eq=False)
class Attempt:
    """One attempt at a group, also while it runs and after it failed or was cancelled.

    Attributes:
        draw: Which attempt by its seeds, from 1; one that lost its servers draws the same again.
        version: Weights that no token may be older than.
        group_key: Keeps requests of one prompt on one server.
        priority: Goes first (evaluation).
        sampling: Takes the place of the workflow's own (evaluation).
        trajectories: Of the episodes that are done, by their number.
        num_tokens: Tokens of its completed requests.
        failure: Of the first episode that failed.
    """

    draw: int = 1
    version: int = NO_VERSION
    group_key: Hashable | None = None
    priority: bool = False
    sampling: Sampling | None = None
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    num_tokens: int = 0
    failure: Exception | None = None

    @property
    def is_evaluation(self) -> bool:
        """Whether nothing is trained on what it samples."""
        return self.priority or self.sampling is not None


@dataclass(frozen=True, eq=False)
class _Call:
    """One request of an episode.

    Attributes:
        start: How many tokens it continued.
        token_ids: Those, and the completion.
        sampling: How it was sampled.
        trained: Whether the trajectory may hold it.
    """

    start: int
    token_ids: tuple[int, ...]
    sampling: Sampling
    trained: bool

    @property
    def span(self) -> tuple[int, int]:
        """Where its completion begins and ends."""
        return self.start, len(self.token_ids)

    def is_in(self, trajectory: Trajectory) -> bool:
        """Whether some of its tokens are trained on where they were sampled."""
        start, end = self.span
        here = any(trajectory.response_mask[start:end])
        return here and trajectory.input_ids[:end] == self.token_ids


class Episode:
    """The `EpisodeContext` of one episode; remembers what was sampled, and how."""

    def __init__(
        self, runner: EpisodeRunner, prompt: Prompt, attempt: Attempt, seed_path: tuple[int, ...]
    ) -> None:
        self.tokenizer = with_arguments(runner.tokenizer, prompt.template_kwargs)
        self._runner = runner
        self._own: Sampling | None = getattr(runner.workflow, "sampling", None)
        self._attempt = attempt
        self._seed_path = seed_path
        self._turn = 0
        self._temperature: float | None = None
        self._calls: list[_Call] = []

    # Not a coroutine itself: what is refused is refused where it stands in the user's code.
    def generate(
        self, input_ids: Sequence[int], sampling: AnySampling | None = None, *, trained: bool = True
    ) -> Coroutine[Any, Any, Completion]:
        """Sample one continuation with a seed of its own."""
        chosen = sampling_of(sampling or self._own or Sampling())
        if trained and self._attempt.sampling is not None:
            chosen = for_evaluation(chosen, self._own, self._attempt.sampling)
        elif trained and not self._attempt.is_evaluation:
            refusal = self._why_untrainable(chosen)
            if refusal:
                at = traceback.extract_stack(limit=2)[0]  # slow: it reads the caller's source
                place = f"`context.generate` in {at.filename}, line {at.lineno} ({at.name})"
                aside = "If its tokens are no part of the trajectory, say `trained=False`."
                raise ConfigError(f"{place}: {refusal} {aside}")
            self._temperature = chosen.temperature
        return self._generate(list(input_ids), chosen, trained)

    async def score(self, reward: Reward, /, **arguments: Any) -> RewardValue:
        """Call a reward in a process that can be killed."""
        return await self._runner.scorer.score(reward, arguments)

    def checked(self, trajectory: Trajectory | None) -> Trajectory:
        """The trajectory as it was really sampled, whatever the workflow said of that.

        Raises:
            RolloutError: It isn't one that can be trained on.
            ConfigError: It holds tokens that were not to be trained on.
        """
        checked = check_trajectory(trajectory, self._attempt.version)
        held = [call for call in self._calls if call.is_in(checked)]
        sampled = {i for call in held if call.trained for i in range(*call.span)}
        aside = {i for call in held if not call.trained for i in range(*call.span)}
        # What both have is trained: two calls may come to the same tokens.
        if any(checked.response_mask[i] for i in aside - sampled):
            raise ConfigError(
                "a trajectory must not hold what was sampled with `trained=False`, got tokens "
                "of such a call. Leave the argument out."
            )
        asked = [call for call in self._calls if call.trained]
        counted = [call for call in asked if call in held] or asked
        temperatures = {call.sampling.temperature for call in counted}
        if len(temperatures) == 1:
            checked = replace(checked, temperature=temperatures.pop())
        last = max(counted, key=lambda call: len(call.token_ids), default=None)
        limit = None if last is None else last.sampling.max_new_tokens
        transcript = ""
        if checked.num_turns > 1:
            first = checked.response_mask.index(True)
            transcript = self.tokenizer.decode(list(checked.input_ids[first:]))
        self._runner.num_evaluated += self._attempt.priority
        text = spellable(checked.text)  # a workflow's own may be an agent's, and is kept
        return replace(checked, length_limit=limit, transcript=transcript, text=text)

    async def _generate(
        self, input_ids: list[int], sampling: Sampling, trained: bool
    ) -> Completion:
        seed = derive_seed(*self._seed_path, self._turn)
        self._turn += 1
        completion = await self._runner.generator.generate(
            input_ids,
            sampling,
            group_key=self._attempt.group_key,
            priority=self._attempt.priority,
            seed=seed,
        )
        self._attempt.num_tokens += len(completion.token_ids)
        self._runner.num_tokens += len(completion.token_ids)
        whole = (*input_ids, *completion.token_ids)
        self._calls.append(_Call(len(input_ids), whole, sampling, trained))
        return completion

    def _why_untrainable(self, sampling: Sampling) -> str:
        """Why the trainer could not account for tokens sampled so; empty where it can."""
        try:
            check_sampling(sampling)
        except ConfigError as error:
            return str(error)
        if self._temperature not in (None, sampling.temperature):
            return (
                "`sampling.temperature` must be the same in all of a trajectory (the trainer "
                f"divides the logits by one number), got {self._temperature} and "
                f"{sampling.temperature}. Use one of them."
            )
        return ""


def for_evaluation(asked: Sampling, own: Sampling | None, wanted: Sampling) -> Sampling:
    """How evaluation samples a call: as it wants to, but ended as early as the call asks for.

    Args:
        asked: What the call asks for.
        own: The workflow's; what a call shares with it, it didn't ask for.
        wanted: The evaluation's.
    """
    if own is None or asked == own:
        return wanted
    limit = wanted.max_new_tokens
    if asked.max_new_tokens != own.max_new_tokens:
        limit = min(limit, asked.max_new_tokens)
    known = {*own.stop, *wanted.stop}
    known_ids = {*own.stop_token_ids, *wanted.stop_token_ids}
    return replace(
        wanted,
        max_new_tokens=limit,
        stop=(*wanted.stop, *(s for s in asked.stop if s not in known)),
        stop_token_ids=(
            *wanted.stop_token_ids,
            *(i for i in asked.stop_token_ids if i not in known_ids),
        ),
    )


@dataclass
class EpisodeRunner:
    """Runs all episodes of a prompt at once.

    Consumes a prompt and an attempt. Waits for the workflow, which waits for completions and
    rewards. Produces one checked trajectory for each episode, or raises what the first failed one
    raised. The producer's task of the group goes on, or `evaluate`.

    Args:
        workflow: Runs one episode.
        generator: Samples.
        scorer: Runs rewards.
        tokenizer: Offered to the workflow.
        group_size: Episodes of one group.
        seed: The run's seed, from which each request's is derived.

    Attributes:
        num_evaluated: Completed episodes of held-out prompts, since the start of the run.
        num_tokens: Tokens of all completed requests, since the start of the run.
    """

    workflow: RolloutWorkflow
    generator: Generator
    scorer: Scorer
    tokenizer: Tokenizer
    group_size: int = 8
    seed: int = 0
    num_evaluated: int = 0
    num_tokens: int = 0

    async def run(
        self, prompt: Prompt, attempt: Attempt, num_samples: int | None = None
    ) -> tuple[Trajectory, ...]:
        """Run all episodes of a prompt at once; the first that fails ends the others.

        Args:
            prompt: What to ask.
            attempt: How its requests are marked; filled on the way, so that a cancelled attempt
                can be accounted for.
            num_samples: Takes the place of `group_size`.

        Raises:
            Exception: Whatever the first failing episode raised.
        """
        num_samples = num_samples or self.group_size
        async with anyio.create_task_group() as tasks:
            for sample in range(num_samples):
                tasks.start_soon(self._run_one, prompt, attempt, sample, tasks)
        if attempt.failure is not None:
            raise attempt.failure
        return tuple(attempt.trajectories[sample] for sample in range(num_samples))

    async def _run_one(
        self,
        prompt: Prompt,
        attempt: Attempt,
        sample: int,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        try:
            path = (self.seed, *prompt.key, attempt.draw, sample)
            episode = Episode(self, prompt, attempt, path)
            trajectory = await self.workflow.run(prompt, episode)
            attempt.trajectories[sample] = episode.checked(trajectory)
        except Exception as error:  # noqa: BLE001 - recorded here, raised by run()
            attempt.failure = attempt.failure or error
            tasks.cancel_scope.cancel()


def is_lost(error: BaseException) -> bool:
    """Whether an attempt lost its servers: the same seeds then give what it would have been."""
    return isinstance(error, ServerError) and not isinstance(error, RequestError)


def first_line(error: BaseException) -> str:
    """An error in one line, for a status."""
    lines: list[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


FATAL = (ConfigError, FailureBudgetError, ServersLostError)
"""What no further attempt can cure: it ends the producer, or the evaluation."""


async def evaluate(
    runner: EpisodeRunner,
    prompts: Iterable[Prompt],
    sampling: Sampling | None = None,
    num_samples: int = 1,
    max_attempts: int = 3,
    max_in_flight: int = 512,
) -> list[Group]:
    """Sample and score `num_samples` episodes of each prompt; groups in the order of the prompts.

    Args:
        runner: Runs the episodes; its requests go before those of training.
        prompts: What to ask; made one at a time if that is how the iterable makes them.
        sampling: Takes the place of the workflow's own; None leaves it.
        num_samples: Episodes of each prompt.
        max_attempts: How often a prompt is tried.
        max_in_flight: Episodes that run at once.

    Raises:
        RolloutError: A prompt failed every attempt; names it. No score is made up.
    """
    require_count("num_samples", num_samples)
    groups: dict[int, Group] = {}
    failures: list[Exception] = []
    slots = anyio.Semaphore(max(1, max_in_flight // num_samples))

    async def run(index: int, prompt: Prompt) -> None:
        try:
            groups[index] = await _evaluate_one(runner, prompt, sampling, num_samples, max_attempts)
        except Exception as error:  # noqa: BLE001 - recorded here, raised below as itself
            failures.append(error)
            tasks.cancel_scope.cancel()
        finally:
            slots.release()

    async with anyio.create_task_group() as tasks:
        for index, prompt in enumerate(prompts):
            await slots.acquire()
            tasks.start_soon(run, index, prompt)
    if failures:
        raise failures[0]
    return [groups[index] for index in sorted(groups)]


async def _evaluate_one(
    runner: EpisodeRunner,
    prompt: Prompt,
    sampling: Sampling | None,
    num_samples: int,
    max_attempts: int,
) -> Group:
    draw = 1
    for attempt in range(1, max_attempts + 1):
        key = ("evaluation", prompt.row)
        asked = Attempt(draw, group_key=key, priority=True, sampling=sampling)
        try:
            trajectories = await runner.run(prompt, asked, num_samples)
        except FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - tried again, then raised by name
            failure, draw = error, draw + (not is_lost(error))
        else:
            oldest = min(trajectory.oldest_version for trajectory in trajectories)
            return Group(prompt, trajectories, oldest, attempt)
    raise RolloutError(
        f"evaluation prompt {prompt.row} failed {max_attempts} times; last: {told(failure)}"
    ) from failure
