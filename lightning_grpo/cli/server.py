"""`lightning-grpo serve`: the embedded engine; `install-server`: SGLang's own environment."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.cli.sources import Parser
from lightning_grpo.errors import ConfigError, require_on_hub
from lightning_grpo.servers.sglang import (
    SGLANG_VERSION,
    examine_python,
    install_server,
    remember_python,
    server_folder,
)
from lightning_grpo.shipped import resolve_path

_ROOM_GB = {"cpu": 4, "cuda": 15}
"""What to keep free for an environment, with pip's cache left out."""

_SERVE_USAGE = """\
usage: lightning-grpo serve MODEL [options of the engine]

Serve a model (a Hugging Face folder, a hub id or shipped:NAME) on this machine's CPU, behind
SGLang's HTTP API and OpenAI's (`/v1/models`, `/v1/completions`, `/v1/chat/completions`, streaming
too; without tools and structured output). Prints `READY http://HOST:PORT` when it answers; Ctrl-C
ends it.

  lightning-grpo serve shipped:quickstart --port 30000
  OPENAI_BASE_URL=http://127.0.0.1:30000/v1 OPENAI_API_KEY=- python my_agent.py

The engine's options:
"""


def serve(argv: Sequence[str]) -> int:
    """Become the engine's process."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_SERVE_USAGE)
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


_INSTALL_USAGE = """\
Install SGLang into a virtual environment of its own, and remember it: SGLangServers starts servers
with it from then on. The trainer does not need SGLang, and the two need different versions of torch
and transformers.

  lightning-grpo install-server --dry-run                        where, what and how large
  lightning-grpo install-server
  lightning-grpo install-server --use /opt/sglang/bin/python     remember one that is there
  lightning-grpo install-server --cpu -- --extra-index-url URL   options of pip after --
"""


def install(argv: Sequence[str]) -> int:
    """Install and remember, or only remember."""
    options, pip_arguments = _install_options(argv)
    device = "cpu" if options.cpu else "cuda"
    if options.use is not None:
        if not (options.use.is_file() and os.access(options.use, os.X_OK)):
            raise ConfigError("--use", "must be an interpreter that has SGLang", str(options.use))
        installed = examine_python(options.use.absolute(), device)
        if options.dry_run:
            print(f"would remember SGLang {installed.sglang}: {installed.python}")
            return 0
    else:
        if options.folder is not None and options.folder.is_file():
            raise ConfigError("--folder", "must be a folder, new or made so", str(options.folder))
        folder = server_folder(options.folder, options.version, device)
        print(f"SGLang {options.version} for the {device}: {describe_room(folder, device)}")
        if options.dry_run:
            words = ["pip", "install", *pip_arguments, f"sglang=={options.version}"]
            print(f"would make a virtual environment there and run in it: {shlex.join(words)}")
            return 0
        installed = install_server(folder, options.version, device, pip_arguments, print)
    file = remember_python(installed)
    print(f"SGLang {installed.sglang} for the {device}: {installed.python}\nremembered in {file}")
    return 0


def _install_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    arguments = list(argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(
        prog="lightning-grpo install-server",
        description=_INSTALL_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--folder", type=Path, help="where (default: this user's data folder)")
    parser.add_argument("--version", default=SGLANG_VERSION, help=f"default: {SGLANG_VERSION}")
    parser.add_argument(
        "--cpu", action="store_true", help="leave out what only a GPU needs (for tests; slow)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and no more"
    )
    parser.add_argument("--use", type=Path, help="an interpreter that has SGLang already")
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def describe_room(folder: Path, device: str) -> str:
    """How much room an environment wants, and how much there is."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / 1e9
    return f"allow {_ROOM_GB[device]} GB in {folder}, where {free:.0f} GB are free"
