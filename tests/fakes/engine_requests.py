"""A plain request for the engine's parts, to be varied by tests."""

from __future__ import annotations

from lightning_grpo.engine.batch import Output
from lightning_grpo.engine.requests import Generation

VOCAB = 20
PLAIN = Generation(
    rid="r",
    input_ids=(1, 2, 3),
    max_new_tokens=100,
    sampling_seed=0,
    stop=(),
    stop_ids=frozenset(),
    return_logprob=True,
    logprob_start=None,
    extra_key=None,
)


def ignore(_: Output) -> None:
    """Hear nothing."""
