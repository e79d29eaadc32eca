"""Endurance: 10,000 steps of a tiny run in which something is killed every 200 steps.

    python -m benchmarks.endurance --out benchmarks/results/endurance.json
    python -m benchmarks.endurance --smoke
    python -m benchmarks.endurance --faults server reward      # nothing that ends the run

Rule, from the second tenth of the steps to the last: resident memory and open descriptors of each
part of the run, and what lies on the disk apart from its records, grow by less than 5 %; the median
step takes within 10 % as long; every step is once in the curve; and the ledger is exact: each
prompt that was let in was trained on once, or is in the checkpoint to be, and no process is left
behind.

The quickstart, asynchronous, its rollouts in a process of their own: 4 prompts of 2 completions of
at most 4 tokens, two steps on each batch, two embedded servers, checkpoints of which three are
kept. A fault is a SIGKILL to a server, to a process of the rewards, to that of the rollouts or to
the trainer, or a SIGTERM to the trainer; all kinds come in turn, in an order that the seed gives.
After the last three the run is started again with `--ckpt_path last`, as its user would. Steps that
were taken since the checkpoint are taken again then.

`slope` is that of a line through all samples, per 1,000 steps; `slope_in_a_life` of lines of equal
slope through each process's own, without its first 50 steps: a leak that each start hides shows
there. Records (trajectories, curve, timeline, TensorBoard's files) grow with each step, and are
told. Other programs on the machine change the time of a step by the clock; `cpu_s` is what all
processes of the run computed for it. Ended early (`--minutes`, SIGTERM) it reports on the steps it
has.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import pickle
import platform
import random
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks.load import cpu_name
from lightning_grpo.cli.runs import last_checkpoint
from lightning_grpo.rollout.records import read_table, trajectory_files
from lightning_grpo.shipped import resolve_config
from lightning_grpo.types import Outcome
from tests.fakes.fit_process import REWARD, Fit, kill, left_behind, started

BATCH, GROUP, STEPS_PER_BATCH = 4, 2, 2
STATUS = {"rollouts": 1, "run, SIGKILL": -signal.SIGKILL, "run, SIGTERM": 128 + signal.SIGTERM}
"""Faults that end a run, and its exit status."""
FAULTS = ("server", "reward", *STATUS)
PARTS = {"trainer": 1, "rollouts": 1, "server": 2, "reward": 2}
WORDS = {
    "session.child": "rollouts",
    "supervisor": "supervisor",  # whose command line ends with its server's
    "lightning_grpo.engine": "server",
    "pebble_pool_worker": "reward",
}
MEASURES = ("memory_mb", "descriptors", "threads", "children")
RECORDS = ("trajectories", "metrics", "timeline", "board")
SAMPLE_S, DISK_EVERY, WARM_UP, STUCK_S = 1.0, 5, 50, 240.0
GROWTH, STEP_TIME = 5.0, 10.0

# -- the run ---------------------------------------------------------------------------------------


def write_run(folder: Path, steps: int, save_every: int) -> None:
    """The shipped quickstart, made tiny."""
    config = yaml.safe_load(Path(resolve_config("quickstart.yaml")).read_text())
    saving = {"every_n_train_steps": save_every, "save_top_k": 3, "monitor": "step"}
    config["trainer"] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "gradient_clip_val": 1.0,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": saving | {"mode": "max", "save_last": "link"},
            }
        ],
    }
    # The reward means nothing: a policy that learned it would end its answers elsewhere later on.
    config["model"]["optimizer"]["init_args"]["lr"] = 1e-6
    data = config["data"]
    for name in ("val_prompts", "evaluation"):
        del data[name]
    data["workflow"]["init_args"] |= {"reward": "mine.reward", "sampling": {"max_new_tokens": 4}}
    data["servers"] = {
        "class_path": "lightning_grpo.EmbeddedServers",
        "init_args": {"num_servers": 2},
    }
    data |= {"batch_size": BATCH, "group_size": GROUP, "minibatches_per_batch": STEPS_PER_BATCH}
    data |= {"max_staleness": 2, "rollouts_in": "process"}
    (folder / "mine.py").write_text(REWARD)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


def reached(fit: Fit) -> int | None:
    """The last step that this start has said; the whole of what it said may be long."""
    with (fit.folder / "out").open("rb") as out:
        out.seek(max(0, out.seek(0, os.SEEK_END) - 4000))
        said = re.findall(rb"^step +(\d+)/", out.read(), re.MULTILINE)
    return int(said[-1]) if said else None


def parts_of(fit: Fit) -> dict[str, list[psutil.Process]]:
    """The processes of a run, by what they are."""
    parts: dict[str, list[psutil.Process]] = {name: [] for name in PARTS}
    for process in [psutil.Process(fit.process.pid), *fit.those("")]:
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            parts.setdefault(part_named(words, process.pid == fit.process.pid), []).append(process)
    return parts


def part_named(words: str, is_first: bool) -> str:
    """What a process is, by its command line."""
    if is_first:
        return "trainer"
    return next((part for word, part in WORDS.items() if word in words), "other")


# -- what is measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One process at one moment.

    Attributes:
        moment: Which one.
        step: Of the run.
        part: What it is.
        life: The process itself: its id and when it began.
        values: By measure.
        cpu_s: That it has computed for.
    """

    moment: int
    step: int
    part: str
    life: tuple[int, float]
    values: dict[str, float]
    cpu_s: float


class Samples:
    """Takes samples of a run's processes, and of its folder now and then."""

    def __init__(self, folder: Path) -> None:
        self.all: list[Sample] = []
        self.disk: list[tuple[int, dict[str, float]]] = []
        self._folder, self._moment = folder, 0

    def take(self, fit: Fit, step: int) -> None:
        """All processes that are there now."""
        self._moment += 1
        for part, processes in parts_of(fit).items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    self.all.append(self._look_at(process, part, step))
        if self._moment % DISK_EVERY == 0:
            self.disk.append((step, disk_mb(self._folder)))

    def _look_at(self, process: psutil.Process, part: str, step: int) -> Sample:
        life = (process.pid, process.create_time())
        with process.oneshot():
            values = {
                "memory_mb": process.memory_info().rss / 2**20,
                "descriptors": float(process.num_fds()),
                "threads": float(process.num_threads()),
                "children": float(len(process.children())),
            }
            cpu = process.cpu_times()
        return Sample(self._moment, step, part, life, values, cpu.user + cpu.system)


def disk_mb(folder: Path) -> dict[str, float]:
    """What lies below a run's folder, by kind."""
    sizes: dict[str, float] = defaultdict(float)
    for above, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes[kind_of(Path(above), name)] += (Path(above) / name).lstat().st_size / 2**20
    return sizes


def kind_of(folder: Path, name: str) -> str:
    """What a file of a run is."""
    if name.endswith(".ckpt"):
        return "checkpoints"
    if "tfevents" in name:
        return "board"
    if name.startswith(("metrics", "timeline")):
        return re.split(r"\W", name)[0]
    return folder.name if folder.name in ("trajectories", "servers", "tmp") else "other"


# -- faults ----------------------------------------------------------------------------------------


class Endurance:
    """A run, and what is done to it.

    Args:
        args: Of the command line.
        folder: Of the run.

    Attributes:
        faults: How often each kind came.
        problems: What should not have happened.
        recovery_s: From a fault to the next step, by kind.
        starts: How often the run was started.
        furthest: The last step seen.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder, self.root = folder, folder / "runs" / "tiny"
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.starts = self.furthest = self.checkpoints_read = 0
        self.samples = Samples(folder)
        self.stopped = False
        self._args, self._noise = args, random.Random(args.seed)
        self._end = time.monotonic() + 60 * args.minutes
        self._bag: list[str] = []
        self._due = self._next_due(args.every)
        self._broken: tuple[str, float, int] | None = None

    def run(self) -> None:
        """Until the last step, or until it is to stop."""
        while not self.stopped and self.furthest < self._args.steps:
            again = ["--ckpt_path", "last"] if self.starts else []
            self.starts += 1
            before = self.furthest
            with started(self.folder, *again) as fit:
                fault = self._attend(fit)
                self._check_end(fit, fault)
            if len(self.problems) > 5 and self.furthest == before:
                raise RuntimeError("\n".join(self.problems))

    def stop(self) -> None:
        """Soon, in good order."""
        self.stopped = True

    def _next_due(self, at: int) -> int:
        return at + self._noise.randrange(max(1, self._args.every // 2))

    def _attend(self, fit: Fit) -> str:
        """Watch one start to its end; the fault that ended it, if one did."""
        next_sample = since = time.monotonic()
        seen = None
        while fit.process.poll() is None:
            time.sleep(0.1)
            now, step = time.monotonic(), reached(fit)
            self.stopped |= now > self._end
            if self.stopped:
                fit.process.send_signal(signal.SIGTERM)
                return self._wait_for(fit, "run, SIGTERM")
            if step != seen:
                seen, since = step, now
                self._note(step)
            if now - since > STUCK_S:
                self.problems.append(f"no step for {STUCK_S:g} s after step {step}: {fit.tail}")
                fit.kill_everything()
                return "run, SIGKILL"
            if step is not None and now > next_sample and step < self._args.steps:  # it ends then
                next_sample = now + SAMPLE_S
                self.samples.take(fit, step)
            if step is not None and self.furthest >= self._due and self._broken is None:
                fault = self._break(fit)
                if fault in STATUS:
                    return self._wait_for(fit, fault)
        return ""

    def _note(self, step: int | None) -> None:
        """A step that was not there before."""
        if step is None:
            return
        self.furthest = max(self.furthest, step)
        if self._broken is not None:
            fault, at, of = self._broken
            if fault in STATUS or step > of + 2 * STEPS_PER_BATCH:  # beyond what was sampled before
                self.recovery_s[fault].append(round(time.monotonic() - at, 1))
                self._broken = None

    def _break(self, fit: Fit) -> str:
        """Kill what is next; its name, or none where it can't be killed yet."""
        self._bag = self._bag or self._noise.sample(self._args.faults, len(self._args.faults))
        fault = self._bag[-1]
        name = {"run, SIGKILL": "trainer", "run, SIGTERM": "trainer"}.get(fault, fault)
        parts = parts_of(fit)
        if not parts[name] or len(parts["server"]) < 2:
            if self.furthest > self._due + 2 * self._args.every:
                self.problems.append(f"step {self.furthest}: no {name}, or a server, to be killed")
                self._due = self._next_due(self._due + 2 * self._args.every)
            return ""
        self._bag.pop()
        victim = self._noise.choice(sorted(parts[name], key=lambda process: process.pid))
        print(f"{time.strftime('%H:%M:%S')} step {self.furthest}: {fault} {victim.pid}", flush=True)
        if fault == "run, SIGTERM":
            fit.process.send_signal(signal.SIGTERM)
        else:
            kill(victim)
        self.faults[fault] += 1
        self._broken = (fault, time.monotonic(), self.furthest)
        self._due = self._next_due((self.furthest // self._args.every + 1) * self._args.every)
        return fault

    def _wait_for(self, fit: Fit, fault: str) -> str:
        """A run that was ended may take a while to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            fit.process.wait(timeout=100)
        return fault

    def _check_end(self, fit: Fit, fault: str) -> None:
        """One start has ended as it should, and left nothing but its files."""
        status, wanted = fit.process.poll(), STATUS.get(fault, 0)
        if status != wanted:
            self.problems.append(
                f"{fault or 'it'} ended it with {status}, not {wanted}: {fit.tail}"
            )
        if not fault and status == 0:
            self.furthest = max(self.furthest, reached(fit) or 0)
        self.problems += [f"left behind: {each}" for each in left_behind(self.folder)]
        self.problems += [f"left behind: {each}" for each in (self.folder / "tmp").rglob("*")]
        newest = last_checkpoint(self.root)
        if newest is None:
            self.problems.append("there is no checkpoint")
            return
        self.checkpoints_read += 1
        self.problems += lost_in(read_state(newest)[1])
        print(f"{time.strftime('%H:%M:%S')} ended with {status}, {newest.name}", flush=True)


# -- the books -------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """A checkpoint's step, and what its rollouts have of it."""
    state = torch.load(checkpoint, weights_only=True)
    return state["global_step"], state["RolloutDataModule"]


def lost_in(state: dict[str, Any]) -> list[str]:
    """Prompts that were asked and are neither trained on nor kept, or more than once."""
    producer = state["producer"]
    if producer is None:
        return [f"version {state['version']} without its rollouts"] if state["version"] else []
    backlog, counts = producer["backlog"], producer["ledger"]["counts"]
    ((_, asked),) = backlog["stream"].values()
    kept = [tuple(each["key"]) for each in backlog["finished"]]
    kept += [tuple(key) for key, _ in backlog["ask_again"]]
    trained = trained_in(producer["ledger"])
    found = []
    if set(counts) != {str(Outcome.TRAINED)}:
        found.append(f"version {state['version']}: prompts ended otherwise: {counts}")
    if sum(counts.values()) + len(kept) != asked:
        found.append(f"version {state['version']}: {asked} asked, {counts} and {len(kept)} kept")
    if len(set(kept)) != len(kept) or any(row in trained.get(at, ()) for at, row in kept):
        found.append(f"version {state['version']}: kept twice, or trained on and kept: {kept}")
    return found


def trained_in(ledger: dict[str, Any]) -> dict[int, set[int]]:
    """The rows that the ledger has as trained on, by pass: all of those that are closed."""
    trained = {at: set(rows.nonzero().flatten().tolist()) for _, at, rows in ledger["open"]}
    closed = {at: set(range(sum(counts.values()))) for _, at, counts in ledger["closed"]}
    return trained | closed


def check_ledger(run: Endurance) -> dict[str, Any]:
    """The last checkpoint against the trajectories: what was trained on, each key once."""
    newest = last_checkpoint(run.root)
    assert newest is not None
    step, state = read_state(newest)
    keys: Counter[tuple[int, int]] = Counter()
    places: Counter[tuple[int, int, int]] = Counter()
    for file in trajectory_files(run.root / "version_0"):
        if int(file.stem.rpartition("_")[2]) > step:  # taken by a start that was killed before it
            continue  # could save them, and was the last one
        table = read_table(file, ["pass_index", "row", "version", "group"])
        rows = set(zip(*(column.to_pylist() for column in table.columns), strict=True))
        keys.update({(pass_index, row) for pass_index, row, _, _ in rows})
        places.update(rows)
    by_pass: dict[int, set[int]] = defaultdict(set)
    for pass_index, row in keys:
        by_pass[pass_index].add(row)
    ledger = state["producer"]["ledger"]
    wanted = BATCH * step // STEPS_PER_BATCH
    return {
        "step": step,
        "version": state["version"],
        "trained": ledger["counts"].get("trained", 0),
        "outcomes": dict(ledger["counts"]),
        "wanted": wanted,
        "trajectories": len(keys),
        "trained_twice": sum(count > 1 for count in keys.values()),
        "as_in_trajectories": dict(by_pass) == trained_in(ledger),
        "checkpoints_read": run.checkpoints_read,
        "counters": state["producer"]["counters"],
        "exact": not lost_in(state)
        and ledger["counts"] == {"trained": wanted}
        and len(keys) == len(places) == wanted
        and dict(by_pass) == trained_in(ledger),
    }


def read_curve(folder: Path, last: int) -> tuple[dict[str, Any], dict[int, float]]:
    """Whether the curve has every step once, and the seconds of each."""
    with (folder / "metrics.csv").open() as rows:
        logged = [(int(r["step"]), r) for r in csv.DictReader(rows) if r.get("reward/mean")]
    logged = [(step, row) for step, row in logged if step <= last]
    steps = Counter(step for step, _ in logged)
    again = 0
    for part in folder.glob("metrics-*.csv"):
        with part.open() as rows:
            again += sum(bool(row.get("reward/mean")) for row in csv.DictReader(rows))
    facts = {
        "rows": len(logged),
        "missing": sorted(set(range(1, last + 1)) - set(steps)),
        "twice": sorted(step for step, count in steps.items() if count > 1),
        "steps_taken_again": again,
        "exact": sorted(steps.elements()) == list(range(1, last + 1)),
    }
    return facts, {step: float(row["time/step_s"]) for step, row in logged}


# -- the report ------------------------------------------------------------------------------------

Points = Sequence[tuple[int, float]]


def trend(points: Points, last: int) -> dict[str, Any]:
    """Medians of each tenth of the steps, the growth after the first, and the slope after it."""
    tenths: list[list[float]] = [[] for _ in range(10)]
    for step, value in points:
        tenths[min(9, 10 * (step - 1) // last)].append(value)
    medians = [statistics.median(each) if each else None for each in tenths]
    later = [(step, value) for step, value in points if 10 * (step - 1) >= last]
    facts: dict[str, Any] = {"tenths": [m if m is None else round(m, 4) for m in medians]}
    second, end = medians[1], medians[9]
    if second is not None and end is not None:
        growth = 100 * (end / second - 1) if second else 100.0 * (end > 0)
        facts |= {"second_tenth": second, "last_tenth": end, "growth_percent": growth}
    if len({step for step, _ in later}) > 1:
        steps, values = zip(*later, strict=True)
        facts["slope"] = 1000 * statistics.linear_regression(steps, values).slope
    return {n: round(v, 4) if isinstance(v, float) else v for n, v in facts.items()}


def settled(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of processes that have started: a new server has its libraries yet to load."""
    by_part: dict[str, list[float]] = defaultdict(list)
    for each in samples:
        by_part[each.part].append(each.values["memory_mb"])
    least = {part: 0.9 * statistics.median(values) for part, values in by_part.items()}
    started_at: dict[tuple[int, float], int] = {}
    for each in samples:
        if each.values["memory_mb"] >= least[each.part]:
            started_at.setdefault(each.life, each.moment)
    return [each for each in samples if each.moment >= started_at.get(each.life, each.moment + 1)]


def slope_in_a_life(samples: Iterable[Sample], measure: str) -> float | None:
    """Per 1,000 steps; each process has a level of its own, so that starts make no difference."""
    lives: dict[tuple[int, float], list[Sample]] = defaultdict(list)
    for each in samples:
        lives[each.life].append(each)
    above = below = 0.0
    for life in lives.values():
        late = [each for each in life if each.step >= life[0].step + WARM_UP]
        if not late:
            continue
        step = statistics.fmean(each.step for each in late)
        level = statistics.fmean(each.values[measure] for each in late)
        above += sum((each.step - step) * (each.values[measure] - level) for each in late)
        below += sum((each.step - step) ** 2 for each in late)
    return round(1000 * above / below, 4) if below else None


def measured(samples: Sequence[Sample], last: int) -> dict[str, Any]:
    """Each measure of each part, a process of it on average, and of all together."""
    found: dict[str, Any] = {}
    moments: dict[int, list[Sample]] = defaultdict(list)
    for each in samples:
        moments[each.moment].append(each)
    # While something starts again the whole is less.
    counts = [(Counter(each.part for each in m), m) for m in moments.values()]
    whole = [m for count, m in counts if all(count[part] == n for part, n in PARTS.items())]
    for measure in MEASURES:
        total = [(m[0].step, sum(s.values[measure] for s in m)) for m in whole]
        found[measure] = {"all": trend(total, last)}
        for part in sorted({each.part for each in samples}):
            own = [each for each in samples if each.part == part]
            points = [(each.step, each.values[measure]) for each in own]
            slope = slope_in_a_life(own, measure)
            found[measure][part] = trend(points, last) | {"slope_in_a_life": slope}
    return found


def cpu_seconds(samples: Sequence[Sample]) -> Iterator[tuple[int, float]]:
    """What all processes computed for a step, between moments at which the same ones were there."""
    moments: dict[int, dict[tuple[int, float], Sample]] = defaultdict(dict)
    for each in samples:
        moments[each.moment][each.life] = each
    for number, now in moments.items():
        before = moments.get(number - 1, {})
        if not before or set(before) != set(now):
            continue
        life = next(iter(now))
        steps = now[life].step - before[life].step
        if steps > 0:
            used = sum(now[each].cpu_s - before[each].cpu_s for each in now)
            yield now[life].step, used / steps


def make_report(run: Endurance, args: argparse.Namespace, minutes: float) -> dict[str, Any]:
    """All of it."""
    ledger = check_ledger(run)
    last = ledger["step"]
    curve, step_s = read_curve(run.root / "version_0", last)
    samples = settled([each for each in run.samples.all if each.step <= last])
    disk = {
        kind: trend([(step, sizes.get(kind, 0.0)) for step, sizes in run.samples.disk], last)
        for kind in sorted({kind for _, sizes in run.samples.disk for kind in sizes})
    }
    bounded = [
        (step, sum(size for kind, size in sizes.items() if kind not in RECORDS))
        for step, sizes in run.samples.disk
    ]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{cpu_name() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[2], 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "lightning", "transformers")},
        "settings": {n: v for n, v in vars(args).items() if n not in ("out", "smoke", "folder")},
        **{"steps": last, "minutes": round(minutes, 1), "starts": run.starts},
        "faults": dict(run.faults),
        "recovery_s": {k: round(statistics.median(s), 1) for k, s in run.recovery_s.items()},
        "problems": run.problems,
        **measured(samples, last),
        "disk_mb": {"without records": trend(bounded, last), **disk},
        "step_s": trend(list(step_s.items()), last),
        "cpu_s": trend(list(cpu_seconds(samples)), last),
        "curve": curve,
        "ledger": ledger,
    }
    return report | {"rule": judged(report)}


def judged(report: dict[str, Any]) -> dict[str, bool]:
    """The rule at the head, one by one."""

    def within(facts: dict[str, Any], most: float) -> bool:
        return facts.get("growth_percent", most) < most

    def grown(measure: str) -> bool:
        found = report[measure]
        return all(within(found[part], GROWTH) for part in ("all", *PARTS))

    return {
        "memory": grown("memory_mb"),
        "descriptors": grown("descriptors"),
        "disk": within(report["disk_mb"]["without records"], GROWTH),
        "step time": abs(report["step_s"].get("growth_percent", STEP_TIME)) < STEP_TIME,
        "curve": report["curve"]["exact"],
        "ledger": report["ledger"]["exact"],
        "nothing else": not report["problems"],
    }


def tell(report: dict[str, Any]) -> None:
    """On the screen: a line for each curve, then the rest."""
    print(
        f"{'':32}{'2nd tenth':>12}{'last tenth':>12}{'growth, %':>12}{'slope':>12}{'in a life':>12}"
    )
    rest = dict(report)
    for name in (*MEASURES, "disk_mb", "step_s", "cpu_s"):
        found = rest.pop(name)
        for part, facts in ({"": found} if "tenths" in found else found).items():
            names = ("second_tenth", "last_tenth", "growth_percent", "slope", "slope_in_a_life")
            values = (f"{'' if facts.get(n) is None else facts[n]:>12}" for n in names)
            print(f"{name:14}{part:18}{''.join(values)}")
    print(json.dumps(rest, indent=1))


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=200, help="steps between two faults")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="at most")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="of the run, to be kept; must be new")
    parser.add_argument("--smoke", action="store_true", help="120 steps, a fault every 20")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.every = 120, 20
    return args


def main() -> None:
    """Run, report."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="endurance_") as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}, seed {args.seed}", flush=True)
        write_run(folder, args.steps, max(STEPS_PER_BATCH, args.every // 4 // 2 * 2))
        run = Endurance(args, folder.absolute())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: run.stop())
        began = time.monotonic()
        run.run()
        if not run.furthest:
            raise SystemExit("it ended before its first step")
        if args.folder:
            (folder / "samples.pickle").write_bytes(pickle.dumps(run.samples.all))
        report = make_report(run, args, (time.monotonic() - began) / 60)
    tell(report)
    if args.out:
        text = json.dumps(report, indent=1)
        # What is in a list of numbers belongs on one line.
        text = re.sub(r"\[\s+[\d\s.,null-]+\]", lambda found: " ".join(found[0].split()), text)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
