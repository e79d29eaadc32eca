"""What the engine refuses; each becomes one HTTP answer and touches nothing else."""

from __future__ import annotations

from lightning_grpo.errors import GRPOError


class BadRequestError(GRPOError, ValueError):
    """A request that can't be served; answered with status 400 and this message."""


class WeightUpdateError(GRPOError, RuntimeError):
    """New weights that can't be taken; the old ones stay. Answered with status 400."""


class UnservableError(GRPOError, RuntimeError):
    """A model with a part that the engine doesn't have."""
