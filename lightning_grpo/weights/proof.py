"""The two sides of a proof: what a server scores, and what the trainer expects of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

from lightning_grpo.weights.probe import Scores
from lightning_grpo.weights.transport import UpdateClient

Expected = Scores | Future[Scores]
"""The trainer's scores; of a future, which it may set while the weights travel."""


async def settled(expected: Expected) -> Scores:
    """The scores; a deadline that passes meanwhile leaves the future to whoever sets it."""
    if isinstance(expected, Future):
        return await asyncio.shield(asyncio.wrap_future(expected))
    return expected


async def scores_of(
    client: UpdateClient, sequences: Sequence[Sequence[int]], extra_key: str, timeout_s: float
) -> list[list[float]]:
    """What a server gives each token of the sequences, `[sequences][tokens]`."""
    asked = [client.score(list(ids), extra_key=extra_key, timeout_s=timeout_s) for ids in sequences]
    return list(await asyncio.gather(*asked))
