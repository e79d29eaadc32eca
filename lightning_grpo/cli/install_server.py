"""`lightning-grpo install-server`: the servers' own environment, made and remembered."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.cli.sources import Parser
from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.sglang import (
    SGLANG_VERSION,
    describe_room,
    examine_python,
    install_server,
    remember_python,
    server_folder,
)

_DESCRIPTION = """\
Install SGLang into a virtual environment of its own, and remember it: SGLangServers starts servers
with it from then on. The trainer does not need SGLang, and the two need different versions of torch
and transformers.

  lightning-grpo install-server --dry-run                        where, what and how large
  lightning-grpo install-server
  lightning-grpo install-server --use /opt/sglang/bin/python     remember one that is there
  lightning-grpo install-server --cpu -- --extra-index-url URL   options of pip after --
"""


def run(argv: Sequence[str]) -> int:
    """Install and remember, or only remember."""
    options, pip_arguments = _parse(argv)
    device = "cpu" if options.cpu else "cuda"
    if options.use is not None:
        if not (options.use.is_file() and os.access(options.use, os.X_OK)):
            raise ConfigError(f"`--use` must be an interpreter that has SGLang, got {options.use}.")
        installed = examine_python(options.use.absolute(), device)
        if options.dry_run:
            print(f"would remember SGLang {installed.sglang}: {installed.python}")
            return 0
    else:
        if options.folder is not None and options.folder.is_file():
            raise ConfigError(f"`--folder` must be a folder, new or made so, got {options.folder}.")
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


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    arguments = list(argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(
        prog="lightning-grpo install-server",
        description=_DESCRIPTION,
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
