"""What a run's numbers and answers say, in sentences: the questions that a report answers first.

Each sentence names what it was counted from. What may have a harmless reason is called a sign, and
says which answers to read.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lightning_grpo.errors import UnreadableError
from lightning_grpo.report.answers import HELD_OUT, TRAINED, light_rows, step_of
from lightning_grpo.report.run import PHASES, Run, later_without_training, step_times
from lightning_grpo.types import is_interval

Row = Mapping[str, Any]
Interval = tuple[float, float]

_FEW = 5
"""Steps that are averaged: single rollout batches are noisy."""
_SLOW, _SLOW_S, _MOST_SLOW = 1.5, 1.0, 50
"""How many times the median, and how many seconds more than it, a step is slow; steps explained."""
_LAST_FILES = 3
_SHORT_ANSWER = 8
_SIGN = "! "
_NO_WORSE = "no worse than the intervals allow"
_NOTABLE, _FLAT_SHARE, _MANY_TRUNCATED, _MOSTLY = 0.05, 0.1, 0.2, 0.5
_SAME_FOR = 3
_TELLING = 10
"""Answers that are enough for a verdict."""


@dataclass(frozen=True)
class Look:
    """Which answers to read.

    Attributes:
        label: Of the button.
        state: What the page's filters are set to.
    """

    label: str
    state: dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """A question and what the run says to it.

    Attributes:
        question: As a reader would ask it.
        answer: The short one.
        details: What it rests on, a line each.
        looks: Answers to read.
    """

    question: str
    answer: str
    details: list[str] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)


def findings(run: Run) -> list[Finding]:
    """Every question that the run's files answer."""
    learning, gamed = is_it_learning(run), is_it_gamed(run)
    if learning and gamed and any(line.startswith(_SIGN) for line in gamed.details):
        learning.details.append("It is the reward that says so, and it may be gamed: see there.")
    found = (
        how_it_ended(run),
        best_step(run),
        learning,
        what_is_wrong(run),
        gamed,
        where_time_went(run),
        slow_steps(run),
    )
    return [finding for finding in found if finding is not None]


# -- how it went ----------------------------------------------------------------------------------


def how_it_ended(run: Run) -> Finding:
    """Done, stopped, failed, or nobody said so."""
    trained = run.trained
    wanted = run.setting("trainer.max_steps")
    steps = f"{len(trained)} steps were trained" if trained else "No step was trained"
    last = max([*trained, *(s.step for s in run.timeline.starts)], default=0)
    if trained and len(trained) != last:
        steps = f"It was trained up to step {last}, of which {len(trained)} are in the metrics"
    if isinstance(wanted, int) and wanted > 0:
        steps += f" of {wanted}" if trained and len(trained) == last else f" ({wanted} were asked)"
    end = run.timeline.end
    if end is not None:
        words = {"done": "It ran to its end", "stopped": "It was stopped", "failed": "It failed"}
        answer = f"{words.get(end.how, end.how)} at step {end.step}. {steps}."
    elif run.timeline.starts:
        answer = f"It runs, or was killed: nothing says that it ended. {steps}."
    else:
        answer = f"{steps}. Its folder does not say how it ended."
    details = [end.text] if end is not None and end.text else []
    details += [
        f"This is {run.folder}. A later run, {later}, has trained on nothing so far: "
        "`lightning-grpo report` of its own folder says more."
        for later in later_without_training(run.folder)[-1:]
    ]
    resumed = [str(start.step) for start in run.timeline.starts[1:]]
    if resumed:
        details.append(f"It went on from step {', '.join(resumed)}.")
    details += [
        f"{metric} was {text} at step {step}." for step, metric, text in run.not_finite[:_FEW]
    ]
    return Finding("How did it end?", answer, details)


def command_to_go_on(run: Run) -> str:
    """What to type to train on, or again where there is no checkpoint."""
    words = f"lightning-grpo fit --config {shlex.quote(str(run.folder / 'config.yaml'))}"
    if not run.has_checkpoint:
        return words
    end, wanted = run.timeline.end, run.setting("trainer.max_steps")
    if end is not None and end.how == "done" and isinstance(wanted, int) and 0 < wanted <= end.step:
        words += f" --trainer.max_steps {2 * wanted}"  # else it would end at once
    return f"{words} --ckpt_path last"


def best_step(run: Run) -> Finding | None:
    """By the held-out score, else by the reward's mean over some steps."""
    question = "Which step was best?"
    score = run.score
    if score is None:
        return _best_by_reward(run, question)
    points = run.series(score)
    best, value = max(points, key=lambda point: point[1])
    intervals = run.intervals(score)
    answer = f"Step {best}: {score} {_with_interval(value, intervals.get(best))}"
    first_step, first = points[0]
    answer += f", from {first:.3f} at step {first_step}." if first_step != best else "."
    last_step, last = points[-1]
    details = []
    if last_step != best:
        _, high = _difference((value, intervals.get(best)), (last, intervals.get(last_step)))
        what = "worse by more than the intervals" if high < 0 else _NO_WORSE
        details.append(f"At the last validation, step {last_step}, it was {last:.3f}: {what}.")
    trained_to = max(run.trained, default=0)
    if trained_to > last_step:
        details.append(f"Steps {last_step + 1} to {trained_to} were not validated.")
    details += _checkpoints(run, best)
    look = Look(f"Held-out answers at step {best}", _state(run, HELD_OUT, best))
    return Finding(question, answer, details, [look] if run.trajectory_files(True) else [])


def _best_by_reward(run: Run, question: str) -> Finding | None:
    points = run.series("reward/mean")
    if not points:
        return None
    means = [
        (points[i][0], fmean(value for _, value in points[max(0, i - _FEW + 1) : i + 1]))
        for i in range(min(_FEW, len(points)) - 1, len(points))
    ]
    best, value = max(means, key=lambda point: point[1])
    answer = (
        f"Step {best} by the training reward, {value:.3f} as mean of {min(_FEW, len(points))} "
        "steps. No held-out prompts were answered, which would say it better."
    )
    return Finding(question, answer, _checkpoints(run, best))


def _checkpoints(run: Run, step: int) -> list[str]:
    """The checkpoint of a step, or the steps that there are checkpoints of."""
    found: dict[int, Path] = {}
    for path in sorted((run.folder / "checkpoints").glob("*.ckpt")):
        digits = re.search(r"step=?_?(\d+)", path.name)
        if digits:
            found[int(digits[1])] = path
    if step in found:
        return [f"Its checkpoint: {found[step]}"]
    steps = ", ".join(map(str, sorted(found)))
    return [f"There is no checkpoint of it; there are some of step {steps}."] if found else []


def is_it_learning(run: Run) -> Finding | None:
    """Training reward and held-out score, at first and at last."""
    details = []
    ends = _ends(run.series("reward/mean"))
    if ends:
        details.append(f"Training reward: {ends.words()}.")
    gains = []
    for name in sorted(n for n in run.table if n.startswith("eval/") and not is_interval(n)):
        points = run.series(name)
        if len(points) > 1:
            intervals = run.intervals(name)
            (first_step, first), (last_step, last) = points[0], points[-1]
            low, high = _difference(
                (first, intervals.get(first_step)), (last, intervals.get(last_step))
            )
            gain = (low > 0) - (high < 0)
            gains.append(gain)
            verdict = {1: "better", -1: "worse", 0: "no difference"}[gain]
            details.append(
                f"{name}: {first:.3f} -> {last:.3f} (step {first_step} -> {last_step}): {verdict} "
                f"at 95 % ({low:+.3f} to {high:+.3f})."
            )
    if not details:
        return None
    rises = ends is not None and ends.change > _NOTABLE
    if not gains:
        answer = "The training reward rises." if rises else "The training reward does not rise."
        answer += " Held-out prompts were not answered twice, so that is all that is known."
    else:
        words = {
            1: "Yes: the held-out score rises.",
            -1: "No: the held-out score falls.",
            0: "Not that one could tell: the held-out score stays within its interval.",
        }
        answer = words[gains[0]]
    equal = _values(run, "reward/zero_variance_fraction")
    if equal and fmean(equal) > _MOSTLY:
        details.append(
            f"{fmean(equal):.0%} of the groups had equal rewards, of which nothing can be learned: "
            "prompts that are neither always nor never solved, or a reward with steps between."
        )
    return Finding("Is it learning?", answer, details)


# -- time -----------------------------------------------------------------------------------------


def where_time_went(run: Run) -> Finding | None:
    """Shares of the steps' time."""
    times = step_times(run)
    total = sum(sum(parts.values()) for parts in times.values())
    if total <= 0:
        return None
    shares = {part: sum(p[part] for p in times.values()) / total for part in [*PHASES, "other"]}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{part} {share:.0%}" for part, share in ordered if share >= 0.005)  # noqa: PLR2004
    answer = f"{len(times)} steps took {_seconds(total)} without validation: {listed}."
    details = []
    trainer, server = (
        fmean(_values(run, f"idle/{who}_fraction") or [0.0]) for who in ("trainer", "server")
    )
    if trainer > server + _FLAT_SHARE:
        details.append("The trainer waits for the servers more than they for it.")
    elif server > trainer + _FLAT_SHARE:
        details.append("The servers wait for the trainer more than it for them.")
    validation = sum(s.seconds for s in run.timeline.spans if s.what == "validation")
    if validation:
        details.append(f"Validations took {_seconds(validation)} besides.")
    return Finding("Where did the time go?", answer, details)


def slow_steps(run: Run) -> Finding | None:
    """The steps that took far longer than the median."""
    words = why_slow(run)
    times = {step: sum(parts.values()) for step, parts in step_times(run).items()}
    if not times:
        return None
    middle = median(times.values())
    slowest = sorted(words, key=lambda step: -times[step])[:_FEW]
    if not slowest:
        answer = (
            f"None took more than {_SLOW} times the median of {_seconds(middle)} and "
            f"{_seconds(_SLOW_S)} longer."
        )
        return Finding("Which steps took long, and why?", answer)
    listed = ", ".join(f"{step} ({_seconds(times[step])})" for step in slowest)
    more = f", and {len(words) - len(slowest)} more" if len(words) > len(slowest) else ""
    answer = f"Step{'s' * (len(words) > 1)} {listed}{more}, where the median is {_seconds(middle)}."
    details = [f"Step {step}: {words[step]}" for step in slowest]
    return Finding("Which steps took long, and why?", answer, details)


def why_slow(run: Run) -> dict[int, str]:
    """Step -> what it spent its time on, for those that took far longer than the median."""
    times = step_times(run)
    totals = {step: sum(parts.values()) for step, parts in times.items()}
    if not totals:
        return {}
    usual = {
        part: median(parts[part] for parts in times.values()) for part in next(iter(times.values()))
    }
    middle = median(totals.values())
    slow = [s for s, t in totals.items() if t > _SLOW * middle and t - middle > _SLOW_S]
    slow = sorted(slow, key=lambda step: -totals[step])[:_MOST_SLOW]
    return {step: _why(run, step, times[step], usual, middle) for step in sorted(slow)}


def _why(
    run: Run, step: int, parts: Mapping[str, float], usual: Mapping[str, float], middle: float
) -> str:
    total = sum(parts.values())
    more = {part: seconds - usual[part] for part, seconds in parts.items()}
    largest = sorted((p for p in more if more[p] > _FLAT_SHARE * middle), key=lambda p: -more[p])
    listed = ", ".join(
        f"{part} {_seconds(parts[part])} (usually {_seconds(usual[part])})" for part in largest[:2]
    )
    words = [f"{_seconds(total)} instead of {_seconds(middle)}: {listed or 'a little of all'}."]
    words += [_COUNTED[name].format(value) for name, value in _counts(run, step)]
    words += _servers_meanwhile(run, step)
    words += [
        f"Said then: {mark.text.rstrip('.')}." for mark in run.timeline.marks if mark.step == step
    ]
    if step in {start.step + 1 for start in run.timeline.starts}:
        words.append("It was the first step since a start, when nothing was sampled ahead.")
    return " ".join(words)


_COUNTED = {
    "rollout/retried": "{:.0f} attempts at a group failed and were made again.",
    "rollout/failed": "{:.0f} prompts were given up.",
    "rollout/expired": "{:.0f} groups were given up as stragglers.",
    "rollout/filtered": "{:.0f} groups were filtered out.",
    "completion/length_max": "Its longest completion had {:.0f} tokens.",
    "health/event_loop_lag_s": "The rollout client's loop was {:.1f} s late.",
}
"""What may make a step long, in words."""
_FAR = 1.25


def _counts(run: Run, step: int) -> list[tuple[str, float]]:
    """What was far above the usual in a step."""
    found = []
    for name in _COUNTED:
        points = dict(run.series(name))
        value = points.get(step, 0.0)
        if value > _FAR * median(points.values() or [0.0]) and value >= 1:  # a second, or one group
            found.append((name, value))
    return found


def _servers_meanwhile(run: Run, step: int) -> list[str]:
    """How long servers were out, or stood still, in a step's time."""
    after = ("weight sync", "validation")  # of a step, which come behind it
    own = [s for s in run.timeline.spans if s.step == step and s.what not in after]
    if not own:
        return []
    begin, end = min(s.at for s in own), max(s.at + s.seconds for s in own)
    lost: Counter[tuple[str, str]] = Counter()
    for span in run.timeline.spans:
        overlap = min(end, span.at + span.seconds) - max(begin, span.at)
        if span.what in ("out", "paused") and overlap > 0:
            lost[span.lane, span.what] += overlap  # type: ignore[assignment]
    return [
        f"{lane} was {what} for {_seconds(seconds)} of it."
        for (lane, what), seconds in lost.most_common(2)
        if seconds > _FLAT_SHARE * (end - begin)
    ]


# -- answers --------------------------------------------------------------------------------------


def what_is_wrong(run: Run) -> Finding | None:
    """The answers below the threshold, at the last validation or else in the last steps."""
    held_out = run.trajectory_files(held_out=True)
    kind = HELD_OUT if held_out else TRAINED
    files = held_out[-1:] or run.trajectory_files()[-_LAST_FILES:]
    rows = _rows(files)
    if not rows:
        return None
    threshold = _threshold(run)
    wrong = [row for row in rows if not row["reward"] >= threshold]
    when = f"step {rows[-1]['step']}" if kind == HELD_OUT else f"steps {_range(rows)}"
    asked = "held-out answers" if kind == HELD_OUT else "answers in training"
    answer = f"{len(wrong):,} of {len(rows):,} {asked} at {when} have a reward below {threshold:g}."
    details = list(_about_wrong(wrong, [row for row in rows if row["reward"] >= threshold]))
    if kind == HELD_OUT and len(held_out) > 1:
        details += _changes(_rows(held_out[:1]), rows, threshold)
    steps = rows[-1]["step"] if kind == HELD_OUT else _range(rows)
    state = _state(run, kind, steps) | {"below": threshold, "sort": "reward"}
    looks = [Look("Read the wrong ones", state)] if wrong else []
    if kind == HELD_OUT and len(held_out) > 1:
        first = step_of(held_out[0])
        change = _state(run, HELD_OUT, f"{first},{step_of(held_out[-1])}")
        looks.append(Look("Before and after", change | {"mode": "change", "sort": "change"}))
    return Finding("What does it get wrong now?", answer, details, looks)


def _about_wrong(wrong: Sequence[Row], right: Sequence[Row]) -> Iterable[str]:
    if not wrong:
        return
    truncated = sum(row["truncated"] for row in wrong)
    if truncated:
        yield f"{truncated:,} of the wrong ones were cut off at the length limit."
    lengths = fmean(row["length"] for row in wrong)
    line = f"Wrong answers have {lengths:.0f} tokens on average"
    yield line + (f", right ones {fmean(r['length'] for r in right):.0f}." if right else ".")
    expected = [(row, expected_number(row)) for row in wrong]
    known = [(row, number) for row, number in expected if number is not None]
    if known:
        there = sum(number in _numbers(row["completion"]) for row, number in known)
        fails = "form" if there > len(known) / 2 else "reasoning"
        verdict = f": {fails} is what mostly fails." if len(known) >= _TELLING else "."
        yield (
            f"In {there:,} of {len(known):,} wrong ones the expected number is somewhere in the "
            f"answer{verdict}"
        )
    for name in sorted({name for row in wrong for name in dict(row["rewards"])}):
        values = [dict(row["rewards"]).get(name, 0.0) for row in wrong]
        if len(dict(wrong[0]["rewards"])) > 1:
            yield f"Mean of {name} among them: {fmean(values):.3g}."


def _changes(before: Sequence[Row], after: Sequence[Row], threshold: float) -> list[str]:
    """What became of the same prompts since the first validation."""
    first, last = _means(before), _means(after)
    both = [(first[key], last[key]) for key in first.keys() & last.keys()]
    worse = sum(b >= threshold > a for b, a in both)
    better = sum(a >= threshold > b for b, a in both)
    never = sum(max(a, b) < threshold for b, a in both)
    return [
        f"Since step {before[0]['step']}, of {len(both):,} prompts: {better:,} became right, "
        f"{worse:,} became wrong, {never:,} were wrong both times."
    ]


def is_it_gamed(run: Run) -> Finding | None:
    """Signs that the reward is served rather than the task."""
    rows = _rows(run.trajectory_files()[-_LAST_FILES:])
    if not rows:
        return None
    threshold = _threshold(run)
    high = [row for row in rows if row["reward"] >= threshold]
    signs = [
        sign
        for sign in (
            _held_out_behind(run),
            *_named_rewards_apart(run),
            _without_expected(high),
            _same_text(high),
            _truncated_but_rewarded(rows, threshold),
            _length_pays(run, rows),
            _entropy_gone(run),
        )
        if sign is not None
    ]
    alarming = [text for flagged, text in signs if flagged]
    answer = (
        f"{len(alarming)} of {len(signs)} signs point{'s' * (len(alarming) == 1)} to it."
        if alarming
        else f"None of {len(signs)} signs points to it; no count sees everything, so read some."
    )
    details = [_SIGN * flagged + text for flagged, text in sorted(signs, reverse=True)]
    state = _state(run, TRAINED, _range(rows)) | {"sort": "reward", "reverse": True}
    looks = [
        Look("Read the best rewarded", state),
        Look("The longest", state | {"sort": "length"}),
        Look(
            "The shortest rewarded", state | {"sort": "length", "reverse": False, "from": threshold}
        ),
    ]
    return Finding("Is it gaming the reward?", answer, details, looks)


Sign = tuple[bool, str]


def _held_out_behind(run: Run) -> Sign | None:
    score, ends = run.score, _ends(run.series("reward/mean"))
    points = run.series(score) if score else []
    if ends is None or len(points) < 2:  # noqa: PLR2004 - a change has two ends
        return None
    gain = points[-1][1] - points[0][1]
    behind = ends.change > _NOTABLE and gain < ends.change / 4
    return behind, (
        f"The training reward changed by {ends.change:+.3f}, the held-out score by {gain:+.3f}: "
        + ("only the former rises." if behind else "no gap opens.")
    )


def _named_rewards_apart(run: Run) -> Iterable[Sign]:
    ends = {
        name: found
        for name in run.table
        if fnmatchcase(name, "reward/*/mean") and (found := _ends(run.series(name)))
    }
    if len(ends) > 1:
        rising = [n for n, e in ends.items() if e.change > _NOTABLE]
        falling = [n for n, e in ends.items() if e.change < -_NOTABLE]
        listed = ", ".join(f"{n.split('/')[1]} {e.change:+.3f}" for n, e in sorted(ends.items()))
        apart = bool(rising and falling)
        yield apart, f"Rewards by name: {listed}" + (": one rises, one falls." if apart else ".")


def _without_expected(high: Sequence[Row]) -> Sign | None:
    known = [(row, number) for row in high if (number := expected_number(row)) is not None]
    if not known:
        return None
    without = sum(number not in _numbers(row["completion"]) for row, number in known)
    return without > _NOTABLE * len(known), (
        f"{without:,} of {len(known):,} rewarded answers don't hold the expected number."
    )


def _same_text(high: Sequence[Row]) -> Sign | None:
    if not high:
        return None
    prompts: dict[str, set[tuple[str, int]]] = {}
    for row in high:
        prompts.setdefault(row["completion"].strip(), set()).add(_key(row))
    text, most = max(prompts.items(), key=lambda item: len(item[1]))
    same = sum(len(prompts[row["completion"].strip()]) >= _SAME_FOR for row in high)
    short = median(row["length"] for row in high) < _SHORT_ANSWER
    words = f"{same:,} of {len(high):,} rewarded answers are the same text for several prompts"
    if same:
        words += f" ({len(most)} times: {_short(text)})"
    return same > _FLAT_SHARE * len(high) and not short, words + "."


def _truncated_but_rewarded(rows: Sequence[Row], threshold: float) -> Sign | None:
    cut = [row for row in rows if row["truncated"]]
    if not cut:
        return None
    rewarded = sum(row["reward"] >= threshold for row in cut)
    many = len(cut) > _NOTABLE * len(rows)
    return many and rewarded > _MANY_TRUNCATED * len(cut), (
        f"{rewarded:,} of {len(cut):,} answers that were cut off got the reward all the same."
    )


def _length_pays(run: Run, rows: Sequence[Row]) -> Sign | None:
    """Whether longer, or shorter, answers to the same prompt get more."""
    pairs = []
    for members in _by_prompt(rows).values():
        reward, length = (fmean(row[name] for row in members) for name in ("reward", "length"))
        pairs += [(row["reward"] - reward, row["length"] - length) for row in members]
    across = sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)
    ends = _ends(run.series("completion/length_mean"))
    if across <= 0 or ends is None:
        return None
    r = sum(a * b for a, b in pairs) / across**0.5
    decides = abs(r) > 0.8  # noqa: PLR2004 - length explains two thirds of the reward
    return decides, (
        f"Length went from {ends.first:.0f} to {ends.last:.0f} tokens; within a group, reward and "
        f"length correlate by {r:+.2f}" + (": length nearly decides." if decides else ".")
    )


def _entropy_gone(run: Run) -> Sign | None:
    ends = _ends(run.series("policy/entropy"))
    if ends is None or ends.first <= 0:
        return None
    gone = ends.last < ends.first / 20
    return gone, f"Entropy went from {ends.first:.3g} to {ends.last:.3g}" + (
        ": the policy has hardly any variety left." if gone else "."
    )


_EXPECTED = ("answer", "solution", "target", "label", "ground_truth", "expected")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def expected_number(row: Row) -> str | None:
    """The number that the row's column of answers ends with, if it has one."""
    columns = _loaded(row["columns"])
    for name in _EXPECTED:
        if name in columns:
            found = _NUMBER.findall(str(columns[name]))
            return found[-1].replace(",", "") if found else None
    return None


def _numbers(text: str) -> set[str]:
    return {found.replace(",", "") for found in _NUMBER.findall(text)} | set(
        re.findall(r"\d+(?:\.\d+)?", text)
    )


# -- small things ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """A curve's mean over its first and its last steps."""

    first: float
    last: float
    first_steps: str
    last_steps: str

    @property
    def change(self) -> float:
        """From the first to the last."""
        return self.last - self.first

    def words(self) -> str:
        """Both, with their steps."""
        return f"{self.first:.3f} ({self.first_steps}) -> {self.last:.3f} ({self.last_steps})"


def _ends(points: Sequence[tuple[int, float]]) -> Ends | None:
    count = min(_FEW, len(points) // 2)
    if not count:
        return None
    parts = (points[:count], points[-count:])
    names = [f"step {p[0][0]}" if count == 1 else f"steps {p[0][0]}-{p[-1][0]}" for p in parts]
    first, last = (fmean(value for _, value in part) for part in parts)
    return Ends(first, last, names[0], names[1])


def _rows(files: Sequence[Path]) -> list[Row]:
    out: list[Row] = []
    for file in files:
        try:
            out += light_rows(file)
        except UnreadableError:
            continue  # the choice of answers says so
    return out


def _key(row: Row) -> tuple[str, int]:
    return (row["dataset"] or "", row["row"])


def _by_prompt(rows: Sequence[Row]) -> dict[tuple[int, str, int], list[Row]]:
    out: dict[tuple[int, str, int], list[Row]] = {}
    for row in rows:
        out.setdefault((row["step"], *_key(row)), []).append(row)
    return out


def _means(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    return {key[1:]: fmean(r["reward"] for r in part) for key, part in _by_prompt(rows).items()}


def _threshold(run: Run) -> float:
    found = run.setting("data.evaluation.pass_threshold")
    return float(found) if isinstance(found, int | float) else 0.5


def _range(rows: Sequence[Row]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return str(first) if first == last else f"{first}-{last}"


def _state(run: Run, kind: str, steps: object) -> dict[str, Any]:
    return {"view": "answers", "run": run.name, "kind": kind, "steps": str(steps)}


def _values(run: Run, metric: str) -> list[float]:
    return [value for _, value in run.series(metric)]


Measured = tuple[float, Interval | None]
"""A score, and its confidence interval where there is one."""


def _difference(before: Measured, after: Measured) -> Interval:
    """The confidence interval of what a score changed by, of those of both.

    Source: Newcombe 1998, Statistics in Medicine 17, 873-890, method 10.
    """
    (first, (first_low, first_high)), (last, (last_low, last_high)) = (
        (value, interval or (value, value)) for value, interval in (before, after)
    )
    change = last - first
    low = change - math.hypot(last - last_low, first_high - first)
    return low, change + math.hypot(last_high - last, first - first_low)


def _with_interval(value: float, interval: Interval | None) -> str:
    shown = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return f"{value:.3f}{shown}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:  # noqa: PLR2004 - two minutes
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"  # noqa: PLR2004


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= most else text[: most - 4] + " ...")


def _loaded(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}
