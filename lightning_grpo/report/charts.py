"""The charts of a report: what each shows, how its numbers are explained, and the same as SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ConfigError
from lightning_grpo.report.run import PHASES, Run, step_times
from lightning_grpo.shipped import metrics_page
from lightning_grpo.types import is_interval


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
