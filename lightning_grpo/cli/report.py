"""`lightning-grpo report`: runs as a page, as text, as a trace or as pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.cli.sources import Parser, whole_number
from lightning_grpo.errors import MOST_PORT, printable
from lightning_grpo.report.answers import MOST_TRAJECTORIES, choose_answers, steps_wanted
from lightning_grpo.report.page import PageServer, markdown, page_data, render_page, write_pictures
from lightning_grpo.report.run import chrome_trace, find_folder, read_runs, stamp

_OUT = "report.html"
_PORT = 8765
_REFRESH_S = 5.0


def report(argv: Sequence[str]) -> int:
    """Read the runs and write what was asked for."""
    options = _parser().parse_args(list(argv))
    wanted = steps_wanted(options.steps) if options.steps else lambda step: True
    for path in options.runs:
        find_folder(path)

    def read() -> dict[str, Any]:
        runs = read_runs(options.runs)
        return page_data(runs, choose_answers(runs, options.limit, wanted))

    if options.serve is not None:
        _serve(PageServer(read, lambda: stamp(options.runs), options.serve, _REFRESH_S))
        return 0
    runs = read_runs(options.runs)
    if options.trace:
        _write(options.trace, json.dumps(chrome_trace(runs)))
    if options.pictures:
        files = write_pictures(runs, options.pictures)
        print(f"wrote {len(files)} pictures to {options.pictures}")
    aside = options.trace or options.pictures
    if options.format == "md":
        _write_text(markdown(runs), options.out)
    elif options.out or not aside:
        _write(options.out or Path(_OUT), render_page(read()))
    return 0


def _write_text(text: str, out: Path | None) -> None:
    if out:
        _write(out, text)
    else:
        sys.stdout.write(printable(text))


def _write(path: Path, text: str) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"wrote {path} ({len(text) / 1e6:.1f} MB)")


def _serve(server: PageServer) -> None:
    """Serve until interrupted."""
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-grpo report",
        description="Look at runs: one page that needs no network, or text, a trace, pictures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; several are compared"
    )
    parser.add_argument("--out", type=Path, help=f"the file to write (default: {_OUT})")
    parser.add_argument(
        "--format",
        choices=("html", "md"),
        default="html",
        help="a page, or Markdown for a terminal",
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1),
        default=MOST_TRAJECTORIES,
        help=f"trajectories on the page, in whole groups (default: {MOST_TRAJECTORIES})",
    )
    parser.add_argument("--steps", help="answers of these steps only: 12, 10-14 or 0,20,40")
    parser.add_argument(
        "--trace", type=Path, help="also write the timeline for Perfetto or chrome://tracing"
    )
    parser.add_argument("--pictures", type=Path, help="also write the charts as SVG to a folder")
    parser.add_argument(
        "--serve",
        type=_port,
        nargs="?",
        const=_PORT,
        metavar="PORT",
        help=f"serve the page on this machine and keep it fresh (default port: {_PORT})",
    )
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= MOST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to {MOST_PORT}, got {text}")
    return port
