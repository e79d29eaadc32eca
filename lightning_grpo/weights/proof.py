"""The two sides of a proof: what a server scores, and what the trainer expects of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning_grpo.errors import GRPOError
from lightning_grpo.weights.probe import SentScores
from lightning_grpo.weights.transport import UpdateClient

T = TypeVar("T")
Sent = SentScores | Future[SentScores]
"""What the sent weights score; of a future, which the trainer may set while they travel."""


class TrainerFailedError(GRPOError, RuntimeError):
    """What the trainer promised will not come: no server is to blame."""


@contextmanager
def promised(*promises: Future[Any]) -> Iterator[None]:
    """An error in here breaks what was not set yet: nobody waits for it in vain.

    Whoever waits gets a `TrainerFailedError` of it: a signal's `SystemExit` would end the event
    loop.
    """
    try:
        yield
    except BaseException as error:
        for promise in promises:
            if not promise.done():
                broken = TrainerFailedError(f"the trainer failed: {error!r}")
                broken.__cause__ = error
                promise.set_exception(broken)
        raise


def require_trainer(promise: Any) -> None:
    """Raises the `TrainerFailedError` of a promise that is broken."""
    if isinstance(promise, Future) and promise.done():
        promise.result()


async def settled(given: T | Future[T]) -> T:
    """The value; a deadline that passes meanwhile leaves a future to whoever sets it."""
    if isinstance(given, Future):
        return await asyncio.shield(asyncio.wrap_future(given))
    return given


async def scores_of(
    client: UpdateClient, sequences: Sequence[Sequence[int]], extra_key: str, timeout_s: float
) -> list[list[float]]:
    """What a server gives each token of the sequences, `[sequences][tokens]`."""
    asked = [client.score(list(ids), extra_key=extra_key, timeout_s=timeout_s) for ids in sequences]
    return list(await asyncio.gather(*asked))
