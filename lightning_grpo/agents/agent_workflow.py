"""Trains an agent written with the `openai` package, by giving it another `base_url`."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread

from lightning_grpo.agents.conversation import Conversations, Reached, require_known
from lightning_grpo.agents.endpoint import AgentSession, Endpoint
from lightning_grpo.agents.rewarded import RewardedWorkflow
from lightning_grpo.checks import require_seconds
from lightning_grpo.errors import ConfigError, RewardError, RolloutError
from lightning_grpo.rollout.binding import RESERVED, Rewards, reward_name
from lightning_grpo.rollout.protocols import EpisodeContext
from lightning_grpo.rollout.reward_worker import answer_of
from lightning_grpo.rollout.workflow import sampling_of
from lightning_grpo.types import Prompt, Sampling, Trajectory

_DEFAULT_SAMPLING = Sampling()
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
        sampling: Sampling = _DEFAULT_SAMPLING,
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
