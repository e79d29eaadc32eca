"""The report as Markdown, for a terminal, a note or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from lightning_grpo.report.findings import command_to_go_on, findings
from lightning_grpo.report.run import Run

_ROWS = 12
_COLUMNS = (
    "reward/mean",
    "completion/length_mean",
    "completion/truncated_fraction",
    "policy/entropy",
    "policy/grad_norm",
    "staleness/mean",
    "throughput/tokens_per_s",
    "time/step_s",
)
# A terminal shows them, so no more than needed: within a word `_` is itself, and `>` but at first.
_MARKUP = re.compile(r"([\\`*\[\]<|#]|(?<![^\W_])_|_(?![^\W_])|^>)")


def markdown(runs: Sequence[Run]) -> str:
    """Every run: its findings, its curve in some rows, what was said, how it was set up."""
    parts = [_comparison(runs)] if len(runs) > 1 else []
    return "\n".join([*parts, *("\n".join(_run(run)) for run in runs)])


def _comparison(runs: Sequence[Run]) -> str:
    """The runs beside each other."""
    rows = []
    for run in runs:
        score = run.score
        scores = [value for _, value in run.series(score)] if score else []
        rewards = [value for _, value in run.series("reward/mean")][-5:]
        times = [value for _, value in run.series("time/step_s")]
        figures = (
            max(scores, default=None),
            scores[-1] if scores else None,
            fmean(rewards) if rewards else None,
            median(times) if times else None,
        )
        rows.append([escaped(run.name), str(len(run.trained)), *map(_number, figures)])
    head = ("run", "steps", "best held-out", "last held-out", "last reward", "s/step")
    return "\n".join(["# Runs", "", *_table(head, rows), ""])


def _run(run: Run) -> Iterator[str]:
    yield f"# {escaped(run.name)}"
    yield ""
    for finding in findings(run):
        yield f"**{finding.question}** {escaped(finding.answer)}"
        yield ""
        for line in finding.details:
            yield f"- {escaped(line)}"
        if finding.details:
            yield ""
    yield from _curve(run)
    if run.timeline.marks:
        yield from ("## What was said meanwhile", "")
        yield from (f"- step {mark.step}: {escaped(mark.text)}" for mark in run.timeline.marks)
        yield ""
    yield from _setup(run)


def _curve(run: Run) -> Iterator[str]:
    """What a run is judged by, at some steps."""
    names = [name for name in (run.score, *_COLUMNS) if name and run.series(name)]
    if not names:
        return
    last = len(run.steps) - 1
    places = sorted({round(i * last / (_ROWS - 1)) for i in range(_ROWS)})
    # Validations are few: each has its row.
    score = run.score
    measured = {step for step, _ in run.series(score)} if score else set()
    places = sorted({*places, *(run.steps.index(step) for step in list(measured)[-_ROWS:])})
    rows = [
        [str(run.steps[place]), *(_number(run.table[name][place]) for name in names)]
        for place in places
    ]
    yield from ("## Over the steps", "")
    yield from _table(("step", *names), rows)
    yield ""


def _setup(run: Run) -> Iterator[str]:
    start = run.timeline.starts[-1] if run.timeline.starts else None
    if start is not None:
        lines = {**start.described, "machine": start.machine}
        lines["versions"] = ", ".join(f"{name} {text}" for name, text in start.versions.items())
        yield from ("## How it was set up", "")
        yield from (f"- {escaped(k)}: {escaped(v)}" for k, v in lines.items() if v)
        yield ""
    yield from (
        "To go on:" if run.has_checkpoint else "To run it again:",
        "",
        f"    {command_to_go_on(run)}",
        "",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' ---: |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def escaped(text: str) -> str:
    """A stranger's text as Markdown shows it, in one line: neither links nor HTML."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
