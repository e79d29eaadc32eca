"""Stop strings that are spelled by any tokens."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from lightning_grpo.engine.batch import Output, Request, find_stop
from lightning_grpo.engine.http import reply_text
from tests.fakes.engine_requests import PLAIN, ignore
from tests.fakes.tiny_model import make_tiny_tokenizer


@pytest.mark.parametrize("stop", ["apples", "\n####", "s.\n", "<|im_end|>", "\u2603"])
def test_a_stop_string_is_found_whatever_tokens_spell_it(stop: str) -> None:
    tokenizer = make_tiny_tokenizer()
    text = f"Tom has many things {stop}"
    whole = tokenizer(text)["input_ids"]
    # Byte by byte, as a random model may write it.
    bytewise = [i for character in text for i in tokenizer(character)["input_ids"]]
    for ids in (whole, bytewise):
        found = [k for k in range(1, len(ids) + 1) if find_stop(tokenizer, [stop], ids[:k])]
        assert found[:1] == [len(ids)]
        # What came long ago is not looked through again.
        assert find_stop(tokenizer, [stop], ids * 2 + whole[:1] * 100) is None


def test_the_first_listed_string_is_named_and_none_is_none() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("one two")["input_ids"]
    assert find_stop(tokenizer, ["two", "one"], ids) == "two"
    assert find_stop(tokenizer, ["three"], ids) is None


def said(text: str, matched: str | int | None, **asked: Any) -> str:
    """The reply's text of a completion that spells `text`."""
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    request = Request(structs.replace(PLAIN, **asked), ignore, output_ids=ids)
    return reply_text(Output(request, len(ids), {"matched": matched}, "default"), tokenizer)


def test_text_is_cut_at_its_string_and_not_at_a_token() -> None:
    assert said("a STOP b STOP", "STOP") == "a "
    assert said("a STOP b STOP", "STOP", no_stop_trim=True) == "a STOP b STOP"
    assert said("a 2 b.", 2) == "a 2 b"
    assert said("a", None) == "a"


def test_decoding_can_leave_special_tokens_out() -> None:
    assert said("hi<|im_end|>", None) == "hi"
    assert said("hi<|im_end|>", None, skip_special_tokens=False) == "hi<|im_end|>"
