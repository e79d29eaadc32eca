"""Run the episodes of one prompt: contexts, seeds, and one attempt at a group."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import anyio.abc

from lightning_grpo.rollout.protocols import (
    Generator,
    Reward,
    RewardValue,
    RolloutWorkflow,
    Scorer,
    Tokenizer,
)
from lightning_grpo.rollout.workflow import check_trajectory
from lightning_grpo.types import NO_VERSION, Completion, Prompt, Sampling, Trajectory

_DEFAULT_SAMPLING = Sampling()
_SEED_BITS = 31  # fits every server's signed 32-bit field


def derive_seed(*path: int) -> int:
    """A seed for a path such as (run seed, pass, row, attempt, sample, turn): the same each run."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**_SEED_BITS


@dataclass(frozen=True)
class Request:
    """What makes the requests of an attempt differ from those of other attempts.

    Attributes:
        attempt: Which attempt at the prompt, from 1.
        version: Weights that no token may be older than.
        group_key: Keeps requests of one prompt on one server.
        priority: Goes first (evaluation).
        sampling: Takes the place of the workflow's own (evaluation).
    """

    attempt: int = 1
    version: int = NO_VERSION
    group_key: Hashable | None = None
    priority: bool = False
    sampling: Sampling | None = None


class Episode:
    """The `EpisodeContext` of one episode; counts what was sampled."""

    def __init__(self, runner: EpisodeRunner, request: Request, seed_path: tuple[int, ...]) -> None:
        self.tokenizer: Tokenizer = runner.tokenizer
        self.num_tokens = 0
        self._tally = runner.tally
        self.temperatures: set[float] = set()
        self.length_limit: int | None = None
        self._generator = runner.generator
        self._scorer = runner.scorer
        self._request = request
        self._seed_path = seed_path
        self._turn = 0

    async def generate(self, input_ids: list[int], sampling: Sampling | None = None) -> Completion:
        """Sample one continuation with a seed of its own."""
        chosen = self._request.sampling or sampling or _DEFAULT_SAMPLING
        seed = derive_seed(*self._seed_path, self._turn)
        self._turn += 1
        completion = await self._generator.generate(
            input_ids,
            chosen,
            group_key=self._request.group_key,
            priority=self._request.priority,
            seed=seed,
        )
        self.num_tokens += len(completion.token_ids)
        self._tally.tokens += len(completion.token_ids)
        self.temperatures.add(chosen.temperature)
        self.length_limit = chosen.max_new_tokens
        return completion

    async def score(self, reward: Reward, /, **arguments: Any) -> RewardValue:
        """Call a reward in a process that can be killed."""
        return await self._scorer.score(reward, arguments)


@dataclass
class Attempt:
    """One attempt at a group, also while it runs and after it failed or was cancelled."""

    episodes: list[Episode] = field(default_factory=list)
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    failure: Exception | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of its completed requests."""
        return sum(episode.num_tokens for episode in self.episodes)


@dataclass
class Tally:
    """What was completed since the start of the run.

    Attributes:
        evaluated: Episodes of held-out prompts.
        tokens: Of all requests.
    """

    evaluated: int = 0
    tokens: int = 0


@dataclass
class EpisodeRunner:
    """What every episode shares.

    Args:
        workflow: Runs one episode.
        generator: Samples.
        scorer: Runs rewards.
        tokenizer: Offered to the workflow.
        group_size: Episodes of one group.
        seed: The run's seed, from which each request's is derived.
    """

    workflow: RolloutWorkflow
    generator: Generator
    scorer: Scorer
    tokenizer: Tokenizer
    group_size: int = 8
    seed: int = 0
    tally: Tally = field(default_factory=Tally)

    async def run(
        self, prompt: Prompt, request: Request, attempt: Attempt, num_samples: int | None = None
    ) -> tuple[Trajectory, ...]:
        """Run all episodes of a prompt at once; the first that fails ends the others.

        Args:
            prompt: What to ask.
            request: How this attempt's requests are marked.
            attempt: Filled on the way, so that a cancelled attempt can be accounted for.
            num_samples: Takes the place of `group_size`.

        Raises:
            Exception: Whatever the first failing episode raised.
        """
        num_samples = num_samples or self.group_size
        for sample in range(num_samples):
            path = (self.seed, *prompt.key, request.attempt, sample)
            attempt.episodes.append(Episode(self, request, path))
        async with anyio.create_task_group() as tasks:
            for sample in range(num_samples):
                tasks.start_soon(self._run_one, prompt, request, attempt, sample, tasks)
        if attempt.failure is not None:
            raise attempt.failure
        return tuple(attempt.trajectories[sample] for sample in range(num_samples))

    async def _run_one(
        self,
        prompt: Prompt,
        request: Request,
        attempt: Attempt,
        sample: int,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        episode = attempt.episodes[sample]
        try:
            trajectory = await self.workflow.run(prompt, episode)
            checked = check_trajectory(trajectory, request.version)
        except Exception as error:  # noqa: BLE001 - recorded here, raised by run()
            attempt.failure = attempt.failure or error
            tasks.cancel_scope.cancel()
            return
        # What the tokens were really sampled at, whatever the workflow said.
        if len(episode.temperatures) == 1:
            checked = replace(checked, temperature=next(iter(episode.temperatures)))
        transcript = ""
        if checked.num_turns > 1:
            first = checked.response_mask.index(True)
            transcript = self.tokenizer.decode(list(checked.input_ids[first:]))
        self.tally.evaluated += request.priority
        attempt.trajectories[sample] = replace(
            checked, length_limit=episode.length_limit, transcript=transcript
        )


def first_line(error: BaseException) -> str:
    """An error in one line, for a status."""
    lines: list[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
