"""The workflows of several turns: feedback, tools, and agents with a client of their own."""

from __future__ import annotations

import inspect
import logging
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import anyio.to_thread

from lightning_grpo.agents.conversation import (
    AgentSession,
    Conversations,
    Endpoint,
    Reached,
    require_known,
)
from lightning_grpo.agents.tools import (
    ParsedReply,
    ParseReply,
    ToolBox,
    ToolCall,
    ToolCounts,
    ToolLimits,
    reply_parser,
    strip_specials,
)
from lightning_grpo.agents.turns import (
    EpisodeRecord,
    RewardedWorkflow,
    call_id,
    first_ids,
    messages_of,
    next_ids,
    with_answer,
)
from lightning_grpo.errors import (
    MOST,
    ConfigError,
    RewardError,
    RolloutError,
    require_count,
    require_number,
    require_seconds,
)
from lightning_grpo.rollout.chat import Message, Tokenizer
from lightning_grpo.rollout.scoring import RESERVED, BoundReward, Rewards, answer_of, reward_name
from lightning_grpo.rollout.workflow import EpisodeContext, sampling_of
from lightning_grpo.types import AnySampling, Prompt, Sampling, Trajectory

_TRY_AGAIN = "Your answer is not right. Please think again and give another answer."


class MultiTurnWorkflow(RewardedWorkflow):
    """Answers until the reward is reached, told after each miss what to mend.

    The episode's reward is the last answer's, times `turn_discount` for each turn before it. It
    ends early when an answer was cut off by the length limit, or `feedback` has nothing to say.

    Args:
        reward: A function, or several (a list, or by name), called on every answer. `messages` is
            the conversation before the answer.
        feedback: Makes what is said after a miss: a function (sync or async) that names its
            arguments as a reward does and returns a text, or None to end. It runs on the event
            loop, so it must be quick. None: `retry_text` is said.
        retry_text: What is said where there is no `feedback`.
        sampling: How each answer is sampled; `max_new_tokens` is for one turn.
        reward_weights: A weight for each function, or by name; None: all 1.
        max_turns: Most answers.
        turn_discount: What a turn costs, as a factor.
        passing_reward: From this (undiscounted, weighted) reward on there is no further turn.
        max_tokens: No further turn is begun that could end behind this many tokens in all.
    """

    def __init__(  # noqa: PLR0913 - config surface: what a YAML file may set
        self,
        reward: Rewards,
        feedback: Callable[..., Any] | None = None,
        retry_text: str = _TRY_AGAIN,
        sampling: AnySampling = Sampling(),
        reward_weights: list[float] | dict[str, float] | None = None,
        max_turns: int = 2,
        turn_discount: float = 1.0,
        passing_reward: float = 1.0,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(reward, sampling, reward_weights)
        require_count("max_turns", max_turns)
        require_number("passing_reward", passing_reward, least=-MOST)
        if max_tokens is not None:
            require_count("max_tokens", max_tokens)
        if not 0 < turn_discount <= 1:
            raise ConfigError(
                "turn_discount",
                "must be > 0 and <= 1 (a factor for each turn)",
                turn_discount,
                "1 makes turns free.",
            )
        self.retry_text = retry_text
        self.max_turns = max_turns
        self.turn_discount = turn_discount
        self.passing_reward = passing_reward
        self.max_tokens = max_tokens
        # No union with text: a mistyped import path would become what is said.
        self._asked = None if feedback is None else BoundReward(feedback)

    def validate(self, columns: Collection[str]) -> None:
        """Refuse rewards and feedback that ask for what the prompts don't have."""
        super().validate(columns)
        if self._asked is not None:
            self._asked.validate(columns)

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory:
        """Run one conversation."""
        messages = messages_of(prompt)
        record = EpisodeRecord().told(prompt.input_ids)
        for turn in range(self.max_turns):
            completion = await context.generate(list(record.input_ids), self.sampling)
            record = record.sampled(completion)
            total, rewards = await self.score(prompt, context, record, messages)
            last = turn + 1 == self.max_turns or completion.truncated
            if last or total >= self.passing_reward:
                break
            said = await self._feedback(prompt, record, messages)
            if said is None:
                break
            told: Message = {"role": "user", "content": said}
            longer = record.told(next_ids(context.tokenizer, completion, [told]))
            if not self._has_room(longer):
                break
            record = longer
            messages = [*with_answer(messages, completion.text), dict(told)]
        discounted = total * self.turn_discount ** (len(record.completions) - 1)
        return record.trajectory(discounted, rewards, self.sampling.temperature)

    def _has_room(self, record: EpisodeRecord) -> bool:
        if self.max_tokens is None:
            return True
        return len(record.input_ids) + self.sampling.max_new_tokens <= self.max_tokens

    async def _feedback(
        self, prompt: Prompt, record: EpisodeRecord, messages: list[dict[str, Any]]
    ) -> str | None:
        if self._asked is None:
            return self.retry_text
        told = replace(prompt, messages=tuple(messages))
        arguments = self._asked.arguments(told, record.last.text, record.last.token_ids)
        said = self._asked.reward(**arguments)
        if inspect.isawaitable(said):
            said = await said
        if said is not None and not isinstance(said, str):
            raise ConfigError("feedback", "must return a text or None", said)
        return said


logger = logging.getLogger(__name__)


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
        sampling: AnySampling = Sampling(),
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
        conversation.reply = parse(strip_specials(context.tokenizer, text))

    async def _call_tools(self, conversation: _Conversation, tokenizer: Tokenizer) -> bool:
        """Run the answer's calls; False: there is no room for another answer."""
        calls, results = [], []
        for number, call in enumerate(conversation.reply.calls):
            made = _message_of_call(call, call_id(conversation.num_calls))
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


def _message_of_call(call: ToolCall, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "function",
        "function": {"name": call.name, "arguments": dict(call.arguments)},
    }


_GIVEN = ("base_url", "api_key", "messages", "prompt")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class AgentWorkflow(RewardedWorkflow):
    """Runs an agent against an endpoint that records its calls of the policy.

    The agent is a function, mostly `async def agent(messages, base_url, api_key)`. It is given the
    arguments that it names: `base_url` and `api_key` for its client, `messages` (the prompt's),
    `prompt` (its rendered text), and columns. It runs in this process: `async` on the event loop of
    the rollouts, which it must not block, else on a thread of its own.

    Token ids are recorded as they were sampled, and each call must continue the conversation of the
    one before: a history that was changed is refused with the place, and fails the episode.
    Temperature, top_p and the like are the workflow's, whatever the agent asks for. Beside the
    rewards, `agent_calls` and `discarded_calls` (answers that are no part of the trajectory: asked
    for twice, or of another conversation) are logged of each episode, with weight 0.

    Args:
        agent: The function.
        reward: A function, or several (a list, or by name), called with the agent's result as
            `completion` where it is a text, else with the last answer. None: the agent returns the
            reward itself, a number or numbers by name.
        sampling: How every call is sampled; a call may ask for fewer tokens.
        reward_weights: A weight for each function, or by name; None: all 1.
        timeout_s: Longest time of one episode.
        conversations: `one`: all calls are one conversation. `last`: the agent may begin anew; the
            conversation that got the last answer is trained.
    """

    def __init__(
        self,
        agent: Callable[..., Any],
        reward: Rewards | None = None,
        sampling: AnySampling = Sampling(),
        reward_weights: list[float] | dict[str, float] | None = None,
        timeout_s: float = 600.0,
        conversations: Conversations = "one",
    ) -> None:
        sampling = sampling_of(sampling)
        if reward is None:
            self.rewards, self.weights, self.sampling = [], [], sampling
        else:
            super().__init__(reward, sampling, reward_weights)
        require_known(conversations)
        require_seconds("timeout_s", timeout_s)
        self.agent = agent
        self.timeout_s = timeout_s
        self._endpoint = Endpoint(sampling, conversations)
        parameters = inspect.signature(agent).parameters.values()
        self._names = [p.name for p in parameters if p.kind in _NAMED]
        self._required = [
            p.name for p in parameters if p.kind in _NAMED and p.default is inspect.Parameter.empty
        ]
        if "base_url" not in self._names:
            raise ConfigError(
                f"`agent` must take `base_url`, the address of the policy, got "
                f"{reward_name(agent)}{inspect.signature(agent)}."
            )

    def validate(self, columns: Collection[str]) -> None:
        """Refuse an agent or rewards that ask for what the prompts don't have."""
        super().validate(columns)
        missing = [name for name in self._required if name not in {*columns, *_GIVEN}]
        if missing:
            raise ConfigError(
                f"the agent asks for {missing[0]!r}, which is no column. "
                f"Columns: {sorted(columns)}; always there: {sorted(_GIVEN)}."
            )

    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory:
        """Run the agent once."""
        async with self._endpoint.session(context) as session:
            result = await self._run_agent(prompt, session)
            recorder = session.recorder
            reached = recorder.last
        total, rewards = await self._reward(prompt, context, result, reached)
        rewards |= {
            "agent_calls": float(recorder.num_answers),
            "discarded_calls": float(recorder.num_discarded),
        }
        return reached.record.trajectory(total, rewards, self.sampling.temperature)

    async def _run_agent(self, prompt: Prompt, session: AgentSession) -> Any:
        offered: Mapping[str, Any] = {
            **{name: value for name, value in prompt.columns.items() if name not in RESERVED},
            "messages": [dict(message) for message in prompt.messages],
            "prompt": prompt.text,
            "base_url": session.base_url,
            "api_key": session.api_key,
        }
        arguments = {name: offered[name] for name in self._names if name in offered}
        with anyio.move_on_after(self.timeout_s) as scope:
            try:
                result = await self._call(arguments)
            except Exception:
                # What went wrong here says more than what the client made of it.
                if session.failure is not None:
                    raise session.failure from None
                raise
        if scope.cancelled_caught:
            raise RolloutError(f"the agent took longer than `timeout_s` ({self.timeout_s:g} s).")
        if session.failure is not None:
            raise session.failure
        return result

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.agent):
            return await self.agent(**arguments)
        result = await anyio.to_thread.run_sync(
            lambda: self.agent(**arguments), abandon_on_cancel=True
        )
        return await result if inspect.isawaitable(result) else result

    async def _reward(
        self, prompt: Prompt, context: EpisodeContext, result: Any, reached: Reached
    ) -> tuple[float, dict[str, float]]:
        last = reached.record.last
        if self.rewards:
            told = replace(prompt, messages=reached.messages[:-1])
            text = result if isinstance(result, str) else last.text
            return await self.score_text(told, context, text, last.token_ids)
        kind, value = answer_of(result)
        if kind == "error" and isinstance(result, numbers.Real | Mapping):
            raise RewardError(f"the agent's reward failed: {value}")
        if kind != "value":
            raise ConfigError(
                f"the agent must return its reward (a number, or numbers by name), or `reward` "
                f"must be given: {value}"
            )
        named = value if isinstance(value, dict) else {"reward": value}
        return sum(named.values()), named
