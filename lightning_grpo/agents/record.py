"""The token ids of an episode as it grows: appended to, never made again from text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_grpo.errors import RolloutError
from lightning_grpo.types import NO_VERSION, Completion, Trajectory


@dataclass(frozen=True)
class EpisodeRecord:
    """What was asked, sampled and told so far; `told` and `sampled` give longer ones.

    Attributes:
        input_ids: Every token in order, `[tokens]`.
        completions: Each completion and where it begins.
    """

    input_ids: tuple[int, ...] = ()
    completions: tuple[tuple[int, Completion], ...] = ()

    @property
    def last(self) -> Completion:
        """The latest completion."""
        if not self.completions:
            raise RolloutError("nothing was sampled in the episode.")
        return self.completions[-1][1]

    def told(self, token_ids: Sequence[int]) -> EpisodeRecord:
        """With what the policy did not sample: a prompt, feedback, a tool's result."""
        return EpisodeRecord((*self.input_ids, *token_ids), self.completions)

    def sampled(self, completion: Completion) -> EpisodeRecord:
        """With a completion of all that stands before it."""
        start = len(self.input_ids)
        return EpisodeRecord(
            (*self.input_ids, *completion.token_ids), (*self.completions, (start, completion))
        )

    def trajectory(
        self, reward: float, rewards: Mapping[str, float], temperature: float = 1.0
    ) -> Trajectory:
        """The episode as a trajectory.

        Raises:
            RolloutError: The ids at a completion's place are not those that were sampled.
        """
        length = len(self.input_ids)
        mask, versions = [False] * length, [NO_VERSION] * length
        logprobs = [0.0] * length
        for start, completion in self.completions:
            end = start + len(completion.token_ids)
            if self.input_ids[start:end] != tuple(completion.token_ids) or any(mask[start:end]):
                raise RolloutError(
                    f"tokens {start} to {end} of the episode are not the ids that were sampled "
                    "there: a history was made anew from text."
                )
            mask[start:end] = [True] * (end - start)
            logprobs[start:end] = completion.logprobs
            versions[start:end] = completion.versions
        return Trajectory(
            input_ids=self.input_ids,
            response_mask=tuple(mask),
            logprobs=tuple(logprobs),
            versions=tuple(versions),
            reward=reward,
            rewards=rewards,
            text=self.last.text,
            truncated=self.last.truncated,
            temperature=temperature,
            num_turns=len(self.completions),
        )
