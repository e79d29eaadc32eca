"""`lightning-grpo plan`: memory and time of a run before it is started, and of one that was."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_grpo.cli.fit import split_configs, with_paths
from lightning_grpo.cli.sources import Parser, collect, whole_number
from lightning_grpo.errors import ConfigError, printable
from lightning_grpo.report.run import PHASES, Run, find_folder, read_run
from lightning_grpo.servers.base import Machine

if TYPE_CHECKING:
    from lightning_grpo.cli.trainer_cli import PlannedCLI
    from lightning_grpo.plan.hardware import Speed
    from lightning_grpo.plan.plan import Plan, RunFacts
    from lightning_grpo.plan.text import Compared

_USAGE = """\
usage: lightning-grpo plan --config FILE [--config FILE ...] [options of fit]
       lightning-grpo plan --check RUN [--json]

Say before a run whether it fits, which GPUs train and serve, how long a step takes, and what to
change first. Nothing is started, no weights are loaded and no GPU is needed; what `fit` would
choose is chosen here by the same code. Exit status: 0, 1 where it does not fit, 2
after a mistake.

  --gpus N                 plan for a machine with N GPUs instead of this one
  --gpu NAME               of this kind: h200, h100, a100, l40s, rtx-4090, ... (default: h200)
  --cores N                and so many CPU cores (default: 16 for each GPU)
  --completion-tokens N    mean length of a completion (default: half of what is allowed)
  --check RUN              compare what would have been planned with what a run measured
  --json                   one JSON object
"""
_CORES = 16
"""Of each GPU of a machine that is only named."""
_WARM = 3
"""First steps of a run that don't count."""
_MACHINE = re.compile(r"(?:(?P<gpus>\d+) x (?P<name>.+?), )?(?P<cores>\d+) CPU cores")


def plan(argv: Sequence[str]) -> int:
    """Plan a run, or check a plan against a run."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_USAGE)
        return 0
    parser = Parser(prog="lightning-grpo plan", allow_abbrev=False, add_help=False)
    parser.add_argument("--gpus", type=whole_number(1))
    parser.add_argument("--gpu")
    parser.add_argument("--cores", type=whole_number(1))
    parser.add_argument("--completion-tokens", type=whole_number(1))
    parser.add_argument("--check", type=Path)
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(list(argv))
    if options.check is not None:
        return _check(options, words)
    configs, rest = split_configs(words)
    if not configs:
        raise ConfigError("--config", "needs a file", words or "none", "Such as gsm8k.yaml.")
    machine, gpu = _machine(options.gpus, options.gpu, options.cores)
    with _facts(configs, rest, machine, gpu, options.completion_tokens) as (facts, assumed):
        return _say_plan(
            facts, assumed, f"{configs[0][0]} on {_called(machine, gpu)}", options.json
        )


def _say_plan(facts: RunFacts, assumed: list[str], title: str, as_json: bool) -> int:
    from lightning_grpo.plan.plan import make_plan
    from lightning_grpo.plan.text import describe

    made = make_plan(facts)
    if as_json:
        sys.stdout.write(json.dumps(made.plain() | {"assumed": assumed}) + "\n")
    else:
        sys.stdout.write(printable(describe(made, facts, title, assumed)))
    return 1 if made.problems else 0


def _machine(gpus: int | None, gpu: str | None, cores: int | None) -> tuple[Machine, str]:
    """What is planned for, and what its GPUs are called."""
    from lightning_grpo.plan.hardware import named_machine, require_gpu, this_machine

    if gpus is None and gpu is None:
        return this_machine(cores or len(os.sched_getaffinity(0)))
    name, count = require_gpu(gpu or "h200"), gpus or 1
    return named_machine(count, name, cores or _CORES * count), name


def _called(machine: Machine, gpu: str) -> str:
    cores = f"{machine.cores} CPU core{'s' * (machine.cores > 1)}"
    if not machine.gpus:
        return cores
    return f"{machine.gpus} x {gpu} ({machine.gpu_bytes / (1 << 30):.0f} GiB), {cores}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines about what it builds."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _facts(
    configs: Sequence[tuple[str, Path]],
    options: Sequence[str],
    machine: Machine,
    gpu: str,
    completion: int | None,
) -> Iterator[tuple[RunFacts, list[str]]]:
    """What `fit` would make of a config on a machine, and what was assumed in words."""
    options = with_paths(configs, options)
    settings = collect(configs, options)
    # Only now: these imports take seconds. The strategy's registers `trainer.strategy: fsdp2`.
    import lightning_grpo.strategies.fsdp2  # noqa: F401
    from lightning_grpo.cli.trainer_cli import PlannedCLI, build_run
    from lightning_grpo.datamodule import RolloutDataModule
    from lightning_grpo.module import GRPOModule

    make = functools.partial(PlannedCLI, machine=machine)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        options = [*options, f"--trainer.default_root_dir={scratch}"]
        with build_run(configs, options, settings, GRPOModule, RolloutDataModule, make) as run:
            assert isinstance(run, PlannedCLI)
            yield _read_facts(run, Path(scratch), gpu, completion)


def _read_facts(
    run: PlannedCLI, scratch: Path, gpu: str, completion: int | None
) -> tuple[RunFacts, list[str]]:
    from lightning_grpo.contract import check_gpus, check_trainer, training_setup
    from lightning_grpo.plan.plan import RunFacts
    from lightning_grpo.plan.seconds import Workload
    from lightning_grpo.policy.size import model_size
    from lightning_grpo.servers.process import EmbeddedServers
    from lightning_grpo.session.material import open_material

    module, data, machine = run.model, run.datamodule, run.machine
    check_trainer(run.trainer)
    module.check_model()
    data.servers.machine = machine
    if run.training:
        check_gpus(run.training, data.servers.planned_devices)
    device = "cuda" if run.training else "cpu"
    setup = training_setup(module, run.trainer, run.ranks, device)
    data.run_dir = scratch
    settings = data.settings_for(module.model_path)
    material = open_material(settings)
    size = model_size(material.config)
    if size is None:
        raise ConfigError(
            f"`model` must have the widths of a usual decoder to be planned, {module.model_path!r} "
            "names them otherwise. Run a few steps, and read `health/gpu_peak_gb`."
        )
    load = material.load_of(settings)
    longest = _longest(material.sampling, load.context_tokens)
    mean = float(completion or max(1, longest // 2))
    scored_first = module.correction is not None and data.steps_per_rollout > 1
    work = Workload(
        data.batch_size,
        data.group_size,
        data.max_staleness,
        prompt=material.mean_prompt,
        completion=mean,
        longest=max(longest, mean),
        minibatches=data.minibatches_per_batch,
        passes=data.passes_per_batch,
        scorings=int(module.kl is not None) + int(scored_first),
    )
    speed = _speed(gpu if run.training else "")
    if run.training and isinstance(data.servers, EmbeddedServers):
        speed = None  # which of both processors is the limit nobody knows
    facts = RunFacts(size, setup, work, data.servers, load, machine, tuple(run.training), speed)
    return facts, _assumed(facts, completion)


def _longest(sampling: Any, context: int | None) -> int:
    """Tokens of the longest completion; of a workflow that samples by itself half a context."""
    return sampling.max_new_tokens if sampling is not None else (context or 2048) // 2


def _speed(gpu: str) -> Speed | None:
    from lightning_grpo.plan.hardware import cpu_speed, find_gpu, gpu_speed, measured_flops

    if not gpu:
        return cpu_speed(measured_flops())
    known = find_gpu(gpu)
    return gpu_speed(known) if known is not None else None


def _assumed(facts: RunFacts, completion: int | None) -> list[str]:
    from lightning_grpo.servers.sglang import SGLangServers

    work = facts.work
    said = f"completions of {work.completion:,.0f} tokens on average, {work.longest:,.0f} at most"
    if completion is None:
        said += " (the half of it; `--completion-tokens` says otherwise)"
    found = [
        f"{said}, prompts of {work.prompt:,.0f}",
        "rewards of every group differ: a group of equal ones costs no training",
    ]
    if facts.training:
        found.append("micro-batches are as full as they may be, and the optimizer is Adam")
        found.append("nothing else runs on the GPUs")
    if facts.speed is not None:
        found.append(facts.speed.words)
    if facts.training and not isinstance(facts.servers, SGLangServers):
        kind = type(facts.servers).__name__
        found.append(f"{kind} are sized elsewhere: of servers the time alone is planned, as one")
    return found


# -- a run that was -------------------------------------------------------------------------------


def _check(options: Any, words: Sequence[str]) -> int:
    """Plan what a run was, with the lengths that it had, and print both."""
    from lightning_grpo.plan.plan import make_plan
    from lightning_grpo.plan.text import describe_check

    folder = find_folder(options.check)
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"`--check` needs the config.yaml of a run, {str(folder)!r} has none.")
    run = read_run(folder, options.check.name)
    rows = len(run.series("time/step_s"))
    if not rows:
        raise ConfigError(f"`--check` needs a run that has trained, {str(folder)!r} has no step.")
    machine, gpu = _recorded_machine(run, options)
    with _facts([(str(config), config)], words, machine, gpu, None) as (facts, _):
        facts = _as_it_was(facts, run)
        made = make_plan(facts)
        lines = compare(made, facts, run)
    notes = [
        f"with the lengths that the run had: {facts.work.prompt:,.0f} and "
        f"{facts.work.completion:,.0f} tokens; {facts.work.trained_share:.0%} of the trajectories "
        "trained",
        f"means of {max(1, rows - _skipped(rows))} steps, the first {_skipped(rows)} left out",
    ]
    if facts.speed is not None:
        notes.append(facts.speed.words)
    title = f"{folder} on {_called(machine, gpu)}"
    if options.json:
        found = [asdict(line) | {"ratio": line.ratio} for line in lines]
        sys.stdout.write(json.dumps({"lines": found, "notes": notes}) + "\n")
    else:
        sys.stdout.write(printable(describe_check(lines, title, notes)))
    return 0


def _recorded_machine(run: Run, options: Any) -> tuple[Machine, str]:
    """What the run said it ran on, unless the command says otherwise."""
    from lightning_grpo.plan.hardware import GPUS, MIB, find_gpu

    starts = run.timeline.starts
    found = _MACHINE.match(starts[-1].machine) if starts else None
    if options.gpus or options.gpu or found is None:
        return _machine(options.gpus, options.gpu, options.cores)
    gpus, name, cores = int(found["gpus"] or 0), found["name"] or "", int(found["cores"])
    known = find_gpu(name)
    return Machine(gpus, GPUS[known].mib * MIB if known else 0, cores), known or name


def _as_it_was(facts: RunFacts, run: Run) -> RunFacts:
    """With the lengths that the run had, and the largest micro-batch that they make."""
    from lightning_grpo.plan.seconds import Workload

    work: Workload = facts.work
    mean = _mean(run, "completion/length_mean") or work.completion
    longest = _mean(run, "completion/length_max") or work.longest
    alike = _mean(run, "reward/zero_variance_fraction") or 0.0
    work = replace(work, completion=mean, longest=longest, trained_share=max(0.01, 1 - alike))
    most = max(each.unique for each in replace(work, trained_share=1.0).micro_batches(facts.setup))
    setup = replace(facts.setup, max_tokens=min(most, facts.setup.max_tokens))
    return replace(facts, work=work, setup=setup)


def compare(made: Plan, facts: RunFacts, run: Run) -> list[Compared]:
    """Each figure that both have."""
    from lightning_grpo.plan.plan import GIB, memory_of
    from lightning_grpo.plan.text import Compared

    lines: list[Compared] = []
    parts, steps = made.parts, facts.work.steps
    if parts is not None:
        names = {
            "a step": (parts.step, "time/step_s"),
            "waiting for rollouts": (parts.waiting, PHASES["waiting"]),
            "forward and backward": (parts.forward_backward, PHASES["forward and backward"]),
            "optimizer": (parts.optimizer, PHASES["optimizer"]),
        }
        for what, (predicted, metric) in names.items():
            measured = _mean(run, metric)
            if measured is not None:
                lines.append(Compared(what, predicted, measured * steps, "s"))
        sync = _mean(run, PHASES["weight sync"])
        if sync is not None:
            lines.append(Compared("weight sync", parts.sync, sync, "s"))
    memory, metric = memory_of(facts).allocated, "health/gpu_peak_gb"
    if not facts.training:
        memory, metric = made.process, "health/rss_gb"
    peak = max((value for _, value in run.series(metric)), default=None)
    if peak is not None:
        lines.append(Compared("memory of the trainer", memory / GIB, peak, "GiB"))
    return lines


def _skipped(rows: int) -> int:
    return _WARM if rows > 2 * _WARM else 0


def _mean(run: Run, metric: str) -> float | None:
    """Of the steps that count."""
    values = [value for _, value in run.series(metric)]
    values = values[_skipped(len(values)) :]
    return fmean(values) if values else None
