"""A trainer whose weights move with every version, and requests that never cease."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.serving.pool import ServerPool
from lightning_grpo.types import Completion, Sampling
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.proof import Probe, SentScores
from lightning_grpo.weights.publisher import PublishReport, WeightPublisher
from tests.sglang.scoring import full_logprobs

IN_FLIGHT = 16
TOKENS = 150
PROBE = Probe(((3, 9, 4, 200, 31), (77, 5, 12)))


class MovingWeights:
    """Weights that move with every version; any version's can be had again."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._first = {n: p.detach().clone() for n, p in self._model.named_parameters()}

    def at(self, version: int) -> torch.nn.Module:
        """The model of a version."""
        noise = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                step = torch.randn(parameter.shape, generator=noise) * 0.03 * bool(version)
                parameter.copy_(self._first[name] + step)
        return self._model

    def scores(self, version: int) -> SentScores:
        model = self.at(version)
        return SentScores(
            [[0.0, *full_logprobs(model, list(ids)).tolist()] for ids in PROBE.sequences]
        )

    async def publish(self, publisher: WeightPublisher, version: int) -> PublishReport:
        snapshot = {n: t.clone() for n, t in gather_weights(self.at(version)).items()}
        return await publisher.publish(snapshot, version, self.scores(version))


class Traffic:
    """Keeps requests in flight until told to stop."""

    def __init__(self, pool: ServerPool) -> None:
        self.done: list[tuple[list[int], Completion]] = []
        self.stopping = False
        self._pool = pool

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for index in range(IN_FLIGHT // 2):
                tasks.create_task(self._one_after_the_other(index))
            yield
            self.stopping = True

    async def _one_after_the_other(self, index: int) -> None:
        for number in range(10_000):
            if self.stopping:
                return
            prompt = [10 + index, 20 + number % 400, 30, 40]
            pair = [self._pool.generate(prompt, Sampling(max_new_tokens=TOKENS)) for _ in range(2)]
            self.done += [(prompt, completion) for completion in await asyncio.gather(*pair)]


def largest_difference(trainer: MovingWeights, done: list[tuple[list[int], Completion]]) -> float:
    """Recomputes every token's logprob under the version that it claims; the largest difference."""
    by_version: dict[int, list[tuple[list[int], Completion]]] = defaultdict(list)
    for prompt, completion in done:
        for version in set(completion.versions):
            by_version[version].append((prompt, completion))
    worst = 0.0
    for version, completions in by_version.items():
        model = trainer.at(version)
        for prompt, completion in completions:
            expected = full_logprobs(model, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
            mine = torch.tensor(completion.versions) == version
            difference = (expected - torch.tensor(completion.logprobs)).abs()[mine]
            worst = max(worst, float(difference.max()))
    return worst
