"""Spans: which weights sampled which tokens."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from lightning_grpo.engine.batch import Output, Request
from lightning_grpo.engine.requests import GenerateBody, Intake
from lightning_grpo.engine.scheduler import Unread
from tests.fakes.engine_requests import PLAIN, ignore
from tests.fakes.tiny_model import make_tiny_tokenizer


def spans(versions: str) -> list[tuple[str, int, int]]:
    """Those of a completion whose tokens were sampled by these weights, one letter each."""
    request = Request(PLAIN, ignore, output_ids=[5] * len(versions), versions=list(versions))
    output = Output(request, len(versions), None, "now")
    return [(span["version"], span["start"], span["end"]) for span in output.spans]


def test_spans_follow_the_versions_and_leave_no_empty_one() -> None:
    assert spans("") == []
    assert spans("aaaa") == [("a", 0, 4)]
    assert spans("aaaacc") == [("a", 0, 4), ("c", 4, 6)]
    assert spans("aaaacca") == [("a", 0, 4), ("c", 4, 6), ("a", 6, 7)]


def test_spans_end_where_the_output_does() -> None:
    request = Request(PLAIN, ignore, output_ids=[5] * 4, versions=["a", "a", "b", "b"])
    assert [s["end"] for s in Output(request, 3, None, "b").spans] == [2, 3]


# ---- streams whose reader is slow ---------------------------------------------------------------


def output(*ids: int) -> Output:
    return Output(Request(PLAIN, ignore, output_ids=list(ids)), len(ids), None, "default")


async def read(unread: Unread) -> tuple[int, list[int]]:
    index, read = await unread.get()
    return index, read.token_ids


@pytest.mark.anyio
async def test_a_reader_who_is_slow_is_told_the_newest_of_each_completion_in_turn():
    unread = Unread()
    unread.put(0, output(5))
    assert await read(unread) == (0, [5])
    for length in range(1, 1000):
        unread.put(length % 3, output(*range(length)))
    told = [await read(unread) for _ in range(3)]
    assert [(index, len(ids)) for index, ids in told] == [(1, 997), (2, 998), (0, 999)]
    unread.put(1, output(7))
    assert await read(unread) == (1, [7])


def test_a_text_is_gone_on_from_without_the_mark_that_would_end_it() -> None:
    tokenizer = make_tiny_tokenizer()
    plain = tokenizer.encode("3 + 4")
    end = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    ended = TemplateProcessing("$A <|im_end|>", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = ended
    assert tokenizer.encode("3 + 4") == [*plain, end[1]]
    intake = Intake(1000, 640, frozenset(), tokenizer, deterministic=False)
    (asked,), _ = intake.generations(GenerateBody(text="3 + 4"))
    assert list(asked.input_ids) == plain
