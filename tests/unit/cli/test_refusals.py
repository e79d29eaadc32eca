"""A constructor's refusal is told at the setting that it is about."""

from __future__ import annotations

import pytest

from lightning_grpo.cli.mistakes import locate
from lightning_grpo.cli.sources import collect

WRITTEN = collect(
    [],
    [
        *("--data.servers.class_path", "lightning_grpo.RunningServers"),
        *("--data.servers.urls", "[127.0.0.1:30000, 127.0.0.1:30001]"),
        *("--data.group_size", "1"),
        *("--trainer.max_steps", "3"),
    ],
)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        (
            "`group_size` must be >= 2 (an advantage needs a baseline), got 1. Way out.",
            "group_size",
        ),
        ("`servers.python` names no interpreter. Make one.", "data.servers"),
        ("http://127.0.0.1:30001 has another tokenizer. Start it.", "data.servers.urls.1"),
    ],
)
def test_it_is_the_one_named_or_its_owner_or_the_one_whose_value_is_repeated(message, key):
    problem = locate(message, WRITTEN)
    assert problem.key.endswith(key)
    assert problem.where == "command line"
    assert problem.lines()[0] == f"{problem.key} (command line)"


def test_without_a_setting_the_message_stands_alone():
    assert str(locate("The moon is full. Wait.", WRITTEN)) == "The moon is full\n  Wait."
