"""`lightning-grpo certify`: a proof that a model's path is right, before training starts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_grpo.cli.sources import Parser
from lightning_grpo.errors import ConfigError, printable
from lightning_grpo.shipped import resolve_path

if TYPE_CHECKING:
    from lightning_grpo.certify.checks import CheckLine
    from lightning_grpo.certify.run import Certificate

_USAGE = """\
usage: lightning-grpo certify MODEL [--json]
       lightning-grpo certify --all [--out FILE]

Prove that a model's path is right before it is trained. From the config of MODEL (a folder, a hub
id, shipped:NAME, or an architecture of transformers: qwen3, or Qwen3Config) a tiny random model of
the same classes is made, in a minute and on a CPU: every kind of layer, windows, RoPE, biases
and caps, sizes shrunk. Printed with its figure is a line for each check:

  architecture   the package takes it
  packed         rows packed together, against each row alone in transformers
  prefixes       rows that share a prompt, computed once
  passes         two passes, bit for bit
  gradient       against autograd through transformers, in fp64
  cuts           the gradient in one micro-batch, against several
  ranks          a step on two ranks, ddp and fsdp2, against one rank's
  flops          the operations of a step can be counted
  names          what servers get: the checkpoint's names and layouts, and the same model
  engine         what the embedded engine samples, where it runs the model
  adapter        LoRA merged for the servers, where there is PEFT
  export         the exported folder
  template       the chat template and the end tokens, where MODEL has a tokenizer

  --json       one JSON object for each line
  --all        every causal architecture of transformers, each in a process of its own
  --out FILE   write what --all finds as a table in Markdown

Exit status: 0 certified; 1 something is wrong, or could not be tried; 2 a mistake; 3 refused.
"""
_WRONG, _REFUSED = 1, 3


def certify(argv: Sequence[str]) -> int:
    """Certify one model, or all architectures."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_USAGE)
        return 0
    parser = Parser(prog="lightning-grpo certify", allow_abbrev=False, add_help=False)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(list(argv))
    if options.all == (options.model is not None):
        raise ConfigError("MODEL", "must be named, or --all given, and not both")
    if options.out is not None and not options.all:
        raise ConfigError("--out", "goes with --all", str(options.out))
    if options.all:
        return _certify_all(options.out)
    return _certify_one(options.model, say_json if options.json else say_line, options.json)


def _certify_one(model: str, say: Callable[[CheckLine], None], as_json: bool) -> int:
    # Only now: these imports take seconds.
    from lightning_grpo.certify.run import Certificate, quietly

    quietly()
    found: list[CheckLine] = []
    for line in lines_of(model):
        found.append(line)
        say(line)
    certificate = Certificate(model, tuple(found))
    if not as_json:
        sys.stdout.write(printable(f"\n{model}: {certificate.verdict}\n"))
    return status_of([certificate])


def status_of(found: Sequence[Certificate]) -> int:
    """The exit status: 1 before 3 before 0."""
    verdicts = {each.verdict for each in found}
    if not verdicts.isdisjoint(("WRONG", "untried")):
        return _WRONG
    return _REFUSED if "refused" in verdicts else 0


def lines_of(model: str) -> Iterator[CheckLine]:
    """All lines of a model.

    Args:
        model: A folder, hub id, `shipped:NAME`, `model_type` or the name of its config's class.

    Raises:
        ConfigError: There is no such model.
    """
    from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined]
        CONFIG_MAPPING_NAMES,
    )

    from lightning_grpo.certify.run import certify, certify_kind, template

    folder = resolve_path(model)
    kinds = {name: kind for kind, name in CONFIG_MAPPING_NAMES.items()}
    kind = kinds.get(model, model)
    if kind in CONFIG_MAPPING_NAMES and not Path(folder).expanduser().is_dir():
        yield from certify_kind(kind)
        return
    config = _read_config(folder)
    refused = False
    for line in certify(config):
        refused |= line.verdict == "refused"
        yield line
    if not refused:
        yield template(folder, config)


def _read_config(model: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from lightning_grpo.policy.load import check_source

    check_source(model)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            "MODEL",
            "must be a folder with config.json, a hub id or an architecture of transformers",
            model,
            " ".join(str(error).split())[:400],
        ) from error


def say_line(line: CheckLine) -> None:
    """Print a line for a person."""
    said = f"{line.verdict:<8} {line.check:<13} {line.found}"
    if line.figure is not None:
        said += f": {line.figure:.2g}, at most {line.limit:.2g}"
    sys.stdout.write(printable(said) + "\n")
    sys.stdout.flush()


def say_json(line: CheckLine) -> None:
    """Print a line for a program; a figure that is no number is null."""
    figure = line.figure if line.figure is not None and math.isfinite(line.figure) else None
    sys.stdout.write(json.dumps(asdict(line) | {"figure": figure}) + "\n")
    sys.stdout.flush()


def _certify_all(out: Path | None) -> int:
    from lightning_grpo.certify.run import architectures, certify_each, counts

    found: list[Certificate] = []
    for certificate in certify_each(architectures()):
        found.append(certificate)
        said = f"{certificate.verdict:<10} {certificate.model:<26} {certificate.why}"
        sys.stdout.write(printable(said).rstrip() + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"\n{counts(found)}, of {len(found)}\n")
    if out is not None:
        out.write_text(page(found))
    return status_of([each for each in found if each.verdict != "refused"])


def page(found: Sequence[Certificate]) -> str:
    """The table with what it says, as a page of the docs.

    Args:
        found: One for each architecture.
    """
    from lightning_grpo.certify.run import counts, table

    made_with = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    return f"""\
# Models

`lightning-grpo certify MODEL` proves by a tiny random model of the same classes that a model's path
is right: packed rows, gradients, ranks, what servers get, the embedded engine, adapters, exports
([what each line means](troubleshooting.md#is-the-models-path-right)). This page is what it finds
for every causal architecture of transformers (`make certify-all` writes it). Each is tried as
transformers itself configures it, with what that leaves open set as checkpoints do: yours may
differ (another kind of layer, a cap, a window), so ask for it by its folder or hub id.

*certified*: all lines are right; what servers get has a checkpoint's names, layouts and values.
*refused*: `fit` says the same before anything is started. *WRONG*: the package takes it, and a line
finds a difference. *untried*: transformers' own config makes no model.

{counts(found)}, of {len(found)} ({made_with}, {datetime.now(UTC):%Y-%m-%d}, CPU).

{table(found)}"""
