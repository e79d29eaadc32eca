"""`lightning-grpo plan`: memory and time of a run before it is started, and of one that was."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.cli.fit import find_configs, with_paths
from lightning_grpo.cli.sources import Parser, collect, whole_number
from lightning_grpo.cli.unimported import refuse_at_once, refuse_missing_prompts
from lightning_grpo.errors import ConfigError
from lightning_grpo.report.run import find_folder, read_run

_USAGE = """\
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
    from lightning_grpo.cli.planned import say_check, say_plan

    named = (options.gpus, options.gpu, options.cores)
    if run is not None:
        return say_check(run, configs, rest, named, options.json)
    return say_plan(configs, rest, named, options.completion_tokens, options.json)
