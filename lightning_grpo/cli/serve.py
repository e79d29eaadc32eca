"""`lightning-grpo serve MODEL`: the embedded engine, behind SGLang's HTTP API and OpenAI's."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.checks import require_on_hub
from lightning_grpo.shipped import resolve_path

_USAGE = """\
usage: lightning-grpo serve MODEL [options of the engine]

Serve a model (a Hugging Face folder, a hub id or shipped:NAME) on this machine's CPU, behind
SGLang's HTTP API and OpenAI's (`/v1/models`, `/v1/completions`, `/v1/chat/completions`, streaming
too; without tools and structured output). Prints `READY http://HOST:PORT` when it answers; Ctrl-C
ends it.

  lightning-grpo serve shipped:quickstart --port 30000
  OPENAI_BASE_URL=http://127.0.0.1:30000/v1 OPENAI_API_KEY=- python my_agent.py

The engine's options:
"""


def run(argv: Sequence[str]) -> int:
    """Become the engine's process."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        sys.stdout.flush()
        argv = ["--help"]
    elif not argv[0].startswith("-") and not _is_folder(resolve_path(argv[0])):
        require_on_hub("MODEL", argv[0], "model")  # before torch is imported, which takes seconds
    command = engine_command(argv)
    os.execv(command[0], command)


def _is_folder(path: str) -> bool:
    return bool(path) and Path(path).is_dir()


def engine_command(argv: Sequence[str]) -> list[str]:
    """The engine's command line for the arguments of `serve`."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", resolve_path(arguments[0]), *arguments[1:]]
    return [sys.executable, "-m", "lightning_grpo.engine", *arguments]
