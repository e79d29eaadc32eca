"""A plain request for the engine's parts, to be varied by tests."""

from __future__ import annotations

from lightning_grpo.engine.requests import Generation, Output

VOCAB = 20
PLAIN = Generation(
    rid="r",
    input_ids=(1, 2, 3),
    max_new_tokens=100,
    temperature=1.0,
    greedy=False,
    top_p=1.0,
    top_k=VOCAB,
    min_p=0.0,
    min_new_tokens=0,
    seed=0,
    stop=(),
    stop_ids=frozenset(),
    return_logprob=True,
    logprob_start=None,
    extra_key=None,
    skip_special_tokens=True,
    spaces_between_special_tokens=True,
    no_stop_trim=False,
)


def ignore(_: Output) -> None:
    """Hear nothing."""
