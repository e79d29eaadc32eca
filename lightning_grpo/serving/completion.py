"""A completion that grows over interruptions and servers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio

from lightning_grpo.errors import ConfigError, ReplyError, ServerError
from lightning_grpo.serving.client import (
    LEAST_LOGPROB,
    GenerateReply,
    GenerateRequest,
    LogprobEntry,
    MetaInfo,
    Span,
    checked_logprobs,
    sampling_params,
)
from lightning_grpo.serving.server import Member
from lightning_grpo.types import Completion, Interruption, InterruptionChoice, Sampling

Decode = Callable[[Sequence[int]], str]
MAX_IDLE_ABORTS = 50
"""Aborts in a row without one new token, after which a server is at fault."""


class Partial:
    """Collects tokens, logprobs and versions over interruptions.

    Args:
        input_ids: The prompt.
        sampling: The whole budget; what is left of it goes into each next request.
        seed: Goes unchanged into every piece: the server's noise depends on the position.
        end_ids: Tokens that end a completion, beside those of `sampling`.
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        seed: int | None,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._prompt = list(input_ids)
        self._sampling = sampling
        self._seed = seed
        self._end_ids = end_ids.union(sampling.stop_token_ids)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._finish: str | None = None
        self._num_interruptions = 0
        self._num_idle_aborts = 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask for."""
        return self._finish is not None

    @property
    def started(self) -> bool:
        """Whether it holds tokens or was interrupted: then it goes before fresh requests."""
        return bool(self._ids) or self._num_interruptions > 0

    def request(self, rid: str, extra_key: str) -> GenerateRequest:
        """The next piece: prompt and tokens so far, with the budget that is left."""
        params = sampling_params(
            self._sampling,
            max_new_tokens=self._sampling.max_new_tokens - len(self._ids),
            min_new_tokens=max(0, self._sampling.min_new_tokens - len(self._ids)),
            seed=self._seed,
        )
        return GenerateRequest(
            input_ids=self._prompt + self._ids,
            sampling_params=params,
            return_logprob=True,
            rid=rid,
            extra_key=extra_key,
        )

    def add(self, reply: GenerateReply, member: Member, pinned_version: int) -> None:
        """Takes one reply in.

        Raises:
            ReplyError: The reply contradicts itself, or names weights that are not ours.
        """
        finish = reply.meta_info.finish_reason
        reason = finish.type if finish is not None else "abort"
        entries = reply.meta_info.output_token_logprobs or []
        ids, logprobs = self._matched(reply.output_ids, entries, reason, member.url)
        versions = token_versions(reply.meta_info, len(reply.output_ids), member, pinned_version)
        self._ids += ids
        self._logprobs += logprobs
        self._versions += versions[: len(ids)]
        # Of an end token that is the last one permitted SGLang says `length`, and `abort` where the
        # abort came in the same step.
        ended = bool(ids) and ids[-1] in self._end_ids
        if reason != "abort":
            self._finish = "stop" if ended else reason
            return
        self._num_interruptions += 1
        self._num_idle_aborts = 0 if ids else self._num_idle_aborts + 1
        if ended:
            self._finish = "stop"
        elif len(self._ids) >= self._sampling.max_new_tokens:
            self._finish = "length"
        elif self._num_idle_aborts > MAX_IDLE_ABORTS:
            raise ReplyError(
                f"{member.url} aborted a request {self._num_idle_aborts} times without a new token"
            )

    def completion(self, decode: Decode, spell: Decode | None = None) -> Completion:
        """The finished record.

        Args:
            decode: Token ids to the completion's text.
            spell: Token ids to the text in which stop strings are looked for, special tokens
                included as servers do; None: `decode`.
        """
        assert self._finish is not None, "the completion is not finished"
        self._end_at_stop_string(spell or decode)
        return Completion(
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            versions=tuple(self._versions),
            text=decode(self._ids),
            finish_reason=self._finish,
            num_interruptions=self._num_interruptions,
        )

    @staticmethod
    def _matched(
        ids: list[int], entries: list[LogprobEntry], reason: str, url: str
    ) -> tuple[list[int], list[float]]:
        """Ids with their logprobs; an aborted reply is cut where the two stop agreeing."""
        given, entry_ids, _ = zip(*entries, strict=True) if entries else ((), (), ())
        both = min(len(ids), len(entries))
        if reason == "abort" and None in given[:both]:
            both = given.index(None)
        if list(entry_ids[:both]) != ids[:both] or (len(ids) != len(entries) and reason != "abort"):
            raise ReplyError(
                f"{url} sent {len(ids)} token ids with {len(entries)} logprobs that are not theirs"
            )
        return ids[:both], checked_logprobs(given[:both], url, LEAST_LOGPROB)

    def _end_at_stop_string(self, spell: Decode) -> None:
        """Ends where an uninterrupted request would have: a server sees only its own piece.

        A stop string that began before an interruption and ended after it is found here, and so is
        one that the last permitted token completes, of which a server says `length`.
        """
        by_server = self._finish == "stop" and not self._num_interruptions
        if by_server or not self._has_stopped(spell, len(self._ids)):
            return
        low, high = 1, len(self._ids)
        while low < high:
            middle = (low + high) // 2
            if self._has_stopped(spell, middle):
                high = middle
            else:
                low = middle + 1
        if low == len(self._ids) or self._num_interruptions:
            del self._ids[low:], self._logprobs[low:], self._versions[low:]
            self._finish = "stop"

    def _has_stopped(self, spell: Decode, num_tokens: int) -> bool:
        """Whether the first so many tokens spell a stop string."""
        if not self._sampling.stop:
            return False
        text = spell(self._ids[:num_tokens])
        return any(stop in text for stop in self._sampling.stop)


def token_versions(
    meta: MetaInfo, num_tokens: int, member: Member, pinned_version: int
) -> list[int]:
    """The version of the weights that sampled each token.

    From the spans where the server reports them. Elsewhere the version at submission is exact,
    because every update aborts and drains first; that the server still names the same weights at
    the end is checked.
    """
    if meta.weight_versions:
        versions = _versions_of(meta.weight_versions, num_tokens, member)
        if min(versions, default=pinned_version) < pinned_version:
            raise ReplyError(
                f"{member.url} went back from version {pinned_version} to {min(versions)}"
                " (was it restarted by someone else?)"
            )
        return versions
    if num_tokens and meta.weight_version is None:
        raise ReplyError(f"{member.url} does not say which weights sampled {num_tokens} tokens")
    if meta.weight_version is not None and num_tokens:
        at_finish = member.version_of(meta.weight_version)
        if at_finish != pinned_version:
            raise ReplyError(
                f"{member.url} went from version {pinned_version} to {at_finish} during a request"
            )
    return [pinned_version] * num_tokens


def _versions_of(spans: Sequence[Span], num_tokens: int, member: Member) -> list[int]:
    """Of spans that lie end to end over all tokens, in the order of the versions."""
    versions: list[int] = []
    for span in spans:
        version = member.version_of(span.version)
        in_order = span.start == len(versions) <= span.end <= num_tokens
        if not in_order or (versions and version < versions[-1]):
            raise ReplyError(
                f"{member.url} reports version {version} for the tokens {span.start} to {span.end}"
                f" of {num_tokens}, after {len(versions)} of others"
            )
        versions += [version] * (span.end - span.start)
    if len(versions) != num_tokens:
        raise ReplyError(
            f"{member.url} reports versions for {len(versions)} of {num_tokens} tokens"
        )
    return versions


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
