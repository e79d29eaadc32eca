"""An agent's calls as one growing conversation: each request must continue what was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_grpo.agents.chat_api import ChatRequest, assistant_message, same_message
from lightning_grpo.agents.record import EpisodeRecord
from lightning_grpo.agents.tool_calls import ParsedReply, reply_parser, strip_specials
from lightning_grpo.agents.turns import first_ids, next_ids
from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.rollout.protocols import Tokenizer
from lightning_grpo.types import Completion

Conversations = Literal["one", "last"]
_SHOWN = 160


class HistoryError(RolloutError):
    """A request's history is not what was said: its ids could only be made anew from text."""


@dataclass(frozen=True)
class Reached:
    """A point of a conversation: what was said until then, and its token ids.

    Attributes:
        messages: Until then, the last being the assistant's.
        record: The token ids.
    """

    messages: tuple[dict[str, Any], ...]
    record: EpisodeRecord


class Recorder:
    """Turns requests into ids to continue, and completions into messages.

    Token ids of what was said are kept, and those of what is new are appended. A request is matched
    to the longest recorded history that it begins with, message by message. Sending a request
    once more (a client's retry) starts from where it started before.

    Args:
        tokenizer: Of the policy.
        conversations: `one`: every request must continue what was recorded. `last`: a request that
            begins anew starts another conversation; the one that got the last answer is trained.
    """

    def __init__(self, tokenizer: Tokenizer, conversations: Conversations = "one") -> None:
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._reached: list[Reached] = []
        self._begun: ChatRequest | None = None

    @property
    def num_answers(self) -> int:
        """Calls that were answered."""
        return len(self._reached)

    @property
    def num_discarded(self) -> int:
        """Answers that are no part of the conversation that got the last one."""
        return len(self._reached) - len(self.last.record.completions)

    @property
    def last(self) -> Reached:
        """Where the agent got its last answer."""
        if not self._reached:
            raise RolloutError("the agent ended without a call of the policy.")
        return self._reached[-1]

    def begin(self, request: ChatRequest) -> EpisodeRecord:
        """The ids that the request asks to continue.

        Raises:
            HistoryError: It changes what was said.
        """
        known = self._longest(request.messages)
        if known is not None:
            new = request.messages[len(known.messages) :]
            if not new:
                raise HistoryError("the last message is the policy's own: nothing was said to it.")
            self._refuse_foreign(request, new)
            calls = known.messages[-1].get("tool_calls", ())
            ids = next_ids(self._tokenizer, known.record.last, new, calls)
            return known.record.told(ids)
        if self._begun is not None:
            self._refuse(request.messages)
        self._begun = request
        return EpisodeRecord().told(first_ids(self._tokenizer, request.messages, request.tools))

    def end(
        self, request: ChatRequest, record: EpisodeRecord, completion: Completion
    ) -> dict[str, Any]:
        """The message of a completion; it is recorded."""
        reply = self._parse(request, record, completion)
        message = assistant_message(reply, len(self._reached))
        said = (*request.messages, message)
        self._reached.append(Reached(said, record.sampled(completion)))
        return message

    def _parse(
        self, request: ChatRequest, record: EpisodeRecord, completion: Completion
    ) -> ParsedReply:
        if not request.tools or completion.truncated:
            return ParsedReply(completion.text)
        decode = self._tokenizer.decode
        prefix = decode(list(record.input_ids), skip_special_tokens=False)
        text = decode(list(completion.token_ids), skip_special_tokens=False)
        reply = reply_parser(self._tokenizer, request.tools, prefix)(
            strip_specials(self._tokenizer, text)
        )
        if any(call.error for call in reply.calls):
            return ParsedReply(completion.text)  # an agent has no words for half a call
        return reply

    def _longest(self, messages: Sequence[Mapping[str, Any]]) -> Reached | None:
        fitting = [
            reached
            for reached in self._reached
            if len(reached.messages) <= len(messages)
            and all(map(same_message, reached.messages, messages))
        ]
        # Of equals the latest: the answer that the agent last saw.
        return max(reversed(fitting), key=lambda reached: len(reached.messages), default=None)

    def _refuse_foreign(self, request: ChatRequest, new: Sequence[Mapping[str, Any]]) -> None:
        if any(message["role"] == "assistant" for message in new):
            raise HistoryError(
                "the history holds an answer that the policy did not give. Send its answers as "
                "they came, and none besides."
            )
        if self._begun is not None and request.tools and request.tools != self._begun.tools:
            raise HistoryError("`tools` changed, but the conversation began with others.")

    def _refuse(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what continues nothing, unless it may begin anew (or is sent once more)."""
        begun = self._begun.messages if self._begun else []
        if list(messages) == begun:
            return
        begins = not any(message["role"] == "assistant" for message in messages)
        if begins and self._conversations == "last":
            return
        said = self._reached[-1].messages if self._reached else tuple(begun)
        pairs = enumerate(zip(said, messages, strict=False))
        place = next((i for i, (a, b) in pairs if not same_message(a, b)), len(messages))
        was = said[place] if place < len(said) else None
        got = messages[place] if place < len(messages) else None
        raise HistoryError(
            f"message {place} is not what was said: recorded {_shown(was)}, got {_shown(got)}. Its "
            "token ids would have to be made anew from text, and the policy would be trained on "
            "what it never sampled. Send the history as it was"
            + (", or set `conversations: last` for agents that begin anew." if begins else ".")
        )


def _shown(message: Mapping[str, Any] | None) -> str:
    if message is None:
        return "nothing"
    text = repr({k: message[k] for k in ("role", "content", "tool_calls") if message.get(k)})
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def require_known(conversations: str) -> None:
    """Refuse an unknown choice."""
    if conversations not in ("one", "last"):
        raise ConfigError(f"`conversations` must be 'one' or 'last', got {conversations!r}.")
