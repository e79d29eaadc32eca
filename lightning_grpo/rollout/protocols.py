"""What a workflow is given, and how rewards are bound to their arguments."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Protocol

from lightning_grpo.errors import ConfigError
from lightning_grpo.types import AnySampling, Completion, Prompt, Sampling, Trajectory

Reward = Callable[..., Any]
"""`reward(prompt, completion, **columns) -> float | dict[str, float]`; sync or async."""

RewardValue = float | dict[str, float]
"""What a reward comes to: one number, or several under their names."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages, to text or to token ids."""
        ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Turn text into token ids."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Turn token ids into text."""
        ...


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


_PROGRAMS = "lightning_grpo.rewards.program"


class EpisodeContext(Protocol):
    """What a workflow may use, and nothing else."""

    tokenizer: Tokenizer

    async def generate(
        self, input_ids: Sequence[int], sampling: AnySampling | None = None, *, trained: bool = True
    ) -> Completion:
        """Sample one continuation; the seed, the group and the priority are the context's.

        Args:
            input_ids: What to continue.
            sampling: How to sample, or its settings by name; None: as the workflow's `sampling`
                says.
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


RESERVED = (
    "prompt",
    "messages",
    "completion",
    "completions",
    "prompt_ids",
    "completion_ids",
)
"""Arguments that are no column. `completions` is AReaL's name of `completion`."""

TEXT_ASKED = "_text_asked"
"""Offered besides: what `from_trl` decides by; None for a conversation."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class BoundReward:
    """A reward function and the names that it asks for.

    Args:
        reward: Any callable; its parameters are reserved names or columns, each by its name.
            `**kwargs` receives all columns.
        name: What it is logged under; empty: its own name.
    """

    def __init__(self, reward: Reward, name: str = "") -> None:
        if not callable(reward):
            raise ConfigError(f"a reward must be callable, got {reward!r}.")
        self.reward = reward
        self.name = name or legal_name(reward_name(reward))
        self._required: list[str] = []
        self._names: set[str] = set()
        self._takes_all = False
        for parameter in self._signature().parameters.values():
            self._add(parameter)

    def _add(self, parameter: inspect.Parameter) -> None:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            self._takes_all = True
        elif parameter.kind in _NAMED:
            self._names.add(parameter.name)
            if parameter.default is inspect.Parameter.empty:
                self._required.append(parameter.name)
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward {self.name!r} has a positional-only argument {parameter.name!r}: "
                "rewards are called by name. Remove the `/`."
            )

    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.reward)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"reward {self.name!r} has no readable signature ({error}). "
                "Wrap it in a function that names its arguments."
            ) from error

    def validate(self, columns: Collection[str]) -> None:
        """Refuse an argument that nothing provides, and a column that hides a reserved name."""
        hidden = sorted(set(columns) & set(RESERVED))
        if hidden:
            raise ConfigError(
                f"column {hidden[0]!r} hides an argument of that name which rewards receive. "
                "Rename it with `transform`."
            )
        missing = [name for name in self._required if name not in {*columns, *RESERVED}]
        if missing:
            raise ConfigError(
                f"reward {self.name!r} asks for {missing[0]!r}, which is no column. "
                f"Columns: {sorted(columns)}; always there: {sorted(RESERVED)}."
            )

    def arguments(
        self, prompt: Prompt, completion: str, completion_ids: Sequence[int]
    ) -> dict[str, Any]:
        """The arguments to call the reward with."""
        offered: Mapping[str, Any] = {
            **prompt.columns,
            "prompt": prompt.text,
            "messages": [dict(message) for message in prompt.messages],
            "completion": completion,
            "completions": completion,
            "prompt_ids": list(prompt.input_ids),
            "completion_ids": list(completion_ids),
            TEXT_ASKED: prompt.asked,
        }
        wanted = set(self._names)
        if self._takes_all:
            wanted |= set(prompt.columns)
        return {name: offered[name] for name in offered if name in wanted}


Rewards = list[Callable[..., Any]] | Callable[..., Any] | dict[str, Callable[..., Any]]
"""A reward, several, or several by the names that they are logged under."""


def bind_rewards(reward: Rewards) -> list[BoundReward]:
    """Each function with a name of its own that every logger takes.

    Raises:
        ConfigError: There is none, or one that can't be called by name.
    """
    if isinstance(reward, Mapping):
        named = [(str(name), function) for name, function in reward.items()]
    else:
        functions = reward if isinstance(reward, list | tuple) else [reward]
        named = [("", function) for function in functions]
    if not named:
        kind = "dictionary" if isinstance(reward, Mapping) else "list"
        raise ConfigError(f"`reward` must name at least one function, got an empty {kind}.")
    bound = [BoundReward(function, legal_name(name) if name else "") for name, function in named]
    taken: set[str] = set()
    for each in bound:
        each.name = free_name(each.name, taken)
        taken.add(each.name)
    return bound


def legal_name(name: str) -> str:
    """A name without what a logger refuses (MLflow takes letters, digits and `_ - .` only)."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "reward"


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or with the first number that makes it another."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def reward_name(reward: Reward) -> str:
    """The name that a reward is logged under: the function's, or the class's of an object."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    named = inspect.isroutine(reward) or inspect.isclass(reward)
    return str(reward.__name__ if named else type(reward).__name__)
