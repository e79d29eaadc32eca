"""Evaluation: every prompt, whole, past the staleness gate."""

from __future__ import annotations

from collections.abc import Iterable

import anyio

from lightning_grpo.checks import require_count
from lightning_grpo.errors import ConfigError, RolloutError, ServersLostError
from lightning_grpo.rollout.episodes import Attempt, EpisodeRunner, Request, first_line
from lightning_grpo.types import Group, Prompt, Sampling

_FATAL = (ConfigError, ServersLostError)


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
    for attempt in range(1, max_attempts + 1):
        request = Request(
            attempt, group_key=("evaluation", prompt.row), priority=True, sampling=sampling
        )
        try:
            trajectories = await runner.run(prompt, request, Attempt(), num_samples)
        except _FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - tried again, then raised by name
            failure = error
        else:
            oldest = min(trajectory.oldest_version for trajectory in trajectories)
            return Group(prompt, trajectories, oldest, attempt)
    raise RolloutError(
        f"evaluation prompt {prompt.row} failed {max_attempts} times; last: {first_line(failure)}"
    ) from failure
