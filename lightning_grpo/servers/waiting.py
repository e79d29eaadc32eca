"""Waiting for a server to answer, and saying why it did not."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPException

from lightning_grpo.errors import ServerStartError

POLL_S = 0.1
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


def answers(
    url: str, timeout_s: float = 5.0, api_key: str | None = None, path: str = HEALTH
) -> bool:
    """Whether the server answers a request for `path` well."""
    request = urllib.request.Request(url + path)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return bool(response.status == HTTPStatus.OK)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except (OSError, ValueError, HTTPException):  # the last: what answers is no HTTP server
        return False


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
    """
    deadline = time.monotonic() + timeout_s
    while not answers(url, api_key=api_key, path=path):
        check()
        if time.monotonic() > deadline:
            raise ServerStartError(
                f"Nothing healthy answers at {url} after {timeout_s:g} s."
                " Start a server there, or correct `urls`."
            )
        time.sleep(POLL_S)
