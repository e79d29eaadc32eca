"""What `plan` reads of a config, or of a run, and says of it."""

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

import lightning_grpo.strategies.fsdp2  # noqa: F401 - registers `trainer.strategy: fsdp2`
from lightning_grpo.cli.fit import with_paths
from lightning_grpo.cli.sources import collect
from lightning_grpo.cli.trainer_cli import PlannedCLI, build_run
from lightning_grpo.contract import check_gpus, check_trainer, training_setup
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError, printable
from lightning_grpo.module import GRPOModule
from lightning_grpo.plan.hardware import (
    GPUS,
    MIB,
    Speed,
    Workload,
    cpu_speed,
    find_gpu,
    gpu_speed,
    measured_flops,
    named_machine,
    require_gpu,
    this_machine,
)
from lightning_grpo.plan.plan import (
    GIB,
    Compared,
    Plan,
    RunFacts,
    describe,
    describe_check,
    make_plan,
    memory_of,
)
from lightning_grpo.policy.size import model_size
from lightning_grpo.report.run import PHASES, Run
from lightning_grpo.servers.base import Machine
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.session.material import open_material

Configs = Sequence[tuple[str, Path]]
"""(name as given, path) of each config file."""
Named = tuple[int | None, str | None, int | None]
"""A machine by its GPUs, their kind and its cores, as far as the command says."""

_CORES = 16
"""Of each GPU of a machine that is only named."""
_WARM = 3
"""First steps of a run that don't count."""
_MACHINE = re.compile(r"(?:(?P<gpus>\d+) x (?P<name>.+?), )?(?P<cores>\d+) CPU cores")


def say_plan(
    configs: Configs, options: Sequence[str], named: Named, completion: int | None, as_json: bool
) -> int:
    """Print the plan of a config; the exit status.

    Args:
        configs: Of the run.
        options: Other options of `fit`.
        named: What to plan for.
        completion: Tokens of a completion on average; None: half of what is allowed.
        as_json: Whether a program reads it.
    """
    machine, gpu = _machine(named)
    facts = read_facts(configs, options, machine, gpu, completion)
    made, assumed = make_plan(facts), _assumed(facts, completion is not None)
    if as_json:
        sys.stdout.write(json.dumps(made.plain() | {"assumed": assumed}) + "\n")
    else:
        title = f"{configs[0][0]} on {_called(machine, gpu)}"
        sys.stdout.write(printable(describe(made, facts, title, assumed)))
    return 1 if made.problems else 0


def _machine(named: Named) -> tuple[Machine, str]:
    """What is planned for, and what its GPUs are called."""
    gpus, gpu, cores = named
    if gpus is None and gpu is None:
        return this_machine(cores or len(os.sched_getaffinity(0)))
    name, count = require_gpu(gpu or "h200"), gpus or 1
    return named_machine(count, name, cores or _CORES * count), name


def _called(machine: Machine, gpu: str) -> str:
    cores = f"{machine.cores} CPU core{'s' * (machine.cores > 1)}"
    if not machine.gpus:
        return cores
    size = f" ({machine.gpu_bytes / GIB:.0f} GiB)" if machine.gpu_bytes else ""
    return f"{machine.gpus} x {gpu or 'an unknown GPU'}{size}, {cores}"


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


def read_facts(
    configs: Configs, options: Sequence[str], machine: Machine, gpu: str, completion: int | None
) -> RunFacts:
    """What `fit` would make of a config on a machine.

    Args:
        configs: Of the run.
        options: Other options of `fit`.
        machine: Where it would run.
        gpu: What its GPUs are called.
        completion: Tokens of a completion on average; None: half of what is allowed.
    """
    options = with_paths(configs, options)
    settings = collect(configs, options)
    make = functools.partial(PlannedCLI, machine=machine)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        options = [*options, f"--trainer.default_root_dir={scratch}"]
        with build_run(configs, options, settings, GRPOModule, RolloutDataModule, make) as run:
            assert isinstance(run, PlannedCLI)
            return _facts_of(run, Path(scratch), gpu, completion)


def _facts_of(run: PlannedCLI, scratch: Path, gpu: str, completion: int | None) -> RunFacts:
    module, data = run.model, run.datamodule
    check_trainer(run.trainer)
    module.check_model()
    data.servers.machine, data.run_dir = run.machine, scratch
    check_gpus(run.training, data.servers.planned_devices if run.training else ())
    setup = training_setup(module, run.trainer, run.ranks, "cuda" if run.training else "cpu")
    settings = data.settings_for(module.model_path, module.router_replay)
    material = open_material(settings)
    size, load = model_size(material.config), material.load_of(settings)
    if size is None:
        raise ConfigError(
            f"`model` must have the widths of a usual decoder to be planned, {module.model_path!r} "
            "names them otherwise. Run a few steps, and read `health/gpu_peak_gb`."
        )
    longest = (load.context_tokens or 2048) // 2
    if material.sampling is not None:
        longest = material.sampling.max_new_tokens
    scored_first = module.correction is not None and data.steps_per_rollout > 1
    work = Workload(
        data.batch_size,
        data.group_size,
        data.max_staleness,
        prompt=material.mean_prompt,
        completion=completion or max(1, longest // 2),
        longest=max(longest, completion or 0),
        minibatches=data.minibatches_per_batch,
        passes=data.passes_per_batch,
        scorings=int(module.kl is not None) + int(scored_first),
    )
    speed = _speed(gpu, data.servers) if run.training else cpu_speed(measured_flops())
    return RunFacts(size, setup, work, data.servers, load, run.machine, tuple(run.training), speed)


def _speed(gpu: str, servers: object) -> Speed | None:
    """Of a GPU by its name; None where a CPU serves: who knows which of both is the limit?"""
    known = find_gpu(gpu)
    return None if known is None or isinstance(servers, EmbeddedServers) else gpu_speed(known)


def _assumed(facts: RunFacts, is_given: bool) -> list[str]:
    work = facts.work
    said = f"completions of {work.completion:,.0f} tokens on average, {work.longest:,.0f} at most"
    if not is_given:
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
        found.append(f"{kind} are sized elsewhere, and timed as one on a GPU like these")
    return found


# -- a run that was -------------------------------------------------------------------------------


def say_check(
    run: Run, configs: Configs, options: Sequence[str], named: Named, as_json: bool
) -> int:
    """Print what would have been planned for a run beside what it measured; the exit status.

    Args:
        run: That has trained.
        configs: Its own, and what lies over it.
        options: Other options of `fit`.
        named: What to plan for in place of the machine that the run names.
        as_json: Whether a program reads it.
    """
    machine, gpu = _recorded_machine(run, named)
    facts = _as_it_was(read_facts(configs, options, machine, gpu, None), run)
    lines = compare(make_plan(facts), facts, run)
    work, skipped = facts.work, _skipped(len(run.trained))
    notes = [
        f"with the lengths that the run had: {work.prompt:,.0f} and {work.completion:,.0f} tokens; "
        f"{work.trained_share:.0%} of the trajectories trained",
        f"means of {len(run.trained) - skipped} steps, the first {skipped} left out",
    ]
    if facts.speed is not None:
        notes.append(facts.speed.words)
    if as_json:
        found = [asdict(line) | {"ratio": line.ratio} for line in lines]
        sys.stdout.write(json.dumps({"lines": found, "notes": notes}) + "\n")
    else:
        title = f"{run.folder} on {_called(machine, gpu)}"
        sys.stdout.write(printable(describe_check(lines, title, notes)))
    return 0


def _recorded_machine(run: Run, named: Named) -> tuple[Machine, str]:
    """What the run said it ran on, unless the command says otherwise."""
    starts = run.timeline.starts
    found = _MACHINE.match(starts[-1].machine) if starts else None
    if any(named) or found is None:
        return _machine(named)
    gpus, name, cores = int(found["gpus"] or 0), found["name"] or "", int(found["cores"])
    known = find_gpu(name)
    return Machine(gpus, GPUS[known].mib * MIB if known else 0, cores), known or name


def _as_it_was(facts: RunFacts, run: Run) -> RunFacts:
    """With the lengths that the run had, and the largest micro-batch that they make."""
    work = facts.work
    mean = _mean(run, "completion/length_mean") or work.completion
    longest = _mean(run, "completion/length_max") or work.longest
    alike = _mean(run, "reward/zero_variance_fraction") or 0.0
    whole = replace(work, completion=mean, longest=longest)
    most = max(each.unique for each in whole.micro_batches(facts.setup))
    setup = replace(facts.setup, max_tokens=min(most, facts.setup.max_tokens))
    return replace(facts, work=replace(whole, trained_share=max(0.01, 1 - alike)), setup=setup)


def compare(made: Plan, facts: RunFacts, run: Run) -> list[Compared]:
    """Each figure that both have."""
    figures: list[tuple[str, float, float | None, str]] = []
    if made.parts is not None:
        parts, steps = made.parts, facts.work.steps
        for what, predicted, metric, times in (
            ("a step", parts.step, "time/step_s", steps),
            ("waiting for rollouts", parts.waiting, PHASES["waiting"], 1),
            ("forward and backward", parts.forward_backward, PHASES["forward and backward"], steps),
            ("optimizer", parts.optimizer, PHASES["optimizer"], steps),
            ("weight sync", parts.sync, PHASES["weight sync"], 1),
        ):
            measured = _mean(run, metric)
            figures.append((what, predicted, measured and times * measured, "s"))
    memory, metric = memory_of(facts).allocated, "health/gpu_peak_gb"
    if not facts.training:
        memory, metric = made.process, "health/rss_gb"
    peak = max((value for _, value in run.series(metric)), default=None)
    figures.append(("memory of the trainer", memory / GIB, peak, "GiB"))
    return [Compared(what, p, m, unit) for what, p, m, unit in figures if m is not None]


def _skipped(rows: int) -> int:
    return _WARM if rows > 2 * _WARM else 0


def _mean(run: Run, metric: str) -> float | None:
    """Of the steps that count."""
    values = [value for _, value in run.series(metric)]
    values = values[_skipped(len(values)) :]
    return fmean(values) if values else None
