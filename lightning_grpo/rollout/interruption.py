"""Taking every request back from a server, so that its weights can change."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from lightning_grpo.errors import ServerError
from lightning_grpo.rollout.member import Member

ABORT_INTERVAL_S = 0.05
"""A request that was on its way when the abort was sent is caught by the next one."""
SETTLE_S = 0.01
"""SGLang ends a request just after its last byte was read; a pause before that polls for 1 s."""


async def take_back(
    member: Member, timeout_s: float, suspect: Callable[[Member, Exception], None]
) -> None:
    """Aborts until every reply is collected, then pauses the server.

    In this order, because a pause with requests in flight polls for a second in SGLang, and because
    the replies carry the partial tokens. A server that does not play along is dirty.

    Args:
        member: The server; nothing new is sent to it meanwhile.
        timeout_s: How long it may take.
        suspect: Told of a server that failed.
    """
    try:
        with anyio.fail_after(timeout_s):
            if member.in_flight:
                await _drain(member)
            await member.pause()
    except (ServerError, TimeoutError) as error:
        reason = str(error) or f"it kept requests for {timeout_s:g} s after their abort"
        member.mark_dirty(reason)
        suspect(member, ServerError(reason))


async def _drain(member: Member) -> None:
    while member.in_flight:
        await member.client.abort()
        with anyio.move_on_after(ABORT_INTERVAL_S):
            await member.drained.wait()
    await anyio.sleep(SETTLE_S)
