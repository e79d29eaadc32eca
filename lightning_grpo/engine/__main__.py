"""`python -m lightning_grpo.engine --model DIR`: serve a model on this CPU behind SGLang's API.

Prints `READY http://HOST:PORT` on standard output once it answers, and nothing else there.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

from lightning_grpo._compat import freeze_heap
from lightning_grpo.engine.http import EngineServer
from lightning_grpo.engine.model import (
    ModelRunner,
    check_servable,
    end_token_ids,
    load_model,
    load_tokenizer,
    require_goes_on,
)
from lightning_grpo.engine.openai import OpenAIRoutes
from lightning_grpo.engine.requests import Intake, UnservableError
from lightning_grpo.engine.scheduler import EngineThread, Limits, Scheduler
from lightning_grpo.engine.updates import ModelWeights, WeightUpdates
from lightning_grpo.errors import MOST, MOST_PORT, ConfigError, require_on_hub
from lightning_grpo.keys import API_KEY_VARIABLE, is_reference, read_key

_AT_LEAST_ONE = (("max-running-requests", 1, MOST), ("kv-memory-mb", 1, MOST))
_MISUSED = 2
_GIL_INTERVAL_S = 0.0005


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse the command line, in one message."""
        raise ConfigError(f"{message}. `lightning-grpo serve --help` says what there is.")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(
        prog="python -m lightning_grpo.engine",
        usage="lightning-grpo serve MODEL [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder (or hub id)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--api-key",
        metavar="WHERE",
        help="ask for `Authorization: Bearer KEY`; where the key is: `env:NAME` or `file:PATH` "
        f"(mode 600); without it {API_KEY_VARIABLE}, if that is set",
    )
    parser.add_argument(
        "--max-running-requests", type=int, default=64, help="requests decoded together"
    )
    parser.add_argument(
        "--kv-memory-mb", type=int, default=2048, help="most memory for keys and values"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="answer equal seeds and prompts with equal bits, whoever else runs; slower",
    )
    parser.add_argument("--weight-version", default="default", help="name of the first weights")
    parser.add_argument("--log-level", default="warning", help="debug, info, warning or error")
    parser.add_argument(
        "--exit-with-stdin", action="store_true", help="end when standard input is closed"
    )
    options = parser.parse_args(arguments)
    for name, least, most in (("port", 0, MOST_PORT), *_AT_LEAST_ONE):
        value = vars(options)[name.replace("-", "_")]
        if not least <= value <= most:
            parser.error(f"--{name} must be from {least} to {most}, got {value}")
    if options.log_level.upper() not in logging.getLevelNamesMapping():
        parser.error(f"--log-level must be a logging level, got {options.log_level!r}")
    if options.api_key is not None and not is_reference(options.api_key):
        parser.error(
            "--api-key must say where the key is, `env:NAME` or `file:PATH`: every user of this "
            "machine can read a command line"
        )
    try:
        options.api_key = read_key(options.api_key, "--api-key")
    except ConfigError as error:
        parser.error(str(error).removesuffix("."))
    return options


def warn_of_strangers(options: argparse.Namespace) -> None:
    """Say in a line that everybody on the network may do what a trainer does."""
    if options.api_key is None and not is_loopback(options.host):
        logging.getLogger(__name__).warning(
            "listening on %s without a key: whoever reaches it can generate, pause it and change "
            "its weights. Set %s, or --api-key file:PATH",
            *(options.host, API_KEY_VARIABLE),
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, out of the network's reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal, or the end of standard input, says stop."""
    try:
        options = parse_arguments(arguments)
        logging.basicConfig(level=options.log_level.upper(), stream=sys.stderr)
        warn_of_strangers(options)
        transformers_logging.disable_progress_bar()
        # Kernels this small lose more to a second thread than they gain; the trainer needs it.
        torch.set_num_threads(1)
        sys.setswitchinterval(_GIL_INTERVAL_S)
        asyncio.run(serve(options))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_MISUSED)
    # A thread may still wait in a collective that nobody will complete.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def serve(options: argparse.Namespace) -> None:
    """Load, listen, say so, and wait for the end."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    # While it loads, the loop stands still: signals end the process as they end any other.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    engine, server = build(options, loop)
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    if options.exit_with_stdin:
        _watch_stdin(loop, stop)
    engine.start()
    try:
        runner, listener = await server.listen(options.host, options.port)
    except OSError as error:
        # An address that is taken, or not this machine's, is the system's to say.
        raise ConfigError(
            f"`--host` and `--port` must be a free address of this machine, got "
            f"{options.host}:{options.port}: {error.strerror or error}. Name another port, or 0."
        ) from error
    # What was loaded stays: to look through it for garbage stops both threads each time.
    freeze_heap()
    host = f"[{options.host}]" if ":" in options.host else options.host  # of IPv6
    print(f"READY http://{host}:{listener.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    # Whoever still waits gets what there is.
    await engine.call(lambda s: s.abort(None))
    listener.close()
    await runner.cleanup()
    engine.stop()


def build(
    options: argparse.Namespace, loop: asyncio.AbstractEventLoop
) -> tuple[EngineThread, EngineServer]:
    """Load the model and wire the parts."""
    if not (options.model and Path(options.model).is_dir()):
        require_on_hub("--model", options.model, "model")
    check_servable(options.model)
    try:
        model = load_model(options.model)
        tokenizer = load_tokenizer(options.model)
    except (ImportError, OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError(
            "`--model` must be a causal language model that transformers loads, got "
            f"{options.model!r}: {' '.join(str(error).split())[:400]}"
        ) from error
    runner = ModelRunner(model, row_by_row=options.deterministic)
    try:
        require_goes_on(runner)
    except UnservableError as error:
        raise ConfigError(
            f"`--model` must be one that the embedded engine runs, it can't run {options.model!r}: "
            f"{error}. Way out: SGLangServers on a GPU, or another version of transformers."
        ) from error
    limits = _limits(options, runner)
    engine = EngineThread(Scheduler(runner, tokenizer, limits, options.weight_version), loop)
    end_ids = end_token_ids(model, tokenizer)
    intake = Intake(
        runner.vocab_size,
        runner.context_length,
        end_ids,
        tokenizer,
        options.deterministic,
        runner.has_routers,
    )
    updates = WeightUpdates(engine, ModelWeights(model), options.model)
    server = EngineServer(engine, updates, intake, limits, model, options.api_key)
    OpenAIRoutes(engine, intake, lambda: updates.model_path).add_to(server.app)
    return engine, server


def _limits(options: argparse.Namespace, runner: ModelRunner) -> Limits:
    # One prompt through: shows what can't be served before anyone is told that this is ready.
    state = runner.prefill([[0, 0]])[0]
    token_bytes = state.kv[..., 0, :].numel() * state.kv.element_size()
    wanted = options.max_running_requests * runner.context_length
    most = min((options.kv_memory_mb << 20) // max(1, token_bytes), wanted)
    return Limits(
        max_running=options.max_running_requests,
        max_total_tokens=max(runner.context_length, most),
        deterministic=options.deterministic,
    )


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    def wait() -> None:
        while sys.stdin.buffer.read(1 << 16):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


if __name__ == "__main__":
    main()
