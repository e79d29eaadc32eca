"""A run's folder as plain tables: what each step measured, how the run was set up, how it ended.

Whatever is missing, torn or not finite is left out and said; a run that failed before its first
step is a run, too.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.errors import UnreadableError
from lightning_grpo.types import CI_HIGH, CI_LOW, is_interval

METRICS, CONFIG, TIMELINE = "metrics.csv", "config.yaml", "timeline.jsonl"
TRAJECTORIES, HELD_OUT = "trajectories", "trajectories/held_out"
_PARTS = (METRICS, CONFIG, TIMELINE, TRAJECTORIES)
_VERSION = "version_"
_TRAINER = "trainer"
_PAUSE_S = 10.0
_SCORES = ("eval/avg_at_*", "eval/*/avg_at_*", "eval/greedy", "eval/*")


@dataclass(frozen=True)
class Mark:
    """Something that was said at a step.

    Attributes:
        step: Optimizer steps taken by then.
        level: `WARNING`, `INFO`, ...
        text: One line.
        at: When, in seconds since the epoch.
    """

    step: int
    level: str
    text: str
    at: float


@dataclass(frozen=True)
class TimelineSpan:
    """A stretch of time that one part of the run spent on one thing.

    Attributes:
        at: When it began, in seconds since the epoch.
        seconds: How long it took.
        lane: `trainer`, or a server.
        what: `waiting`, `generating`, ...
        step: Of the trainer's; None for servers.
    """

    at: float
    seconds: float
    lane: str
    what: str
    step: int | None = None


@dataclass(frozen=True)
class RunStart:
    """What a run said of itself when it began, or went on.

    Attributes:
        at: Seconds since the epoch.
        step: It began behind this many optimizer steps.
        described: What was resolved, label by label.
        versions: Of packages.
        machine: In words.
    """

    at: float
    step: int
    described: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""


@dataclass(frozen=True)
class End:
    """How it ended: `done`, `stopped` or `failed`, with a sentence."""

    at: float
    step: int
    how: str
    text: str = ""


@dataclass(frozen=True)
class Timeline:
    """What `timeline.jsonl` holds; empty for a run that has none."""

    starts: list[RunStart] = field(default_factory=list)
    spans: list[TimelineSpan] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    end: End | None = None


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells it.

    Attributes:
        name: What it is called among the runs of a report.
        folder: Where it is.
        table: Metric -> its value at each of `steps`; None where it was not measured.
        steps: Numbers as on the screen, in order; 0 holds the validation before the first step.
        not_finite: Values that are no numbers: (step, metric, as written).
        timeline: What was recorded with a clock.
        config: The settings, as written.
    """

    name: str
    folder: Path
    steps: list[int]
    table: dict[str, list[float | None]]
    not_finite: list[tuple[int, str, str]]
    timeline: Timeline
    config: Mapping[str, Any]

    @property
    def trained(self) -> list[int]:
        """The steps that were trained; validations alone are not."""
        other = [values for name, values in self.table.items() if not name.startswith("eval/")]
        return [
            step
            for index, step in enumerate(self.steps)
            if any(values[index] is not None for values in other)
        ]

    @property
    def score(self) -> str | None:
        """The held-out score that it is judged by."""
        names = [n for n in self.table if n.startswith("eval/") and not is_interval(n)]
        return next((n for p in _SCORES for n in sorted(names) if fnmatchcase(n, p)), None)

    def series(self, metric: str) -> list[tuple[int, float]]:
        """The steps at which a metric was measured, and what it was."""
        values = self.table.get(metric, [])
        return [(s, v) for s, v in zip(self.steps, values, strict=False) if v is not None]

    def intervals(self, score: str) -> dict[int, tuple[float, float]]:
        """The 95 % confidence intervals of a held-out score, by step."""
        low, high = dict(self.series(score + CI_LOW)), dict(self.series(score + CI_HIGH))
        return {step: (low[step], high[step]) for step in low if step in high}

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted name, whether or not a class stands around it."""
        found: Any = self.config
        for part in key.split("."):
            if isinstance(found, Mapping) and part not in found:
                found = found.get("init_args")
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        stopped = self.folder.parent.glob("hpc_ckpt_*.ckpt")
        return any(stopped) or any((self.folder / "checkpoints").glob("*.ckpt"))

    def trajectory_files(self, held_out: bool = False) -> list[Path]:
        """The recorded rollout batches, or validations, in order of step."""
        return sorted((self.folder / (HELD_OUT if held_out else TRAJECTORIES)).glob("*.parquet"))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Several runs, each under a name of its own."""
    folders = [find_folder(path) for path in paths]
    return [read_run(f, name) for f, name in zip(folders, names_of(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """One run."""
    steps, table, not_finite = read_metrics(folder / METRICS)
    timeline = read_timeline(folder / TIMELINE)
    return Run(name, folder, steps, table, not_finite, timeline, read_config(folder / CONFIG))


def find_folder(path: Path) -> Path:
    """The folder with a run's files: `path`, or the last of its versions that trained.

    Raises:
        UnreadableError: There is none.
    """
    if any((path / part).exists() for part in _PARTS):
        return path
    versions = [v for v in path.glob(f"{_VERSION}*") if any((v / part).exists() for part in _PARTS)]
    if not versions:
        missing = "holds no run" if path.is_dir() else "does not exist"
        raise UnreadableError(
            f"{str(path)!r} {missing}: expected a run's folder (`runs/NAME` or "
            f"`runs/NAME/version_N`) with {METRICS} or {TRAJECTORIES}/ in it."
        )
    return max(versions, key=_last_trained)


def stamp(run_paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Changes when a file that a report reads does: names, times and sizes."""
    folders = [find_folder(path) for path in run_paths]
    parts = (METRICS, CONFIG, TIMELINE, f"{TRAJECTORIES}/*.parquet", f"{HELD_OUT}/*.parquet")
    files = sorted(file for folder in folders for part in parts for file in folder.glob(part))
    return [(str(f), s.st_mtime_ns, s.st_size) for f in files if (s := f.stat())]


def _last_trained(version: Path) -> tuple[bool, float]:
    """Orders versions: those that trained on something by when, then the others."""
    files = _trained_on(version)
    kept = files or [version / part for part in _PARTS if (version / part).exists()]
    return bool(files), max(file.stat().st_mtime for file in kept)


def later_without_training(folder: Path) -> list[Path]:
    """Runs beside one (`version_N` of the same name) that began after it and trained on nothing."""
    number = _number_of(folder)
    others = folder.parent.glob(f"{_VERSION}*") if number is not None else ()
    return sorted(
        other
        for other in others
        if (_number_of(other) or 0) > (number or 0) and not _trained_on(other)
    )


def _number_of(folder: Path) -> int | None:
    digits = folder.name.removeprefix(_VERSION)
    return int(digits) if digits != folder.name and digits.isdecimal() else None


def _trained_on(version: Path) -> list[Path]:
    return list((version / TRAJECTORIES).glob("*.parquet"))


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, unlike all the others'."""
    resolved = [folder.resolve() for folder in folders]
    for parts in (1, 2, 3, 4):
        names = [_name(folder, parts) for folder in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _name(folder: Path, parts: int) -> str:
    """The last parts of a path; of `runs/NAME/version_N` NAME alone where that suffices."""
    if parts == 1 and folder.name.startswith(_VERSION):
        return folder.parent.name
    return "/".join(folder.parts[-parts:])


# -- metrics.csv ----------------------------------------------------------------------------------


def read_metrics(
    file: Path,
) -> tuple[list[int], dict[str, list[float | None]], list[tuple[int, str, str]]]:
    """Steps, values by metric, and what was not finite.

    A step and its validation have a row each, which become one. Of a step that was taken twice the
    later values count.
    """
    by_step: dict[int, dict[str, float]] = {}
    strange: dict[tuple[int, str], str] = {}
    for row in _metric_rows(file):
        step = int(row["step"])
        kept = by_step.setdefault(step, {})
        for name, text in row.items():
            value = _number(text)
            if name in ("step", "epoch") or value is None:
                continue
            if math.isfinite(value):
                kept[name] = value
            elif not is_interval(name):  # of equal rewards there is no interval
                strange[step, name] = text
    steps = sorted(by_step)
    names = sorted({name for values in by_step.values() for name in values})
    table = {name: [by_step[step].get(name) for step in steps] for name in names}
    return steps, table, [(step, name, text) for (step, name), text in sorted(strange.items())]


def _metric_rows(file: Path) -> Iterator[dict[str, str]]:
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        for row in csv.DictReader(line.replace("\0", "") for line in opened):
            # The last line of a run that was killed, or still writes, may be torn.
            whole = None not in row and None not in row.values()
            if whole and (row.get("step") or "").isdigit():
                yield row


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# -- config.yaml ----------------------------------------------------------------------------------


def read_config(file: Path) -> Mapping[str, Any]:
    """The settings; empty where there are none to read."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


# -- timeline.jsonl -------------------------------------------------------------------------------


def read_timeline(file: Path) -> Timeline:
    """What was recorded with a clock; lines of another kind, and torn ones, are passed over.

    A run that was killed and went on from an earlier step takes steps again: of the trainer's spans
    and the lines of such a step those of the last time count.
    """
    starts: list[RunStart] = []
    spans: list[TimelineSpan] = []
    marks: list[Mark] = []
    end: End | None = None
    for line in _json_lines(file):
        match _parsed(line):
            case RunStart() as start:
                starts.append(start)
                end = None
                spans = [s for s in spans if s.step is None or s.step <= start.step]
                marks = [m for m in marks if m.step <= start.step]
            case TimelineSpan() as span:
                spans.append(span)
            case Mark() as mark:
                marks.append(mark)
            case End() as found:
                end = found
    return Timeline(starts, sorted(spans, key=lambda span: span.at), marks, end)


def uptime(timeline: Timeline) -> Timeline:
    """The same without the time between an end and what was done first after the next start."""
    cuts: list[tuple[float, float]] = []
    for start in timeline.starts[1:]:
        ended = max((s.at + s.seconds for s in timeline.spans if s.at < start.at), default=start.at)
        began = min((s.at for s in timeline.spans if s.at >= start.at), default=start.at)
        if began - ended > _PAUSE_S:
            cuts.append((ended, began - ended - 1.0))  # a second is left to be seen

    def shift(at: float) -> float:
        return at - sum(min(seconds, at - place) for place, seconds in cuts if at > place)

    spans = [replace(span, at=shift(span.at)) for span in timeline.spans]
    marks = [replace(mark, at=shift(mark.at)) for mark in timeline.marks]
    return replace(timeline, spans=spans, marks=marks)


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as opened:
        for line in opened:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def _parsed(line: Mapping[str, Any]) -> RunStart | TimelineSpan | Mark | End | None:
    """One line as what it is; None for what this version does not know."""
    seconds, step = _finite(line.get("s")), line.get("step")
    at = _finite(line.get("at"))
    if at is None:
        return None
    step = step if isinstance(step, int) else None
    text = str(line.get("text") or "")
    found: RunStart | TimelineSpan | Mark | End | None = None
    match line.get("kind"):
        case "start":
            described, versions = (_strings(line.get(key)) for key in ("described", "versions"))
            found = RunStart(at, step or 0, described, versions, str(line.get("machine") or ""))
        case "span" if seconds is not None and seconds >= 0:
            lane = str(line.get("lane"))
            # A server's spans name the step at which they were written down.
            own = step if lane == _TRAINER else None
            found = TimelineSpan(at, seconds, lane, str(line.get("what")), own)
        case "line":
            found = Mark(step or 0, str(line.get("level") or "INFO"), text, at)
        case "end":
            found = End(at, step or 0, str(line.get("how")), text)
    return found


def _finite(value: Any) -> float | None:
    real = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if real else None


def _strings(value: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}


# -- time -----------------------------------------------------------------------------------------

PHASES = {
    "waiting": "time/wait_rollout_s",
    "forward and backward": "time/forward_backward_s",
    "optimizer": "time/optimizer_s",
    "weight sync": "time/weight_sync_s",
}
"""The parts of a step as they are logged; what is left of the step is `other`."""


def step_times(run: Run) -> dict[int, dict[str, float]]:
    """Seconds of each step by part.

    The period of a step begins where the one before ended, so it holds the weight sync that was
    logged there.
    """
    out: dict[int, dict[str, float]] = {}
    sync = 0.0
    columns = {part: dict(run.series(metric)) for part, metric in PHASES.items()}
    for step, total in run.series("time/step_s"):
        parts = {part: columns[part].get(step, 0.0) for part in PHASES}
        parts["weight sync"], sync = sync, parts["weight sync"]
        parts["other"] = max(0.0, total - sum(parts.values()))
        out[step] = parts
    return out


def reconstructed(run: Run) -> list[TimelineSpan]:
    """The trainer's spans laid end to end, for a run without a timeline; it begins at 0."""
    spans: list[TimelineSpan] = []
    at = 0.0
    for step, parts in step_times(run).items():
        for what in ("weight sync", "waiting", "forward and backward", "optimizer", "other"):
            if parts[what] > 0:
                spans.append(TimelineSpan(at, parts[what], _TRAINER, what, step))
                at += parts[what]
    return spans


def chrome_trace(runs: Iterable[Run]) -> dict[str, Any]:
    """The timelines in the format that Perfetto and chrome://tracing open; microseconds."""
    events: list[dict[str, Any]] = []
    for pid, run in enumerate(runs, 1):
        spans = uptime(run.timeline).spans or reconstructed(run)
        began = min((span.at for span in spans), default=0.0)
        lanes = {lane: tid for tid, lane in enumerate(lanes_of(spans), 1)}
        events.append(_name_event("process_name", pid, 0, run.name))
        events += [_name_event("thread_name", pid, tid, lane) for lane, tid in lanes.items()]
        for span in spans:
            event = {
                "name": span.what,
                "ph": "X",
                "pid": pid,
                "tid": lanes[span.lane],
                "ts": round((span.at - began) * 1e6),
                "dur": round(span.seconds * 1e6),
            }
            events.append(event | ({} if span.step is None else {"args": {"step": span.step}}))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lanes_of(spans: Iterable[TimelineSpan]) -> list[str]:
    """The trainer, then the servers by number."""
    found = {span.lane for span in spans}
    return sorted(found, key=lambda lane: (lane != _TRAINER, len(lane), lane))


def _name_event(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
