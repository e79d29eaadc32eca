"""Stopping a server between two tokens, so that its weights can change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio

from lightning_grpo.errors import ConfigError, ServerError
from lightning_grpo.rollout.member import Member
from lightning_grpo.types import Interruption, InterruptionChoice

logger = logging.getLogger(__name__)

ABORT_INTERVAL_S = 0.05
"""A request that was on its way when the abort was sent is caught by the next one."""


def choose_interruption(wanted: InterruptionChoice, members: Sequence[Member]) -> Interruption:
    """The mode to use with these servers; `auto` is retract where all do it exactly, else abort.

    Retract spares each request in flight two more messages per update.

    Raises:
        ConfigError: The mode would give tokens a wrong version or wrong keys and values: a server
            does not name the weights of each token, or keeps old prefixes.
    """
    if wanted == "auto":
        return "retract" if all(_retracts_exactly(m) for m in members) else "abort"
    _check(wanted, members)
    return wanted


def _retracts_exactly(member: Member) -> bool:
    facts = member.facts
    return facts.dialect.reports_spans and facts.info.disable_radix_cache is not False


def _check(mode: Interruption, members: Sequence[Member]) -> None:
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


def check_memory_release(members: Sequence[Member]) -> None:
    """Refuses servers that can't give their GPU memory back.

    Raises:
        ConfigError: A server was not started for it.
    """
    for member in members:
        if not member.facts.info.enable_memory_saver:
            raise ConfigError(
                f"`release_memory` needs servers that can give their memory back, {member.url} was"
                " not started for it. Start it with `flags: {enable-memory-saver: true}`, or leave"
                " `release_memory` out."
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
