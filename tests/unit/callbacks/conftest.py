"""A trainer that runs the callbacks under test, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable

import lightning as L
import pytest
from rich.console import Console


@pytest.fixture
def console() -> Console:
    """A console that is no terminal and keeps what was printed."""
    return Console(file=io.StringIO(), highlight=False, width=200)


@pytest.fixture
def printed(console) -> Callable[[], str]:
    """What was printed so far."""
    return console.file.getvalue


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., L.Trainer]:
    """A quiet trainer on the CPU."""

    def make(**settings) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **settings})

    return make
