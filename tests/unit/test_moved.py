"""Paths of modules that moved."""

import importlib

import pytest

from lightning_grpo.hparams import import_object
from lightning_grpo.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_of_today(old):
    today = importlib.import_module(f"lightning_grpo.{MOVED[old]}")
    assert importlib.import_module(f"lightning_grpo.{old}") is today


def test_a_class_by_its_old_path_is_the_class_of_today():
    from lightning_grpo import SAPOLoss

    assert import_object("lightning_grpo.algorithm.trust_losses.SAPOLoss") is SAPOLoss


def test_a_path_that_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_grpo.rollout.never_was")
