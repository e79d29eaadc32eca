"""Turns of a conversation as token ids, and the record of an episode.

Token ids of what comes between two completions, in the chat template's own words.

The template is rendered for a made-up conversation that ends in the new messages; what follows the
made-up answer is exactly what the template puts between an answer and the next one. Templates that
rewrite history (that drop earlier reasoning, for one) change nothing that was sampled this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.rollout.chat import (
    Message,
    Tokenizer,
    fitting,
    rendering,
    spellable,
    without_blank_answer,
)
from lightning_grpo.rollout.workflow import EpisodeContext, RLVRWorkflow
from lightning_grpo.types import NO_VERSION, Completion, Prompt, Trajectory


@dataclass(frozen=True)
class EpisodeRecord:
    """What was asked, sampled and told so far; `told` and `sampled` give longer ones.

    Attributes:
        input_ids: Every token in order, `[tokens]`.
        completions: Each completion and where it begins.
    """

    input_ids: tuple[int, ...] = ()
    completions: tuple[tuple[int, Completion], ...] = ()

    @property
    def last(self) -> Completion:
        """The latest completion."""
        if not self.completions:
            raise RolloutError("nothing was sampled in the episode.")
        return self.completions[-1][1]

    def told(self, token_ids: Sequence[int]) -> EpisodeRecord:
        """With what the policy did not sample: a prompt, feedback, a tool's result."""
        return EpisodeRecord((*self.input_ids, *token_ids), self.completions)

    def sampled(self, completion: Completion) -> EpisodeRecord:
        """With a completion of all that stands before it."""
        start = len(self.input_ids)
        return EpisodeRecord(
            (*self.input_ids, *completion.token_ids), (*self.completions, (start, completion))
        )

    def trajectory(
        self, reward: float, rewards: Mapping[str, float], temperature: float = 1.0
    ) -> Trajectory:
        """The episode as a trajectory.

        Raises:
            RolloutError: The ids at a completion's place are not those that were sampled.
        """
        length, routes = len(self.input_ids), None
        mask, versions = [False] * length, [NO_VERSION] * length
        logprobs = [0.0] * length
        for start, completion in self.completions:
            end = start + len(completion.token_ids)
            if self.input_ids[start:end] != tuple(completion.token_ids) or any(mask[start:end]):
                raise RolloutError(
                    f"tokens {start} to {end} of the episode are not the ids that were sampled "
                    "there: a history was made anew from text."
                )
            mask[start:end] = [True] * (end - start)
            logprobs[start:end] = completion.logprobs
            versions[start:end] = completion.versions
            if completion.routes is not None:  # of all that was told before it, too
                routes = completion.routes if routes is None else routes.then(completion.routes)
        return Trajectory(
            input_ids=self.input_ids,
            response_mask=tuple(mask),
            logprobs=tuple(logprobs),
            versions=tuple(versions),
            reward=reward,
            rewards=rewards,
            text=self.last.text,
            truncated=self.last.truncated,
            temperature=temperature,
            num_turns=len(self.completions),
            routes=routes,
        )


class RewardedWorkflow(RLVRWorkflow):
    """Scores the last completion; rewards that name `messages` get all that came before it."""

    async def score(
        self,
        prompt: Prompt,
        context: EpisodeContext,
        record: EpisodeRecord,
        messages: Sequence[Mapping[str, Any]],
    ) -> tuple[float, dict[str, float]]:
        """The weighted sum of the rewards, and each under its name."""
        told = replace(prompt, messages=tuple(messages))
        return await self.score_text(told, context, record.last.text, record.last.token_ids)


_QUESTION = {"role": "user", "content": "question"}
_ANSWER = "ANSWER-OF-THE-ASSISTANT"
_MADE_UP = 2
"""Messages before those that are told."""


def first_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[int]:
    """The ids of a conversation that begins, ready to be continued.

    Raises:
        ConfigError: The template can't say all of it.
    """
    require_template(tokenizer)
    messages = spellable(without_blank_answer(messages))
    how = rendering(messages, tools)
    said = fitting(tokenizer, messages, how)
    return list(tokenizer.apply_chat_template(said, tokenize=True, return_dict=False, **how))


def next_ids(
    tokenizer: Tokenizer,
    completion: Completion,
    messages: Sequence[Message],
    calls: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """The ids that end an answer, say the new messages, and begin the next answer.

    If the last of them is the assistant's, it is continued.

    Args:
        tokenizer: Whose template it is.
        completion: The answer; where it sampled its own end, that isn't said twice.
        messages: What is said to it.
        calls: Its tool calls; some templates take a tool's result only after its call.

    Raises:
        ConfigError: The template can't say all of it.
    """
    between = _between(tokenizer, spellable(messages), spellable(calls))
    ids = list(tokenizer.encode(between, add_special_tokens=False))
    if ids and _has_ended(tokenizer, completion, ids[0]):
        return ids[1:]
    return ids


def call_id(number: int, index: int = 0) -> str:
    """The id of an answer's tool call: nine letters and digits, as Mistral's templates demand.

    Args:
        number: Of the answer, or of the call in the conversation.
        index: Of the call in its answer.
    """
    return f"call{number:03d}{index:02d}"


def require_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that can't tell turns apart."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template, which episodes of several turns need. "
            "Use a chat model's tokenizer, or set `chat_template` in tokenizer_config.json."
        )


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The conversation that a prompt begins.

    Raises:
        ConfigError: The prompt was made of plain text.
    """
    if not prompt.messages:
        raise ConfigError(
            "the prompts are plain text (the tokenizer has no chat template), but the workflow "
            "holds a conversation. Use a chat model's tokenizer."
        )
    return [dict(message) for message in prompt.messages]


def with_answer(messages: Sequence[Message], text: str, **more: Any) -> list[dict[str, Any]]:
    """The conversation with an answer at its end; one that was begun there goes on with it.

    Args:
        messages: The conversation.
        text: What was answered.
        more: Further keys of the answer's message.
    """
    told = [dict(message) for message in messages]
    begun = told.pop() if told and told[-1]["role"] == "assistant" else {"content": ""}
    return [*told, {"role": "assistant", "content": f"{begun['content']}{text}", **more}]


def _has_ended(tokenizer: Tokenizer, completion: Completion, end: int) -> bool:
    if not completion.token_ids:
        return False
    last = completion.token_ids[-1]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    # A model may end with another mark than its template (`<|return|>` for `<|end|>`).
    return last == end or (not completion.truncated and {last, end} <= special)


def _between(
    tokenizer: Tokenizer, messages: Sequence[Message], calls: Sequence[Mapping[str, Any]]
) -> str:
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        return _after_answer(_told(tokenizer, [_QUESTION, answer, *messages]))
    except Exception as error:
        # The template's own refusal (jinja2), or its silence: results without their calls, for one.
        if not calls:
            raise _refusal(error) from error
    called = {**answer, "tool_calls": [dict(call) for call in calls]}
    try:
        whole = _told(tokenizer, [_QUESTION, called, *messages])
        before = _render(tokenizer, [_QUESTION, called])
        end = _after_answer(_render(tokenizer, [_QUESTION, answer]))
    except Exception as error:
        raise _refusal(error) from error
    if not whole.startswith(before):
        raise ConfigError(
            "the chat template rewrites an answer with tool calls once their results follow, so "
            "ids can't be appended. Use a template that doesn't."
        )
    return end + whole[len(before) :]


def _refusal(error: Exception) -> ConfigError:
    return ConfigError(f"the chat template can't say the next turn: {error}")


def _told(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The whole made-up conversation, with all that is said from its answer on.

    The next answer begins, or goes on where the messages begin it.
    """
    messages = without_blank_answer(messages)
    begins = {"add_generation_prompt": True}
    how = rendering(messages) if len(messages) > _MADE_UP else begins
    said = fitting(tokenizer, messages, how, first=1)
    return str(tokenizer.apply_chat_template(said, tokenize=False, **how))


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    how = {"add_generation_prompt": False}
    said = fitting(tokenizer, messages, how, first=len(messages))
    return str(tokenizer.apply_chat_template(said, tokenize=False, **how))


def _after_answer(text: str) -> str:
    _, found, after = text.partition(_ANSWER)
    if not found:
        raise ConfigError("the chat template leaves out the assistant's own words.")
    return after
