"""A workflow, and with it rewards, for each of several datasets."""

from __future__ import annotations

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.protocols import EpisodeContext, Reward, RolloutWorkflow
from lightning_grpo.types import Prompt, Trajectory


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
