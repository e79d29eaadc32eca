"""Errors: a refused setting is a record, whose sentence is made once."""

from __future__ import annotations

import pickle

from lightning_grpo.errors import ConfigError, PromptError, UnreadableError


def test_a_record_makes_its_sentence():
    error = ConfigError("group_size", "must be >= 2", 1, "Raise it.")
    assert str(error) == "`group_size` must be >= 2, got 1. Raise it."
    assert error.sentence == "`group_size` must be >= 2, got 1"


def test_a_value_that_was_left_out_is_not_told_and_none_is():
    assert str(ConfigError("lora", "must be set")) == "`lora` must be set."
    assert str(ConfigError("lora", "must be set", None)) == "`lora` must be set, got None."


def test_a_sentence_of_its_own_has_no_setting_but_a_way_out():
    error = PromptError("The moon\nis full. Wait.")
    assert (error.setting, error.sentence, error.way_out) == ("", "The moon is full", "Wait.")
    assert str(error) == "The moon\nis full. Wait."


def test_a_record_survives_the_way_between_processes():
    sent = UnreadableError("path", "must be a recording", "x.csv", "Name another.")
    came = pickle.loads(pickle.dumps(sent))
    assert (type(came), str(came), came.value) == (UnreadableError, str(sent), "x.csv")
