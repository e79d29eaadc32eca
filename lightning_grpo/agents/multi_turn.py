"""Retry with feedback: the policy answers, is told that it is wrong, and answers again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from lightning_grpo.agents.record import EpisodeRecord
from lightning_grpo.agents.rewarded import RewardedWorkflow
from lightning_grpo.agents.turns import messages_of, next_ids, with_answer
from lightning_grpo.checks import MOST, require_count, require_number
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.binding import BoundReward, Rewards
from lightning_grpo.rollout.chat import Message
from lightning_grpo.rollout.protocols import EpisodeContext
from lightning_grpo.types import Prompt, Sampling, Trajectory

_DEFAULT_SAMPLING = Sampling()
_TRY_AGAIN = "Your answer is not right. Please think again and give another answer."


class MultiTurnWorkflow(RewardedWorkflow):
    """Answers until the reward is reached, told after each miss what to mend.

    The episode's reward is the last answer's, times `turn_discount` for each turn before it. It
    ends early when an answer was cut off by the length limit, or `feedback` has nothing to say.

    Args:
        reward: A function, or several (a list, or by name), called on every answer. `messages` is
            the conversation before the answer.
        feedback: Makes what is said after a miss: a function (sync or async) that names its
            arguments as a reward does and returns a text, or None to end. It runs on the event
            loop, so it must be quick. None: `retry_text` is said.
        retry_text: What is said where there is no `feedback`.
        sampling: How each answer is sampled; `max_new_tokens` is for one turn.
        reward_weights: A weight for each function, or by name; None: all 1.
        max_turns: Most answers.
        turn_discount: What a turn costs, as a factor.
        passing_reward: From this (undiscounted, weighted) reward on there is no further turn.
        max_tokens: No further turn is begun that could end behind this many tokens in all.
    """

    def __init__(  # noqa: PLR0913 - config surface: what a YAML file may set
        self,
        reward: Rewards,
        feedback: Callable[..., Any] | None = None,
        retry_text: str = _TRY_AGAIN,
        sampling: Sampling = _DEFAULT_SAMPLING,
        reward_weights: list[float] | dict[str, float] | None = None,
        max_turns: int = 2,
        turn_discount: float = 1.0,
        passing_reward: float = 1.0,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(reward, sampling, reward_weights)
        require_count("max_turns", max_turns)
        require_number("passing_reward", passing_reward, least=-MOST)
        if max_tokens is not None:
            require_count("max_tokens", max_tokens)
        if not 0 < turn_discount <= 1:
            raise ConfigError(
                f"`turn_discount` must be > 0 and <= 1 (a factor for each turn), got "
                f"{turn_discount}. 1 makes turns free."
            )
        self.retry_text = retry_text
        self.max_turns = max_turns
        self.turn_discount = turn_discount
        self.passing_reward = passing_reward
        self.max_tokens = max_tokens
        # No union with text: a mistyped import path would become what is said.
        self._asked = None if feedback is None else BoundReward(feedback)

    def validate(self, columns: Collection[str]) -> None:
        """Refuse rewards and feedback that ask for what the prompts don't have."""
        super().validate(columns)
        if self._asked is not None:
            self._asked.validate(columns)

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory:
        """Run one conversation."""
        messages = messages_of(prompt)
        record = EpisodeRecord().told(prompt.input_ids)
        for turn in range(self.max_turns):
            completion = await context.generate(list(record.input_ids), self.sampling)
            record = record.sampled(completion)
            total, rewards = await self.score(prompt, context, record, messages)
            last = turn + 1 == self.max_turns or completion.truncated
            if last or total >= self.passing_reward:
                break
            said = await self._feedback(prompt, record, messages)
            if said is None:
                break
            told: Message = {"role": "user", "content": said}
            longer = record.told(next_ids(context.tokenizer, completion, [told]))
            if not self._has_room(longer):
                break
            record = longer
            messages = [*with_answer(messages, completion.text), dict(told)]
        discounted = total * self.turn_discount ** (len(record.completions) - 1)
        return record.trajectory(discounted, rewards, self.sampling.temperature)

    def _has_room(self, record: EpisodeRecord) -> bool:
        if self.max_tokens is None:
            return True
        return len(record.input_ids) + self.sampling.max_new_tokens <= self.max_tokens

    async def _feedback(
        self, prompt: Prompt, record: EpisodeRecord, messages: list[dict[str, Any]]
    ) -> str | None:
        if self._asked is None:
            return self.retry_text
        told = replace(prompt, messages=tuple(messages))
        arguments = self._asked.arguments(told, record.last.text, record.last.token_ids)
        said = self._asked.reward(**arguments)
        if inspect.isawaitable(said):
            said = await said
        if said is not None and not isinstance(said, str):
            raise ConfigError(f"`feedback` must return a text or None, got {said!r}.")
        return said
