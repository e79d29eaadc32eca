"""Waiting for a server to answer, and saying why it did not."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

from lightning_grpo.errors import ConfigError, ServerStartError
from lightning_grpo.keys import API_KEY_VARIABLE

POLL_S = 0.1
KEYS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
CAUSES: tuple[tuple[str, str], ...] = (
    (r"Address already in use", "the port is in use; end whatever listens there"),
    (
        r"No module named '?([\w.]+)",
        "the Python package {0} is missing in the server's environment",
    ),
    (r"CUDA out of memory|OutOfMemoryError", "the GPU's memory is full: lower `memory_fraction`"),
    (r"MemoryError|Cannot allocate memory", "the machine's memory is full"),
    (
        r"Repository Not Found|not a valid model identifier|No such file or directory: '([^']*)'"
        r"|[Nn]o file named|does not exist|[Nn]ot a (?:local )?folder"
        r"|Repo id must|HFValidationError",
        "the model path is wrong or incomplete",
    ),
    (r"[Pp]ermission denied", "a file may not be read or written"),
)


def likely_cause(log: str, returncode: int | None) -> str:
    """One phrase on why a start failed; empty when the log tells nothing known."""
    if returncode == -signal.SIGKILL or "Killed" in log:
        return "it was killed, most often for want of memory"
    for pattern, cause in CAUSES:
        if match := re.search(pattern, log):
            return cause.format(*match.groups())
    return ""


def start_error(what: str, log: str, returncode: int | None = None) -> ServerStartError:
    """The error of a failed start: what happened, the likely cause, the end of the log."""
    cause = likely_cause(log, returncode)
    message = f"{what}." + (f" Likely cause: {cause}." if cause else "")
    return ServerStartError(message + (f"\nThe end of its log:\n{log}" if log else ""))


HEALTH = "/health"
"""Wants a token of the server: once it comes, the server is warm."""
LISTENS = "/model_info"
"""Wants nothing: answered also by a server that a run which crashed left paused."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said.

    Attributes:
        status: Of HTTP.
        wait_s: How long it asks to be left alone; 0 where it does not.
    """

    status: int
    wait_s: float = 0.0


def answer(
    url: str, timeout_s: float = 5.0, api_key: str | None = None, path: str = HEALTH
) -> Answer | None:
    """What the server answers to a request for `path`; None: nothing in time, or no HTTP."""
    return asyncio.run(_ask(url + path, timeout_s, api_key))


async def _ask(url: str, timeout_s: float, api_key: str | None) -> Answer | None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Of the whole exchange: one that drips would outlast any limit between two bytes.
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            asked = response.headers.get("Retry-After", "")
            return Answer(response.status, float(asked) if asked.isdecimal() else 0.0)
    except (aiohttp.ClientError, OSError, ValueError):  # a time-out is an OSError
        return None


def answers(
    url: str, timeout_s: float = 5.0, api_key: str | None = None, path: str = HEALTH
) -> bool:
    """Whether the server answers a request for `path` well."""
    said = answer(url, timeout_s, api_key, path)
    return said is not None and said.status == HTTPStatus.OK


def wait_until_healthy(
    url: str,
    timeout_s: float,
    api_key: str | None = None,
    check: Callable[[], None] = lambda: None,
    path: str = HEALTH,
) -> None:
    """Waits until the server answers.

    Args:
        url: `http://host:port`.
        timeout_s: How long.
        api_key: Sent as a bearer token.
        check: Raises when waiting is pointless (the process has ended).
        path: What is asked for.

    Raises:
        ServerStartError: It does not answer in time.
        ConfigError: It wants another API key.
    """
    deadline = time.monotonic() + timeout_s
    said: Answer | None = None
    while True:
        left_s = deadline - time.monotonic()
        said = answer(url, min(5.0, max(left_s, POLL_S)), api_key, path) or said
        if said is not None and said.status == HTTPStatus.OK:
            return
        check()
        if said is not None and said.status in KEYS:
            wants = "another API key than the one given" if api_key else "an API key"
            raise ConfigError(
                f"{url} wants {wants} (it answered {said.status}). "
                f"Set {API_KEY_VARIABLE} to it, or `api_key` to `env:NAME` or `file:PATH`."
            )
        if left_s <= 0:
            last = "" if said is None else f" It answered {said.status}."
            raise ServerStartError(
                f"Nothing healthy answers at {url} after {timeout_s:g} s.{last}"
                " Start a server there, or correct `urls`."
            )
        time.sleep(max(POLL_S, min(left_s, 0.0 if said is None else said.wait_s)))
