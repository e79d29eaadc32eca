"""Servers that stand still for new weights."""

from __future__ import annotations

import contextlib
import logging

import anyio

from lightning_grpo.errors import ServerError, WeightSyncError
from lightning_grpo.weights.report import PublishReport
from lightning_grpo.weights.transport import (
    Fleet,
    Target,
    Transport,
    UpdateClient,
    require_success,
)

logger = logging.getLogger(__name__)

FLUSH_WAIT_S = 0.02


async def flush(client: UpdateClient, report: PublishReport, timeout_s: float) -> None:
    """Empties the prefix cache; a server that holds requests refuses.

    It holds some unless they were aborted; then no prefix is kept (retract), or all (in_place).
    """
    async with report.phase("flush", timeout_s):
        # Over HTTP there is nothing to wait on but another answer.
        while not await client.flush_cache():
            # SGLang's health check is a request, too; one that came between the last abort
            # and the pause would wait in the queue for ever.
            await client.abort()
            await anyio.sleep(FLUSH_WAIT_S)


async def release(target: Target, report: PublishReport, timeout_s: float) -> None:
    """Has the server give its GPU memory back; it must be quite idle."""
    await flush(target.client, report, timeout_s)
    async with report.phase("release", timeout_s):
        await target.release_memory()


async def make_room(
    target: Target, client: UpdateClient, report: PublishReport, timeout_s: float, idle: bool
) -> None:
    """Has it take its GPU memory again, and empty the prefix cache where it is idle."""
    if target.released:
        async with report.phase("resume", timeout_s):
            await target.resume_memory()
    if idle and target.caches_prefixes:
        await flush(client, report, timeout_s)


async def transfer(
    transport: Transport, target: Target, label: str, report: PublishReport, timeout_s: float
) -> None:
    """Sends what the transport prepared, between begin and end where the server demands it."""
    client = target.client
    framed = transport.in_session and target.update_session
    try:
        if framed:
            async with report.phase("begin", timeout_s):
                reply = await client.update("/begin_weight_update", {}, timeout_s)
                require_success(reply, target, "to begin an update")
        async with report.phase("update", timeout_s):
            await transport.send(target, label, timeout_s)
    except (ServerError, WeightSyncError):
        # A session left open would refuse the next attempt.
        if framed:
            with contextlib.suppress(ServerError):
                await client.update("/end_weight_update", {}, timeout_s)
        raise
    if framed:
        async with report.phase("end", timeout_s):
            reply = await client.update("/end_weight_update", {}, timeout_s)
            require_success(reply, target, "to end an update")


async def pause_again(target: Target) -> None:
    """A server with unknown weights is left paused, if it still listens."""
    try:
        await target.pause()
    except ServerError as error:
        logger.info("%s could not be paused again: %s", target.url, error)


async def recover(fleet: Fleet, report: PublishReport, timeout_s: float) -> None:
    """No server took the version: one may be restarting, and `restore` will bring it.

    Raises:
        WeightSyncError: None came back in time.
        ServersLostError: None will.
    """
    reasons = "; ".join(report.failures.values()) or "no server was alive"
    try:
        await fleet.wait_until_clean(timeout_s)
    except TimeoutError as error:
        raise WeightSyncError(
            f"No server could be brought to version {report.version} within {timeout_s:g} s:"
            f" {reasons}"
        ) from error
