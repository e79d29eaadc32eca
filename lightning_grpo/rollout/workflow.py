"""What a workflow is and what it is given; RLVRWorkflow: one prompt, one completion, rewards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from lightning_grpo.errors import MOST, ConfigError, RewardError, RolloutError, require_number
from lightning_grpo.rollout.chat import Tokenizer
from lightning_grpo.rollout.scoring import (
    BoundReward,
    Reward,
    RewardFailedError,
    Rewards,
    RewardValue,
    bind_rewards,
    free_name,
    is_trainable,
    legal_name,
)
from lightning_grpo.types import NO_VERSION, AnySampling, Completion, Prompt, Sampling, Trajectory

Score = Callable[[Reward, Mapping[str, Any]], Awaitable[RewardValue]]
"""`RewardScorer.score`."""

_ANSWERS = ("The answer is 4.\n#### 4\n\\boxed{4}", "")


async def try_reward(bound: BoundReward, prompt: Prompt, score: Score) -> None:
    """Call a reward on a prompt of the data, with what a policy might answer.

    Args:
        bound: The reward.
        prompt: Of the data.
        score: Calls it.

    Raises:
        ConfigError: It failed with every answer.
    """
    told_by_data = [str(value) for name, value in prompt.columns.items() if name == "answer"]
    failures = []
    for text in (*told_by_data, *_ANSWERS):
        try:
            await score(bound.reward, bound.arguments(prompt, text, ()))
        except RewardFailedError as error:
            failures.append(error)
        except RewardError:
            return  # of its time, its process or what it calls: that may be another in the run
        else:
            return
    raise ConfigError(
        f"{str(failures[0]).rstrip('.')}. So it did with each of {len(failures)} answers to the "
        "first prompt. Try it alone: lightning-grpo score --reward ... --data ..."
    )


class Generator(Protocol):
    """Samples continuations: the server pool, or a fake."""

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        group_key: Hashable | None = None,
        priority: bool = False,
        seed: int | None = None,
    ) -> Completion:
        """Sample one continuation of `input_ids`.

        Args:
            input_ids: What to continue.
            sampling: How to sample.
            group_key: Requests of one key share a prompt, so one server's prefix cache serves all.
            priority: Goes before requests without it.
            seed: Makes the sample repeatable where the server can.
        """
        ...


class Scorer(Protocol):
    """Runs reward functions, under a time limit."""

    async def score(self, reward: Reward, arguments: Mapping[str, Any]) -> RewardValue:
        """Call `reward(**arguments)`; raises `RewardError`, never answers a silent 0."""
        ...


_PROGRAMS = "lightning_grpo.rewards.sandbox"


class EpisodeContext(Protocol):
    """What a workflow may use, and nothing else."""

    tokenizer: Tokenizer

    async def generate(
        self, input_ids: Sequence[int], sampling: AnySampling | None = None, *, trained: bool = True
    ) -> Completion:
        """Sample one continuation; the seed, the group and the priority are the context's.

        Args:
            input_ids: What to continue.
            sampling: How to sample, or settings of that by name; None: as the workflow's
                `sampling` says.
            trained: Whether the completion becomes a part of the trajectory. One that doesn't (a
                judgement, a summary) may be sampled in any way; the others must all have one
                temperature and nothing that biases the importance ratio.

        Raises:
            ConfigError: In training: it can't be trained on as it is sampled.
        """
        ...

    async def score(self, reward: Reward, /, **arguments: Any) -> RewardValue:
        """Call `reward(**arguments)` in a process that can be killed."""
        ...


class RolloutWorkflow(ABC):
    """One episode: from a prompt to a trajectory. Subclass it and write `run`.

    A base class and not a protocol, because a config names implementations by `class_path`.

    Attributes:
        sampling: How the policy is sampled in training, where the workflow says it: then the run
            can check it, and validation can answer greedily.
    """

    sampling: Sampling | None = None

    @property
    def asks_once(self) -> bool:
        """Whether an episode asks the policy once: a group's requests then travel together."""
        return False

    @abstractmethod
    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory | None:
        """Run one episode; `None` or a raise fails the group's attempt."""

    def of(self, dataset: str) -> RolloutWorkflow:
        """The workflow that runs a dataset's prompts: this one, unless it stands for several.

        Args:
            dataset: Its name.

        Raises:
            ConfigError: There is none for it.
        """
        del dataset
        return self

    @property
    def reward_functions(self) -> list[Reward]:
        """Functions to be shipped to the reward processes when they start."""
        return []

    @property
    def runs_programs(self) -> bool:
        """Whether something that a policy wrote is run: then it is said what holds it."""
        return any(getattr(f, "__module__", "") == _PROGRAMS for f in self.reward_functions)

    async def try_rewards(  # noqa: B027 - nothing, by default
        self, prompt: Prompt, score: Callable[..., Awaitable[RewardValue]]
    ) -> None:
        """Call the rewards on a prompt of the data, before servers start.

        Args:
            prompt: One of those that this workflow will be asked.
            score: Calls a reward with a mapping of arguments.

        Raises:
            ConfigError: One fails whatever is answered.
        """

    def validate(self, columns: Collection[str]) -> None:  # noqa: B027 - nothing, by default
        """Refuse what the prompts' columns can't serve; called at setup.

        Raises:
            ConfigError: A reward names a column that isn't there.
        """


_GREEDY_BELOW = 1e-6
"""Servers take a lower temperature for 0."""


class RLVRWorkflow(RolloutWorkflow):
    """One completion, scored by one or several verifiable rewards.

    Args:
        reward: A function, or several, as a list or by the names that they are logged under. Each
            gets the arguments that it names.
        sampling: How completions are sampled in training; its settings by name will do.
        reward_weights: A weight for each function, or by name; None: all 1.
    """

    def __init__(
        self,
        reward: Rewards,
        sampling: AnySampling = Sampling(),
        reward_weights: list[float] | dict[str, float] | None = None,
    ) -> None:
        self.rewards = bind_rewards(reward)
        self.sampling: Sampling = sampling_of(sampling)
        self.weights = _weights(reward_weights, [bound.name for bound in self.rewards])

    @property
    def asks_once(self) -> bool:
        """True, unless a subclass has a `run` of its own."""
        return type(self).run is RLVRWorkflow.run

    @property
    def reward_functions(self) -> list[Callable[..., Any]]:
        """The functions, to be shipped to the reward processes when they start."""
        return [bound.reward for bound in self.rewards]

    def validate(self, columns: Collection[str]) -> None:
        """Refuse rewards that ask for what the prompts don't have; called at setup."""
        for bound in self.rewards:
            bound.validate(columns)

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory:
        """Sample one completion and score it."""
        completion = await context.generate(list(prompt.input_ids), self.sampling)
        ids = completion.token_ids
        total, rewards = await self.score_text(prompt, context, completion.text, ids)
        return single_turn(prompt, completion, total, rewards, self.sampling.temperature)

    async def score_text(
        self, prompt: Prompt, context: EpisodeContext, text: str, token_ids: Sequence[int]
    ) -> tuple[float, dict[str, float]]:
        """The weighted sum of the rewards of a text, and each under its name."""
        total = 0.0
        rewards: dict[str, float] = {}
        for bound, weight in zip(self.rewards, self.weights, strict=True):
            arguments = bound.arguments(prompt, text, token_ids)
            named = named_rewards(bound.name, await context.score(bound.reward, **arguments))
            for name, value in named.items():
                clashes = name in rewards and name != bound.name
                own = f"{bound.name}_{name}" if clashes else name
                rewards[free_name(own, rewards)] = value
            total += weight * sum(named.values())
        return total, rewards

    async def try_rewards(self, prompt: Prompt, score: Score) -> None:
        """Refuse a reward that fails whatever the policy answers; called before servers start."""
        for bound in self.rewards:
            await try_reward(bound, prompt, score)


def _weights(given: list[float] | dict[str, float] | None, names: Sequence[str]) -> list[float]:
    if given is None:
        return [1.0] * len(names)
    if isinstance(given, Mapping):
        given = {legal_name(str(name)): weight for name, weight in given.items()}
        if set(given) != set(names):
            raise ConfigError(
                f"`reward_weights` must have the rewards' names {list(names)}, got {list(given)}."
            )
        given = [given[name] for name in names]
    if len(given) != len(names):
        raise ConfigError(
            f"`reward_weights` must have one weight for each of the {len(names)} rewards, got "
            f"{len(given)}."
        )
    for weight in given:
        require_number("reward_weights", weight, least=-MOST)
    return list(given)


def named_rewards(name: str, value: RewardValue) -> dict[str, float]:
    """A reward's value as rewards under their names."""
    if not isinstance(value, Mapping):
        return {name: value}
    named: dict[str, float] = {}
    for own, number in value.items():
        named[free_name(legal_name(own), named)] = number
    return named


def single_turn(
    prompt: Prompt,
    completion: Completion,
    reward: float,
    rewards: Mapping[str, float],
    temperature: float = 1.0,
) -> Trajectory:
    """The trajectory of one prompt and one completion; token ids are joined, never made again."""
    num_prompt, num_sampled = len(prompt.input_ids), len(completion.token_ids)
    return Trajectory(
        input_ids=(*prompt.input_ids, *completion.token_ids),
        response_mask=(False,) * num_prompt + (True,) * num_sampled,
        logprobs=(0.0,) * num_prompt + tuple(completion.logprobs),
        versions=(NO_VERSION,) * num_prompt + tuple(completion.versions),
        reward=reward,
        rewards=rewards,
        text=completion.text,
        truncated=completion.truncated,
        temperature=temperature,
        routes=completion.routes,
    )


def check_trajectory(trajectory: Trajectory | None, admitted_version: int) -> Trajectory:
    """What every workflow's result must be.

    Raises:
        RolloutError: It isn't, and how.
    """
    if not isinstance(trajectory, Trajectory):
        raise RolloutError(f"the workflow returned {trajectory!r} instead of a trajectory.")
    mask = trajectory.response_mask
    lengths = {len(trajectory.input_ids), len(mask), len(trajectory.logprobs)}
    if len(lengths | {len(trajectory.versions)}) > 1:
        raise RolloutError(
            "a trajectory's input_ids, response_mask, logprobs and versions differ in length: "
            f"{len(trajectory.input_ids)}, {len(mask)}, {len(trajectory.logprobs)}, "
            f"{len(trajectory.versions)}."
        )
    if not any(mask):
        raise RolloutError("a trajectory has no sampled token.")
    for name, reward in {"": trajectory.reward, **trajectory.rewards}.items():
        if not is_trainable(reward):
            named = f"reward {name!r}" if name else "reward"
            raise RewardError(f"a trajectory's {named} is {reward}, which is no number in fp32.")
    if not all(map(math.isfinite, trajectory.logprobs)):
        raise RolloutError("a trajectory has a log-probability that is not finite.")
    if trajectory.oldest_version < admitted_version:
        raise RolloutError(
            f"a token was sampled by version {trajectory.oldest_version}, older than version "
            f"{admitted_version} at which its group was let in: a server has old weights."
        )
    return trajectory


def require_workflow(given: Any) -> RolloutWorkflow:
    """A workflow as given; some classes of users only look like one.

    Raises:
        ConfigError: It can't run an episode.
    """
    if isinstance(given, type):
        raise ConfigError(f"`workflow` must be an object, got the class {given.__name__}. Call it.")
    if not callable(getattr(given, "run", None)):
        raise ConfigError(
            f"`workflow` must be a workflow, got {given!r:.60}. A reward alone becomes one as "
            "`RLVRWorkflow(reward)`."
        )
    workflow: RolloutWorkflow = given
    return workflow


def sampling_of(given: Any, place: str = "sampling") -> Sampling:
    """Sampling from an object or from its settings by name.

    Raises:
        ConfigError: It is neither, or has no such setting.
    """
    if isinstance(given, Sampling):
        return given
    known = [each.name for each in fields(Sampling)]
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"`{place}` must be a `Sampling`, such as `Sampling(max_new_tokens=64)`, got {given!r}."
        )
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"`{place}` has no setting {unknown[0]!r}. It has {', '.join(known)}.")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Sampling(**settings)


def check_sampling(sampling: Sampling) -> None:
    """Refuse sampling that can't be trained on: that would bias the importance ratio.

    Raises:
        ConfigError: Which setting, and what to do.
    """
    off = {"top_p": 1.0, "top_k": -1, "min_new_tokens": 0}
    for name, value in off.items():
        if getattr(sampling, name) != value:
            raise ConfigError(
                f"`sampling.{name}` must be {value} in training (it changes the distribution that "
                f"tokens come from, which biases the ratio), got {getattr(sampling, name)}. "
                f"Leave it out; validation may use it, in `evaluation.sampling`."
            )
    if sampling.temperature < _GREEDY_BELOW:
        raise ConfigError(
            f"`sampling.temperature` must be > 0 in training (a group of greedy completions has no "
            f"variance), got {sampling.temperature}. The usual value is 1.0."
        )
    check_stop(sampling, "sampling")


def check_stop(sampling: Sampling, place: str) -> None:
    """Refuse an empty text as the end of a completion.

    Args:
        sampling: What to check.
        place: The name of the setting.
    """
    if not all(sampling.stop):
        raise ConfigError(
            f"`{place}.stop` must hold texts that are not empty, got {list(sampling.stop)}. "
            "Leave the empty one out."
        )


class PerDatasetWorkflow(RolloutWorkflow):
    """Runs each dataset's prompts with a workflow of its own; held-out sets by their names too.

    Args:
        workflows: By the names that `prompts` and `val_prompts` give to their datasets. All must
            sample alike.
    """

    def __init__(self, workflows: dict[str, RolloutWorkflow]) -> None:
        if not workflows:
            raise ConfigError("`workflows` must hold a workflow for each dataset, got none.")
        self.workflows = workflows
        samplings = [each.sampling for each in workflows.values()]
        if any(sampling != samplings[0] for sampling in samplings):
            raise ConfigError(
                "`workflows` must all have the same `sampling` (greedy answers and the room for "
                f"prompts follow from it), got {samplings}. Way out: the largest `max_new_tokens`."
            )
        self.sampling = samplings[0]

    @property
    def asks_once(self) -> bool:
        """Whether all of them do."""
        return all(each.asks_once for each in self.workflows.values())

    @property
    def reward_functions(self) -> list[Reward]:
        """Those of all workflows, each once."""
        found = [f for each in self.workflows.values() for f in each.reward_functions]
        return list({id(function): function for function in found}.values())

    @property
    def runs_programs(self) -> bool:
        """Whether one of them does."""
        return any(each.runs_programs for each in self.workflows.values())

    def of(self, dataset: str) -> RolloutWorkflow:
        """The workflow of a dataset."""
        if dataset not in self.workflows:
            raise ConfigError(
                f"`workflows` must hold one for the dataset {dataset!r}, got "
                f"{sorted(self.workflows)}. Name the datasets of `prompts` and `val_prompts` so."
            )
        return self.workflows[dataset].of(dataset)

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory | None:
        """Run one episode as the prompt's dataset asks."""
        return await self.of(prompt.dataset).run(prompt, context)
