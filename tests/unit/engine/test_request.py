"""Spans: which weights sampled which tokens."""

from __future__ import annotations

from lightning_grpo.engine.batch import Output, Request
from tests.fakes.engine_requests import PLAIN, ignore


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
