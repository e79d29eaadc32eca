"""Spans: which weights sampled which tokens."""

from __future__ import annotations

from lightning_grpo.engine.requests import Request, VersionSpan
from tests.fakes.engine_requests import PLAIN, ignore


def test_spans_follow_the_versions_and_leave_no_empty_one() -> None:
    request = Request(PLAIN, ignore)
    assert request.spans(0) == ()
    request.note_version("a", 0)
    assert request.spans(0) == ()
    assert request.spans(4) == (VersionSpan("a", 0, 4),)
    request.note_version("b", 4)
    request.note_version("c", 4)
    assert request.spans(4) == (VersionSpan("a", 0, 4),)
    assert request.spans(6) == (VersionSpan("a", 0, 4), VersionSpan("c", 4, 6))
    request.note_version("c", 6)
    assert request.spans(7) == (VersionSpan("a", 0, 4), VersionSpan("c", 4, 7))


def test_a_version_before_the_first_token_replaces_the_first() -> None:
    request = Request(PLAIN, ignore)
    request.note_version("a", 0)
    request.note_version("b", 0)
    assert request.spans(2) == (VersionSpan("b", 0, 2),)
