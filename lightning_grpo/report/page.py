"""The report as one page: its data, its HTML, and a server that keeps it fresh.

The page needs nothing but itself: style, programs and data are in it, and its policy lets no other
program run. Data are compressed JSON in a block that no browser executes; what a model has written
gets into the document as text alone (`static/page.js`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2

from lightning_grpo.report.answers import Answers
from lightning_grpo.report.charts import CHARTS, drawn, explained
from lightning_grpo.report.findings import command_to_go_on, findings, why_slow
from lightning_grpo.report.run import (
    PHASES,
    Run,
    TimelineSpan,
    lanes_of,
    reconstructed,
    step_times,
    uptime,
)

_STATIC = Path(__file__).parent / "static"
_MOST_SPANS = 100_000
_SETTINGS = (
    "model.model",
    "model.loss.class_path",
    "model.optimizer.init_args.lr",
    "data.prompts.path",
    "data.workflow.class_path",
    "data.batch_size",
    "data.group_size",
    "data.max_staleness",
)
"""What is told of a run that did not record what it resolved."""


def page_data(runs: Sequence[Run], answers: Answers) -> dict[str, Any]:
    """All that the page shows, as JSON has it."""
    metrics = sorted({name for run in runs for name in run.table})
    charts = [
        {"title": chart.title, "metrics": names, "unit": chart.unit, "low": chart.low}
        for chart in CHARTS
        if (names := drawn(chart, runs))
    ]
    about = {name: asdict(text) for name in metrics if (text := explained(name))}
    return {
        "runs": [_run_data(run) for run in runs],
        "charts": charts,
        "explained": about,
        "phases": [*PHASES, "other"],
        "groups": answers.groups,
        "pieces": answers.pieces,
        "notes": answers.notes,
    }


def _run_data(run: Run) -> dict[str, Any]:
    start = run.timeline.starts[-1] if run.timeline.starts else None
    times = step_times(run)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "steps": run.steps,
        "trained": run.trained,
        "metrics": {name: [_rounded(v) for v in values] for name, values in run.table.items()},
        "score": run.score,
        "times": {step: [_rounded(v) for v in parts.values()] for step, parts in times.items()},
        "slow": why_slow(run),
        "findings": [asdict(finding) for finding in findings(run)],
        "marks": [asdict(mark) for mark in uptime(run.timeline).marks]
        + [
            {"step": step, "level": "WARNING", "text": f"{metric} was {text}", "at": None}
            for step, metric, text in run.not_finite
        ],
        "setup": start.described if start and start.described else _settings(run),
        "versions": start.versions if start else {},
        "machine": start.machine if start else "",
        "command": command_to_go_on(run),
        "timeline": _timeline_data(run),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _settings(run: Run) -> dict[str, str]:
    found = {name: run.setting(name) for name in _SETTINGS}
    return {name: str(value) for name, value in found.items() if value is not None}


def _timeline_data(run: Run) -> dict[str, Any]:
    """Spans by lane, as short rows: beginning, seconds, what, step."""
    recorded = bool(run.timeline.spans)
    spans: Sequence[TimelineSpan] = uptime(run.timeline).spans or reconstructed(run)
    left_out = max(0, len(spans) - _MOST_SPANS)
    if left_out:
        longest = sorted(spans, key=lambda span: -span.seconds)[:_MOST_SPANS]
        spans = sorted(longest, key=lambda span: span.at)
    began = min((span.at for span in spans), default=0.0)
    kinds = sorted({span.what for span in spans})
    lanes: dict[str, list[Any]] = {lane: [] for lane in lanes_of(spans)}
    for span in spans:
        row = [round(span.at - began, 3), round(span.seconds, 3), kinds.index(span.what), span.step]
        lanes[span.lane].append(row)
    return {
        "recorded": recorded,
        "starts": len(run.timeline.starts),
        "began": began if recorded else None,
        "kinds": kinds,
        "lanes": [{"name": name, "spans": rows} for name, rows in lanes.items()],
        "left_out": left_out,
    }


def packed(data: dict[str, Any]) -> bytes:
    """The data as the page inflates them; the same data give the same bytes."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Lone surrogates have no UTF-8 of their own; a question mark stands for them.
    return gzip.compress(text.encode("utf-8", errors="replace"), mtime=0)


def render_page(data: dict[str, Any], refresh_s: float = 0.0) -> str:
    """The page.

    Args:
        data: `page_data`.
        refresh_s: How often it looks for newer data beside itself; 0: never.
    """
    names = ", ".join(run["name"] for run in data["runs"])
    styles = [_static("uPlot.min.css"), _static("page.css")]
    scripts = [_static("uPlot.iife.min.js"), _static("page.js")]
    body = packed(data)
    return _template().render(
        title=names,
        styles=styles,
        scripts=scripts,
        policy=_policy(styles, scripts),
        data=base64.b64encode(body).decode("ascii"),
        tag=_tag(body),
        refresh_s=refresh_s,
    )


def _tag(body: bytes) -> str:
    """Names a state of the data."""
    return f'"{hashlib.sha256(body).hexdigest()}"'


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Lets run what is in the page, by hash, and nothing else."""
    own, looks = (" ".join(map(_hash, texts)) for texts in (scripts, styles))
    return (
        f"default-src 'none'; script-src {own}; style-src {looks}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


@cache
def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_static("page.html.j2"))


# -- serving --------------------------------------------------------------------------------------


class PageServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1, and reads the runs again for whoever asks.

    It answers those who name it as this machine alone, so that no page of the web can read it
    through a name of its own.

    Args:
        read: The page's data, as the files are now.
        stamp: Changes when they do.
        port: 0 takes a free one.
        refresh_s: How often a page asks.
    """

    def __init__(
        self,
        read: Callable[[], dict[str, Any]],
        stamp: Callable[[], object],
        port: int = 0,
        refresh_s: float = 5.0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.refresh_s = refresh_s
        self._read, self._stamp = read, stamp
        self._known: tuple[object, dict[str, Any]] | None = None
        self._one_at_a_time = threading.Lock()

    def data(self) -> dict[str, Any]:
        """The page's data, read again where the files have changed."""
        with self._one_at_a_time:
            now = self._stamp()
            if self._known is None or self._known[0] != now:
                self._known = (now, self._read())
            return self._known[1]


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page, or with its data where they have changed."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):
            self._answer(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            page = render_page(self.server.data(), self.server.refresh_s)
            self._answer(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
        elif self.path == "/data":
            body = packed(self.server.data())
            tag = _tag(body)
            known = self.headers.get("If-None-Match") == tag
            status = HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK
            self._answer(status, b"" if known else body, "application/gzip", tag)
        else:
            self._answer(HTTPStatus.NOT_FOUND)

    def _answer(
        self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain", tag: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing of requests."""
