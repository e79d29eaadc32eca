"""Stop strings that are spelled by any tokens."""

from __future__ import annotations

import pytest

from lightning_grpo.engine.slots import decode_text, find_stop, stop_window, trim
from tests.fakes.tiny_model import make_tiny_tokenizer


@pytest.mark.parametrize("stop", ["apples", "\n####", "s.\n", "<|im_end|>", "\u2603"])
def test_a_stop_string_is_found_whatever_tokens_spell_it(stop: str) -> None:
    tokenizer = make_tiny_tokenizer()
    text = f"Tom has many things {stop}"
    whole = tokenizer(text)["input_ids"]
    # Byte by byte, as a random model may write it.
    bytewise = [i for character in text for i in tokenizer(character)["input_ids"]]
    for ids in (whole, bytewise):
        found = [
            k
            for k in range(1, len(ids) + 1)
            if find_stop(tokenizer, [stop], ids[max(0, k - stop_window([stop])) : k])
        ]
        assert found[:1] == [len(ids)]


def test_the_first_listed_string_is_named_and_none_is_none() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("one two")["input_ids"]
    assert find_stop(tokenizer, ["two", "one"], ids) == "two"
    assert find_stop(tokenizer, ["three"], ids) is None


def test_text_is_cut_at_its_string_and_not_at_a_token() -> None:
    assert trim("a STOP b STOP", "STOP") == "a "
    assert trim("a 2 b", 2) == "a 2 b"
    assert trim("a", None) == "a"


def test_decoding_can_leave_special_tokens_out() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("hi<|im_end|>")["input_ids"]
    assert decode_text(tokenizer, ids, skip_special_tokens=True) == "hi"
    assert decode_text(tokenizer, ids, skip_special_tokens=False) == "hi<|im_end|>"
