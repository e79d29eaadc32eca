"""What `doctor` and `plan` read of a run that was built and not started."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio
from lightning.pytorch.accelerators import CPUAccelerator

import lightning_grpo.strategies.fsdp2  # noqa: F401 - registers `trainer.strategy: fsdp2`
from lightning_grpo.cli.fit import with_paths
from lightning_grpo.cli.machine import Check, CheckResult, disk
from lightning_grpo.cli.sources import collect
from lightning_grpo.cli.trainer_cli import GRPOCLI, PlannedCLI, build_run
from lightning_grpo.contract import check_gpus, check_trainer, training_setup
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError, RewardError, printable
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
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.size import model_size
from lightning_grpo.report.run import PHASES, Run
from lightning_grpo.rollout.scoring import Reward, RewardScorer, RewardValue, reward_name
from lightning_grpo.rollout.workflow import RolloutWorkflow
from lightning_grpo.servers.base import Machine, RunningServers, Servers, free_ports
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import SGLangServers, examine_python, resolve_python
from lightning_grpo.serving.client import ServerClient, new_session
from lightning_grpo.serving.wire import GenerateRequest
from lightning_grpo.session.material import Material, load_config, open_material
from lightning_grpo.strategies.checkpoints import reading, require_same_model, saved_shapes, shapes
from lightning_grpo.types import Prompt

# -- what `doctor` looks at ------------------------------------------------------------------------

_SHOWN = 160
_TRY_REWARD = (
    "what is right isn't known (no column `answer`): call it on a right answer in a test of its "
    "own, as `lightning-grpo init` makes one"
)
_SAME_FOR_RIGHT = "the first answer tried is the row's own `answer`: it should be worth more"
_TOO_LATE = (
    "make it faster, or raise `data.limits.reward_timeout_s`; a group without a reward is sampled "
    "again"
)
_POLICY = "policy.model."
"""What the names of a policy's parameters begin with in a checkpoint."""
_WEIGHTS = ("*.safetensors", "*.bin")
_CHECKPOINTS, _CHECKPOINT_BYTES = 2, 12
"""Of a parameter: fp32 weights and both moments of AdamW."""


def run_checks(run: GRPOCLI, root: Path, scratch: Path, start: bool) -> Iterator[tuple[str, Check]]:
    """Name and check, in the order in which a run would fail.

    Args:
        run: What was built.
        root: Where the run would write.
        scratch: A folder to write to meanwhile.
        start: Whether to start the servers.
    """
    module: GRPOModule = run.model
    module.trainer = run.trainer  # as `fit` does: what a model must be depends on the strategy
    data: RolloutDataModule = run.datamodule
    opened: list[Material] = []
    yield "trainer", lambda: trainer_settings(run.trainer, data)
    yield "model", lambda: model(module, root)
    ckpt_path = run.config["fit"].ckpt_path
    if ckpt_path is not None and Path(ckpt_path).exists():
        yield "checkpoint", lambda: checkpoint(module, ckpt_path)
    yield "prompts", lambda: prompts(module, data, scratch, opened)
    for material in opened:  # none where the prompts have failed
        yield (
            "reward",
            functools.partial(reward, material, data.workflow, data.limits.reward_timeout_s),
        )
    yield "servers", lambda: servers(data.servers)
    if start:
        yield "start", lambda: one_token(module.model_path, data.servers, scratch)


def trainer_settings(trainer: Any, data: RolloutDataModule) -> Iterator[CheckResult]:
    """Trainer settings that can't work with rollouts, or with this machine."""
    check_trainer(trainer)
    strategy, ranks = type(trainer.strategy).__name__, trainer.world_size
    data.check_ranks(trainer)
    found = f"{strategy}, {ranks} rank{'' if ranks == 1 else 's'}"
    here, cores = ranks // trainer.num_nodes, len(os.sched_getaffinity(0))
    if isinstance(trainer.accelerator, CPUAccelerator) and here > cores:
        yield CheckResult(
            "trainer", "warning", f"{found}, and {cores} CPU cores here",
            f"set trainer.devices to {cores} at most: one core a rank",
        )  # fmt: skip
    else:
        yield CheckResult("trainer", "ok", found)


def model(module: GRPOModule, root: Path) -> Iterator[CheckResult]:
    """Whether this model can be trained, by its config alone; its weights; room to save it."""
    module.check_model()
    size = model_size(load_config(module.model_path))
    about = f"{size.parameters / 1e6:,.1f}M parameters" if size is not None else "readable"
    yield CheckResult("model", "ok", f"{module.model_path}: {about}")
    folder = Path(module.model_path).expanduser()
    if folder.is_dir() and not any(f for kind in _WEIGHTS for f in folder.glob(kind)):
        yield CheckResult(
            "model", "failure", f"{folder} has no weights (*.safetensors)",
            "download the whole model, or save it with `save_pretrained`",
        )  # fmt: skip
    saved = _CHECKPOINTS * _CHECKPOINT_BYTES * size.parameters if size is not None else 0
    yield from disk(root, max(1.0, saved / 1e9))


def checkpoint(module: GRPOModule, path: str) -> Iterator[CheckResult]:
    """Whether a checkpoint is one of this model, by the shapes of its parameters."""
    with reading(path):
        saved = saved_shapes(path)
    builds_itself = type(module).build_policy is not GRPOModule.build_policy
    if module.lora is None and not builds_itself:
        built = load_policy(module.model_path, meta=True)
        own = {f"{_POLICY}{name}": shape for name, shape in shapes(built.state_dict()).items()}
        require_same_model({n: s for n, s in saved.items() if n.startswith(_POLICY)}, own)
    yield CheckResult("checkpoint", "ok", f"{path}: {len(saved)} tensors")


def prompts(
    module: GRPOModule, data: RolloutDataModule, scratch: Path, opened: list[Material]
) -> Iterator[CheckResult]:
    """Whether the prompts can be read and rendered; shows the end of the first."""
    data.run_dir = scratch
    material = open_material(data.settings_for(module.model_path, module.router_replay))
    opened.append(material)
    held_out = sum(map(len, material.val_prompts.values()))
    yield CheckResult("prompts", "ok", f"{material.num_prompts:,}, and {held_out:,} held out")
    first = next(iter(material.first_prompts.values()))
    said = printable(first.text[-_SHOWN:].replace("\n", "\\n"))
    yield CheckResult("prompts", "ok", f"the first ends: {said}")
    if material.tokenizer.chat_template is None:
        yield CheckResult(
            "template", "warning", f"{module.model_path} has no chat template: it continues text",
            "take the chat model (-Instruct) for questions and answers",
        )  # fmt: skip
    if not material.end_ids:
        yield CheckResult(
            "template", "warning", "the model has no end token: answers end by length alone",
            "set `eos_token` of the tokenizer, or `sampling.stop`",
        )  # fmt: skip


def reward(
    material: Material, workflow: RolloutWorkflow, timeout_s: float
) -> Iterator[CheckResult]:
    """Each reward, with the row's own answer where there is one, and with an empty one."""
    for name, prompt in material.first_prompts.items():
        own = workflow.of(name)
        tried, failed = anyio.run(_tried, own, prompt, timeout_s)
        if failed:
            yield CheckResult("reward", "warning", failed, _TOO_LATE)
        elif not tried:
            yield CheckResult("reward", "ok", f"{type(own).__name__} scores by itself: not tried")
        for called, given, empty in tried:
            found = f"{called} gives {given} to the first answer tried and {empty} to an empty one"
            if given == empty:
                known = "answer" in prompt.columns
                way_out = _SAME_FOR_RIGHT if known else _TRY_REWARD
                yield CheckResult("reward", "warning", found, way_out)
            else:
                yield CheckResult("reward", "ok", found)


async def _tried(
    workflow: RolloutWorkflow, prompt: Prompt, timeout_s: float
) -> tuple[list[tuple[str, Any, Any]], str]:
    """Of each reward its name, and what it gave to an answer of the data's and to none.

    Also why one gave nothing, which may be another thing in the run (its time, what it calls).
    """
    values: list[tuple[str, Any, Any]] = []
    failed = ""
    async with RewardScorer(workflow.reward_functions, 1, timeout_s) as scorer:

        async def score(reward: Reward, arguments: Mapping[str, Any]) -> RewardValue:
            nonlocal failed
            try:
                given = await scorer.score(reward, arguments)
            except RewardError as error:
                failed = str(error)
                raise
            nothing = {"completion": "", "completion_ids": ()}
            empty = {name: nothing.get(name, value) for name, value in arguments.items()}
            values.append((reward_name(reward), given, await scorer.score(reward, empty)))
            return given

        await workflow.try_rewards(prompt, score)
    return values, "" if values else failed


def servers(chosen: Servers) -> Iterator[CheckResult]:
    """Whether servers could be started, or answer already."""
    if isinstance(chosen, RunningServers):
        quick = copy.copy(chosen)
        quick.connect_timeout_s = min(chosen.connect_timeout_s, 5.0)
        for handle in quick.start("", Path()):
            yield CheckResult("servers", "ok", f"{handle.url} answers")
    elif isinstance(chosen, SGLangServers):
        installed = resolve_python(chosen.python)
        found = examine_python(Path(installed.python), installed.device)
        free_ports(1, chosen.port_range)
        yield CheckResult("servers", "ok", f"SGLang {found.sglang} in {found.python}")
    else:
        yield CheckResult("servers", "ok", chosen.describe() or type(chosen).__name__)


def one_token(model_path: str, chosen: Servers, folder: Path) -> Iterator[CheckResult]:
    """Start the servers and have each sample one token."""
    began = time.monotonic()
    try:
        for handle in chosen.start(model_path, folder):
            ids = anyio.run(_sampled, handle.url, chosen.api_key)
            seconds = time.monotonic() - began
            yield CheckResult("start", "ok", f"{handle.url} sampled {ids} after {seconds:.0f} s")
    finally:
        chosen.stop()


async def _sampled(url: str, api_key: str | None) -> list[int]:
    async with new_session(api_key) as session:
        request = GenerateRequest([1, 1], {"max_new_tokens": 1}, return_logprob=False)
        return list((await ServerClient(url, session).generate(request)).output_ids)


# -- what `plan` says ------------------------------------------------------------------------------

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
    module.trainer = run.trainer
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
