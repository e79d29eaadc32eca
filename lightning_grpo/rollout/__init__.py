"""Prompts in, groups of trajectories out: torch-free asyncio around inference servers."""

# The one name that configs spell by its package; its module imports nothing but the records.
from lightning_grpo.rollout.producer import has_variance as has_variance
