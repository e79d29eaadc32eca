"""What the parts of the rollout expect of each other and of the user's code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Protocol

from lightning_grpo.types import Completion, Prompt, Sampling, Trajectory

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

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
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
        self, input_ids: list[int], sampling: Sampling | None = None, *, trained: bool = True
    ) -> Completion:
        """Sample one continuation; the seed, the group and the priority are the context's.

        Args:
            input_ids: What to continue.
            sampling: How to sample; None: as the workflow's `sampling` says.
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
