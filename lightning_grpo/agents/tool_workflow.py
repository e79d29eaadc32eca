"""The policy calls tools until it answers without one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_grpo.agents.record import EpisodeRecord
from lightning_grpo.agents.rewarded import RewardedWorkflow
from lightning_grpo.agents.tool_calls import ParsedReply, ParseReply, ToolCall, reply_parser
from lightning_grpo.agents.tool_calls import strip_specials as _strip
from lightning_grpo.agents.tool_process import ToolCounts, ToolLimits
from lightning_grpo.agents.tools import ToolBox
from lightning_grpo.agents.turns import first_ids, messages_of, next_ids, with_answer
from lightning_grpo.checks import require_count
from lightning_grpo.rollout.binding import Rewards
from lightning_grpo.rollout.protocols import EpisodeContext, Tokenizer
from lightning_grpo.types import Prompt, Sampling, Trajectory

logger = logging.getLogger(__name__)

_DEFAULT_SAMPLING = Sampling()
_DEFAULT_LIMITS = ToolLimits()


@dataclass
class _Conversation:
    """One episode on its way."""

    record: EpisodeRecord
    messages: list[dict[str, Any]]
    num_calls: int = 0
    num_failed: int = 0
    reply: ParsedReply = field(default_factory=lambda: ParsedReply(""))


class ToolWorkflow(RewardedWorkflow):
    """The policy may call tools; their results are appended as token ids that it did not sample.

    Beside the rewards, `tool_calls` and `tool_failures` (calls that gave no result: unreadable,
    refused, raised, ended by a limit) are logged of each episode, with weight 0.

    Args:
        tools: Plain functions or coroutine functions, described by type hints and docstrings. They
            run in processes of their own, each call in a fork: what one changes is gone with it.
        reward: A function, or several (a list, or by name), called on the last answer. `messages`
            is the conversation before it.
        sampling: How each answer is sampled; `max_new_tokens` is for one turn.
        reward_weights: A weight for each function, or by name; None: all 1.
        max_turns: Most answers; calls of the last one are not run.
        max_calls: Most calls that are run; the others are told so.
        max_tokens: No further turn is begun that could end behind this many tokens in all.
        limits: Of each call.
        parse: Reads the calls out of a completion's text; None: as the tokenizer states it.
    """

    def __init__(  # noqa: PLR0913 - config surface: what a YAML file may set
        self,
        tools: list[Callable[..., Any]],
        reward: Rewards,
        sampling: Sampling = _DEFAULT_SAMPLING,
        reward_weights: list[float] | dict[str, float] | None = None,
        max_turns: int = 4,
        max_calls: int = 8,
        max_tokens: int | None = None,
        limits: ToolLimits = _DEFAULT_LIMITS,
        parse: Callable[[str], ParsedReply] | None = None,
    ) -> None:
        super().__init__(reward, sampling, reward_weights)
        require_count("max_turns", max_turns)
        require_count("max_calls", max_calls)
        if max_tokens is not None:
            require_count("max_tokens", max_tokens)
        self.tools = ToolBox(tools, limits)
        self.max_turns = max_turns
        self.max_calls = max_calls
        self.max_tokens = max_tokens
        self._parse = parse
        self._told_missing = False

    @property
    def runs_programs(self) -> bool:
        """Always: tools."""
        return True

    @property
    def counts(self) -> ToolCounts:
        """Calls since the start, by how they ended."""
        return self.tools.counts

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory:
        """Run one conversation."""
        messages = messages_of(prompt)
        ids = first_ids(context.tokenizer, messages, self.tools.schemas)
        conversation = _Conversation(EpisodeRecord().told(ids), messages)
        parse = self._parse or self._parser(context.tokenizer, ids)
        async with self.tools.in_use():
            for turn in range(self.max_turns):
                await self._answer(conversation, context, parse)
                if turn + 1 == self.max_turns or not conversation.reply.calls:
                    break
                if not await self._call_tools(conversation, context.tokenizer):
                    break
        record = conversation.record
        total, rewards = await self.score(prompt, context, record, conversation.messages)
        rewards |= {
            "tool_calls": float(conversation.num_calls),
            "tool_failures": float(conversation.num_failed),
        }
        return record.trajectory(total, rewards, self.sampling.temperature)

    async def _answer(
        self, conversation: _Conversation, context: EpisodeContext, parse: ParseReply
    ) -> None:
        record = conversation.record
        completion = await context.generate(list(record.input_ids), self.sampling)
        conversation.record = record.sampled(completion)
        if completion.truncated:
            conversation.reply = ParsedReply(completion.text)
            return
        text = context.tokenizer.decode(list(completion.token_ids), skip_special_tokens=False)
        conversation.reply = parse(_strip(context.tokenizer, text))

    async def _call_tools(self, conversation: _Conversation, tokenizer: Tokenizer) -> bool:
        """Run the answer's calls; False: there is no room for another answer."""
        calls, results = [], []
        for number, call in enumerate(conversation.reply.calls):
            made = _message_of_call(call, f"call_{conversation.num_calls}")
            text = await self._result(conversation, call)
            calls.append(made)
            results.append(
                {"role": "tool", "tool_call_id": made["id"], "name": call.name, "content": text}
            )
            if number + 1 >= self.max_calls:
                break
        self._tell_missing()
        record = conversation.record
        longer = record.told(next_ids(tokenizer, record.last, results, calls))
        room = self.max_tokens is None or (
            len(longer.input_ids) + self.sampling.max_new_tokens <= self.max_tokens
        )
        if room:
            conversation.record = longer
            said = with_answer(conversation.messages, conversation.reply.content, tool_calls=calls)
            conversation.messages = [*said, *results]
        return room

    async def _result(self, conversation: _Conversation, call: ToolCall) -> str:
        if conversation.num_calls >= self.max_calls:
            conversation.num_failed += 1
            return f"error: no more than {self.max_calls} calls may be made"
        conversation.num_calls += 1
        result = await self.tools.call(call)
        if result.kind == "value":
            return result.text
        conversation.num_failed += 1
        return f"error: {result.text}"

    def _parser(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> ParseReply:
        prefix = tokenizer.decode(prompt_ids, skip_special_tokens=False)
        return reply_parser(tokenizer, self.tools.schemas, prefix)

    def _tell_missing(self) -> None:
        if self.tools.missing_protections and not self._told_missing:
            self._told_missing = True
            logger.warning(
                "this machine can't keep tools from using: %s",
                ", ".join(self.tools.missing_protections),
            )


def _message_of_call(call: ToolCall, call_id: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": dict(call.arguments)},
    }
