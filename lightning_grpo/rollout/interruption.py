"""Stopping a server between two tokens, so that its weights can change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import anyio

from lightning_grpo.errors import ConfigError, ServerError
from lightning_grpo.rollout.member import Member

logger = logging.getLogger(__name__)

Interruption = Literal["abort", "retract", "in_place"]
"""What becomes of requests in flight: taken back by the client, to be sent again; put back in the
server's queue, to be read again under the new weights; or kept, with keys and values of the old."""

ABORT_INTERVAL_S = 0.05
"""A request that was on its way when the abort was sent is caught by the next one."""


def check_interruption(mode: Interruption, members: Sequence[Member]) -> None:
    """Refuses a mode that would give tokens a wrong version or wrong keys and values.

    Raises:
        ConfigError: A server does not name the weights of each token, or keeps old prefixes.
    """
    if mode == "abort":
        return
    for member in members:
        if not member.facts.dialect.reports_spans:
            raise ConfigError(
                f"`interruption` must be abort for {member.url}: SGLang"
                f" {member.facts.info.version} does not say which weights sampled which token."
                " Use at least 0.5.19, or abort."
            )
        if mode == "retract" and member.facts.info.disable_radix_cache is False:
            raise ConfigError(
                f"`interruption` can't be retract for {member.url}: its prefix cache would give"
                " retracted requests the old weights' keys and values. Start it with"
                " `flags: {disable-radix-cache: true}`, or use abort."
            )
    if mode == "in_place":
        logger.warning(
            "interruption in_place: logprobs behind an update come from new weights over the old"
            " ones' keys and values; they are those of no version"
        )


async def stop_generation(
    member: Member,
    timeout_s: float,
    suspect: Callable[[Member, Exception], None],
    mode: Interruption = "abort",
) -> None:
    """Pauses the server; to abort, aborts before until every reply is collected.

    The replies carry the partial tokens. SGLang's own pause by abort is not used: it polls every
    second for requests to be gone, also for one whose reply was just read. A server that does not
    play along is dirty.

    Args:
        member: The server; nothing new is sent to it meanwhile.
        timeout_s: How long it may take.
        suspect: Told of a server that failed.
        mode: What becomes of its requests.
    """
    try:
        with anyio.fail_after(timeout_s):
            if mode == "abort" and member.in_flight:
                await _drain(member)
            await member.pause("in_place" if mode == "in_place" else "retract")
    except (ServerError, TimeoutError) as error:
        reason = str(error) or f"it kept requests for {timeout_s:g} s after their abort"
        member.mark_dirty(reason)
        suspect(member, ServerError(reason))


async def _drain(member: Member) -> None:
    while member.in_flight:
        await member.client.abort()
        with anyio.move_on_after(ABORT_INTERVAL_S):
            await member.drained.wait()
