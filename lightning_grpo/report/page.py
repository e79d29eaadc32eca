"""What is shown of runs: charts, Markdown for a terminal, and one page with a server behind it.

The page needs nothing but itself: style, programs and data are in it, and its policy lets no other
program run. Data are compressed JSON in a block that no browser executes; what a model has written
gets into the document as text alone (`static/page.js`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

from lightning_grpo.errors import ConfigError
from lightning_grpo.report.answers import Answers
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
from lightning_grpo.shipped import metrics_page
from lightning_grpo.types import is_interval

# -- curves ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """One small chart over the steps.

    Attributes:
        title: What it is about.
        metrics: Names, or patterns of names, of what is drawn.
        unit: Of the values: `""`, `%` (a share), `s`, `tokens`.
        low: The least that the axis reaches down to; None leaves it to the values.
    """

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    low: float | None = None


CHARTS = (
    Chart("Reward", ("reward/mean", "reward/*/mean", "dataset/*/reward_mean")),
    Chart("Held-out score", ("eval/*",)),
    Chart("Groups of equal rewards", ("reward/zero_variance_fraction",), "%", 0),
    Chart("Length", ("completion/length_mean", "completion/length_max"), "tokens", 0),
    Chart("Truncated", ("completion/truncated_fraction",), "%", 0),
    Chart("Entropy", ("policy/entropy",), low=0),
    Chart("Gradient norm", ("policy/grad_norm",), low=0),
    Chart(
        "Mismatch of trainer and servers",
        ("mismatch/probe", "mismatch/sent", "mismatch/abs_logprob_diff"),
        low=0,
    ),
    Chart("Off-policy difference", ("offpolicy/abs_logprob_diff",), low=0),
    Chart("KL", ("policy/kl_reference", "offpolicy/k3", "mismatch/k3")),
    Chart("Clipped tokens", ("ratio/clip_fraction_high", "ratio/clip_fraction_low"), "%", 0),
    Chart("Staleness", ("staleness/mean", "staleness/max"), "versions", 0),
    Chart("Throughput", ("rollout/tokens_per_s", "throughput/tokens_per_s"), "tokens/s", 0),
    Chart("Idle", ("idle/trainer_fraction", "idle/server_fraction"), "%", 0),
)
"""In the order of the page; one without a value is left out."""


def drawn(chart: Chart, runs: Sequence[Run]) -> list[str]:
    """The metrics of a chart that the runs have, in the chart's order; of several runs one each."""
    if len(runs) > 1:
        mains = [_main(chart, run) for run in runs]
        return list(dict.fromkeys(name for name in mains if name))
    names = {name for run in runs for name in run.table if not is_interval(name)}
    found: list[str] = []
    for pattern in chart.metrics:
        found += sorted(n for n in names if fnmatchcase(n, pattern) and n not in found)
    # One named reward alone is the reward once more.
    named = [name for name in found if fnmatchcase(name, "reward/*/mean")]
    return [n for n in found if len(named) != 1 or n not in named or "reward/mean" not in found]


def _main(chart: Chart, run: Run) -> str | None:
    """The metric of a chart that runs are compared by."""
    found = drawn(chart, [run])
    return run.score if run.score in found else next(iter(found), None)


@dataclass(frozen=True)
class Explained:
    """A line of docs/metrics.md."""

    meaning: str
    healthy: str
    remedy: str


@cache
def explanations() -> Mapping[str, Explained]:
    """Name, or pattern of names, of a metric -> what docs/metrics.md says of it."""
    file = metrics_page()
    out = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file else ():
        cells = [_plain(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = re.match(r"\|\s*`([a-z]+/[^`]*)`", line)
        if name and len(cells) == 4:  # noqa: PLR2004 - metric, meaning, healthy, if not
            pattern = re.sub(r"<\w+>", "*", name[1])
            out[pattern] = Explained(*cells[1:])
    return out


def explained(metric: str) -> Explained | None:
    """What docs/metrics.md says of a metric; None where it is nobody's but the user's."""
    known = explanations()
    if metric in known:
        return known[metric]
    # Several validation sets have their name between.
    names = (metric, re.sub(r"^eval/[^/]+/", "eval/", metric))
    patterns = sorted(known, key=len, reverse=True)
    return next((known[p] for p in patterns for n in names if fnmatchcase(n, p)), None)


def _plain(cell: str) -> str:
    """A table's cell without its links and quotes."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("`", "").strip()


# -- pictures -------------------------------------------------------------------------------------


def write_pictures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Each chart as an SVG file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "`--pictures` needs matplotlib. Install it with `pip install matplotlib`, or the "
            "package with its extra `report`."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in CHARTS:
        metrics = drawn(chart, runs)
        if metrics:
            figure = Figure(figsize=(6, 3.2), layout="constrained")
            _draw_lines(figure.subplots(), chart, metrics, runs)
            files.append(_save(figure, folder, chart.title))
    for run in runs:
        times = step_times(run)
        if times:
            figure = Figure(figsize=(6, 3.2), layout="constrained")
            _draw_times(figure.subplots(), times)
            name = f"Time {run.name}" if len(runs) > 1 else "Time"
            files.append(_save(figure, folder, name))
    return files


def _save(figure: Any, folder: Path, title: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
    file = folder / f"{name}.svg"
    # No date and no random ids: the same run gives the same file.
    figure.savefig(file, metadata={"Date": None})
    return file


def _draw_lines(axes: Any, chart: Chart, metrics: Sequence[str], runs: Sequence[Run]) -> None:
    for run in runs:
        for metric in metrics:
            points = run.series(metric)
            if not points:
                continue
            label = " ".join([run.name] * (len(runs) > 1) + [metric] * (len(metrics) > 1))
            steps, values = zip(*points, strict=True)
            (line,) = axes.plot(steps, values, label=label or None, linewidth=1.4)
            intervals = run.intervals(metric)
            low, high = zip(*(intervals.get(s, (v, v)) for s, v in points), strict=True)
            if intervals:
                axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    if len(runs) > 1 or len(metrics) > 1:
        axes.legend(frameon=False, fontsize="small")
    axes.set(title=chart.title, xlabel="step", ylabel=chart.unit)
    if chart.low is not None:
        axes.set_ylim(bottom=chart.low)


def _draw_times(axes: Any, times: Mapping[int, Mapping[str, float]]) -> None:
    parts = [*PHASES, "other"]
    rows = [[times[step][part] for step in times] for part in parts]
    axes.stackplot(list(times), rows, labels=parts)
    axes.legend(frameon=False, fontsize="small")
    axes.set(title="Time of a step", xlabel="step", ylabel="s")


# -- as text ---------------------------------------------------------------------------------------

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


# -- as a page -------------------------------------------------------------------------------------

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
