"""What the workflows of this folder share: rewards on the end of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_grpo.agents.record import EpisodeRecord
from lightning_grpo.errors import RewardError
from lightning_grpo.rollout.protocols import EpisodeContext
from lightning_grpo.rollout.workflow import RLVRWorkflow, named_rewards
from lightning_grpo.types import Prompt


class RewardedWorkflow(RLVRWorkflow):
    """Scores the last completion; rewards that name `messages` get all that came before it."""

    async def score(
        self,
        prompt: Prompt,
        context: EpisodeContext,
        record: EpisodeRecord,
        messages: Sequence[Mapping[str, Any]],
    ) -> tuple[float, dict[str, float]]:
        """The weighted sum of the rewards, and each under its name."""
        told = replace(prompt, messages=tuple(messages))
        return await self.score_text(told, context, record.last.text, record.last.token_ids)

    async def score_text(
        self, prompt: Prompt, context: EpisodeContext, text: str, token_ids: Sequence[int]
    ) -> tuple[float, dict[str, float]]:
        """The same for a text that is not a completion's own."""
        total = 0.0
        rewards: dict[str, float] = {}
        for bound, weight in zip(self.rewards, self.weights, strict=True):
            arguments = bound.arguments(prompt, text, token_ids)
            named = named_rewards(bound.name, await context.score(bound.reward, **arguments))
            twice = rewards.keys() & named.keys()
            if twice:
                raise RewardError(f"two rewards are named {sorted(twice)[0]!r}. Rename one.")
            rewards.update(named)
            total += weight * sum(named.values())
        return total, rewards
