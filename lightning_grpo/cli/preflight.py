"""`lightning-grpo doctor` and `plan`: what would stop a run, and whether it fits, said beforehand.

What they read of a run that was built stands in `unstarted`, whose imports take seconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_grpo.cli.fit import find_configs, with_paths
from lightning_grpo.cli.machine import (
    Check,
    CheckResult,
    disk,
    gpus,
    machine,
    network,
    nodes,
    packages,
)
from lightning_grpo.cli.sources import Parser, collect, whole_number
from lightning_grpo.cli.unimported import refuse_at_once, refuse_missing_prompts
from lightning_grpo.errors import ConfigError, GRPOError, printable
from lightning_grpo.report.run import find_folder, read_run

_DOCTOR_USAGE = """\
usage: lightning-grpo doctor [--config FILE ...] [--start] [--json] [options of fit]

Look at this machine and, with a config, at everything that a run would need of it. Nothing is
trained, no server is started (but by --start) and no run folder is made. Under `srun` the ranks
also look for each other's files and talk over their process group. Exit status: 0, or 1 after a
failure.

  --start   start the config's servers and sample one token
  --json    one JSON object for each line
"""


Say = Callable[[CheckResult], None]


def doctor(argv: Sequence[str]) -> int:
    """Look at the machine and the config, and print a line for each check."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_DOCTOR_USAGE)
        return 0
    parser = Parser(prog="lightning-grpo doctor", allow_abbrev=False, add_help=False)
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(list(argv))
    configs, rest = find_configs(words)
    if not configs and (rest or options.start):
        raise ConfigError("--config", "needs a file before other options", rest or "--start")
    found: list[CheckResult] = []

    def say(finding: CheckResult) -> None:
        found.append(finding)
        (say_json if options.json else say_line)(finding)

    examine(configs, rest, say, start=options.start)
    failed = sum(finding.verdict == "failure" for finding in found)
    if not options.json:
        sys.stdout.write(f"\n{failed} failure{'' if failed == 1 else 's'}\n")
    return 1 if failed else 0


def say_line(finding: CheckResult) -> None:
    """Print a finding for a person."""
    line = f"{finding.verdict:<8} {finding.check:<13} {finding.found}"
    if finding.way_out:
        line += f"\n{'':<22} -> {finding.way_out}"
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def say_json(finding: CheckResult) -> None:
    """Print a finding for a program."""
    sys.stdout.write(json.dumps(asdict(finding)) + "\n")
    sys.stdout.flush()


def examine(
    configs: Sequence[tuple[str, Path]], options: Sequence[str], say: Say, *, start: bool = False
) -> None:
    """Run every check that applies.

    Args:
        configs: (name as given, path) of each config file; none: the machine alone.
        options: Other options of `fit`.
        say: Given each finding as it is made.
        start: Whether to start the servers.
    """
    for check in (packages, machine, gpus, network):
        tell(check.__name__, check, say)
    if configs:
        examine_config(configs, options, say, start)
    else:
        tell("disk", lambda: disk(Path.cwd()), say)
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        tell("nodes", nodes, say)


def tell(name: str, check: Check, say: Say) -> None:
    """Say what a check finds; what it raises is a failure."""
    try:
        for finding in check():
            say(finding)
    except (GRPOError, OSError, RuntimeError, ImportError) as error:
        say(CheckResult(name, "failure", str(error)))


def examine_config(
    configs: Sequence[tuple[str, Path]], options: Sequence[str], say: Say, start: bool
) -> None:
    """Look at what a run would look at before it starts servers, and at those on request."""
    try:
        options = with_paths(configs, options)
        settings = collect(configs, options)
        refuse_at_once(settings)
        # Only now: these imports take seconds.
        from lightning_grpo.cli.trainer_cli import build_run
        from lightning_grpo.cli.unstarted import run_checks
        from lightning_grpo.datamodule import RolloutDataModule
        from lightning_grpo.module import GRPOModule

        trainer = settings.plain().get("trainer") or {}
        root = Path(str(trainer.get("default_root_dir") or "runs"))
        with tempfile.TemporaryDirectory() as scratch:
            options = [*options, f"--trainer.default_root_dir={scratch}"]
            with build_run(configs, options, settings, GRPOModule, RolloutDataModule) as run:
                say(CheckResult("config", "ok", "every setting is understood"))
                for name, check in run_checks(run, root, Path(scratch), start):
                    tell(name, check, say)
    except (GRPOError, OSError, RuntimeError) as error:
        say(CheckResult("config", "failure", str(error)))


# -- plan ------------------------------------------------------------------------------------------

_PLAN_USAGE = """\
usage: lightning-grpo plan --config FILE [--config FILE ...] [options of fit]
       lightning-grpo plan --check RUN [--json]

Say before a run whether it fits, which GPUs train and serve, how long a step takes, and what to
change first. Nothing is started, no weights are loaded and no GPU is needed; what `fit` would
choose is chosen here by the same code. Exit status: 0, 1 where it does not fit, 2 after a mistake.

  --gpus N                 plan for a machine with N GPUs instead of this one
  --gpu NAME               of this kind: h200, h100, a100, l40s, rtx-4090, ... (default: h200)
  --cores N                and so many CPU cores (default: 16 for each GPU)
  --completion-tokens N    mean length of a completion (default: half of what is allowed)
  --check RUN              compare what would have been planned with what a run measured
  --json                   one JSON object
"""


def plan(argv: Sequence[str]) -> int:
    """Plan a run, or check a plan against a run."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_PLAN_USAGE)
        return 0
    parser = Parser(prog="lightning-grpo plan", allow_abbrev=False, add_help=False)
    parser.add_argument("--gpus", type=whole_number(1))
    parser.add_argument("--gpu")
    parser.add_argument("--cores", type=whole_number(1))
    parser.add_argument("--completion-tokens", type=whole_number(1))
    parser.add_argument("--check", type=Path)
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(list(argv))
    configs, rest = find_configs(words)
    run = None
    if options.check is not None:
        folder = find_folder(options.check)
        config = folder / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"`--check` needs a run's config.yaml, {str(folder)!r} has none.")
        configs, run = [(str(config), config), *configs], read_run(folder, options.check.name)
        if not run.trained:
            raise ConfigError(f"`--check` needs a run that trained, {str(folder)!r} has no step.")
    elif not configs:
        raise ConfigError("--config", "needs a file", words, "Such as gsm8k.yaml.")
    settings = collect(configs, with_paths(configs, rest))
    refuse_at_once(settings)
    if run is None:
        refuse_missing_prompts(settings, configs)
    # Only now: these imports take seconds.
    from lightning_grpo.cli.unstarted import say_check, say_plan

    named = (options.gpus, options.gpu, options.cores)
    if run is not None:
        return say_check(run, configs, rest, named, options.json)
    return say_plan(configs, rest, named, options.completion_tokens, options.json)
