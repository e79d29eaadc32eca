"""`lightning-grpo test`: one pass over the test prompts with the config of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_grpo.cli.fit import run_trainer


def run(argv: Sequence[str]) -> int:
    """Evaluate on `data.test_prompts`; takes `fit`'s configs and `--ckpt_path`."""
    return run_trainer("test", argv)
