"""What the workflows of this folder share: rewards on the end of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_grpo.agents.record import EpisodeRecord
from lightning_grpo.rollout.protocols import EpisodeContext
from lightning_grpo.rollout.workflow import RLVRWorkflow
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
