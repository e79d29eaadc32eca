"""Agents written with the `openai` package, against the endpoint on a real socket."""

from __future__ import annotations

import functools
import json

import aiohttp
import anyio
import pytest

from lightning_grpo.agents.conversation import HistoryError
from lightning_grpo.agents.workflows import AgentWorkflow
from lightning_grpo.errors import ConfigError, RewardError, RolloutError, ServersLostError
from lightning_grpo.rollout.workflow import check_trajectory
from lightning_grpo.types import Sampling
from tests.fakes.agents import ScriptedContext, call_text, make_chat_tokenizer, make_prompt

openai = pytest.importorskip("openai", reason="needs the extra [openai]")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


def play(agent, replies, *, fail=None, **settings):
    tokenizer = make_chat_tokenizer()
    context = ScriptedContext(tokenizer, replies, fail=fail)
    workflow = AgentWorkflow(agent, **settings)
    prompt = make_prompt(tokenizer, answer="5")
    workflow.validate(prompt.columns)
    trajectory = anyio.run(workflow.run, prompt, context)
    return check_trajectory(trajectory, 0), context, tokenizer


def right(completion, answer):
    return float(completion == answer)


async def two_questions(messages, base_url, api_key):
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        ask = functools.partial(client.chat.completions.create, model="any")
        first = await ask(messages=messages, temperature=0.2)
        messages = [*messages, first.choices[0].message, {"role": "user", "content": "Sure?"}]
        second = await ask(messages=messages, max_tokens=16)
        assert second.choices[0].finish_reason == "stop"
        assert second.usage.completion_tokens > 0
        return second.choices[0].message.content


def test_an_agent_of_two_turns_is_recorded_token_by_token(caplog):
    trajectory, context, tokenizer = play(
        two_questions, ["6", "5"], reward=right, sampling=Sampling(max_new_tokens=32)
    )
    assert (trajectory.reward, trajectory.num_turns) == (1.0, 2)
    assert trajectory.rewards == {"right": 1.0, "agent_calls": 2.0, "discarded_calls": 0.0}
    assert tokenizer.decode(trajectory.input_ids) == (
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    )
    assert trajectory.input_ids[: len(context.asked[1])] == context.asked[1]
    assert [s.temperature for s in context.samplings] == [1.0, 1.0]
    assert [s.max_new_tokens for s in context.samplings] == [32, 16]
    assert caplog.text.count("the agent asks for temperature 0.2, which is ignored") == 1


def test_an_agent_may_block_and_give_its_own_reward():
    def agent(messages, base_url, api_key, answer):
        with openai.OpenAI(base_url=base_url, api_key=api_key) as client:
            reply = client.chat.completions.create(model="any", messages=messages)
        return {"right": float(reply.choices[0].message.content == answer), "short": 0.5}

    trajectory, _, _ = play(agent, ["5"])
    assert trajectory.reward == 1.5
    assert (trajectory.rewards["right"], trajectory.rewards["short"]) == (1.0, 0.5)


def test_an_agent_calls_its_own_tools():
    async def agent(messages, base_url, api_key):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            ask = functools.partial(client.chat.completions.create, model="any", tools=TOOLS)
            reply = (await ask(messages=messages)).choices[0]
            assert reply.finish_reason == "tool_calls"
            (call,) = reply.message.tool_calls
            value = json.loads(call.function.arguments)["a"] + 3
            result = {"role": "tool", "tool_call_id": call.id, "content": str(value)}
            reply = await ask(messages=[*messages, reply.message.model_dump(), result])
            return reply.choices[0].message.content

    trajectory, _, tokenizer = play(agent, [call_text("add", '{"a": 2}'), "5"], reward=right)
    assert trajectory.reward == 1.0
    assert "<tool_response>5</tool_response>" in tokenizer.decode(trajectory.input_ids)


def test_an_agent_may_stream():
    async def agent(messages, base_url, api_key):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            stream = await client.chat.completions.create(
                model="any",
                messages=messages,
                tools=TOOLS,
                stream=True,
                stream_options={"include_usage": True},
            )
            text, calls, reasons, usage = "", [], [], None
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    calls += choice.delta.tool_calls or []
                    reasons.append(choice.finish_reason)
            assert reasons[-1] == "tool_calls"
            assert json.loads(calls[0].function.arguments) == {"a": 2}
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            return text

    trajectory, _, _ = play(agent, ["I add. " + call_text("add", '{"a": 2}')], reward=str_length)
    assert trajectory.reward == len("I add.")


def str_length(completion):
    return float(len(completion))


def test_a_changed_history_fails_the_episode_also_where_the_agent_swallows_it():
    async def agent(messages, base_url, api_key):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            await client.chat.completions.create(model="any", messages=messages)
            edited = [*messages, {"role": "assistant", "content": "mine"}, messages[0]]
            with pytest.raises(openai.BadRequestError, match="message 1 is not what was said"):
                await client.chat.completions.create(model="any", messages=edited)
        return 1.0

    with pytest.raises(HistoryError, match=r"'6'.*'mine'"):
        play(agent, ["6", "5"])


def test_what_fails_in_the_pool_is_what_fails_the_episode():
    async def agent(messages, base_url, api_key):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            await client.chat.completions.create(model="any", messages=messages)

    with pytest.raises(ServersLostError, match="no server is left"):
        play(agent, [], fail=ServersLostError("no server is left"))


def test_an_agent_that_takes_too_long_is_ended_with_its_requests():
    contexts = []

    async def main():
        tokenizer = make_chat_tokenizer()
        contexts.append(ScriptedContext(tokenizer, [None]))
        workflow = AgentWorkflow(two_questions, right, timeout_s=1.5)
        await workflow.run(make_prompt(tokenizer, answer="5"), contexts[0])

    with pytest.raises(RolloutError, match=r"longer than `timeout_s` \(1.5 s\)"):
        anyio.run(main)
    assert contexts[0].cancelled == 1


def test_agents_own_errors_and_rewards_are_told():
    async def broken(base_url):
        raise KeyError("mine")

    async def lazy(messages, base_url, api_key):
        return 1.0

    async def strange(messages, base_url, api_key):
        await two_questions(messages, base_url, api_key)
        return "text"

    with pytest.raises(KeyError, match="mine"):
        play(broken, [])
    with pytest.raises(RolloutError, match="without a call of the policy"):
        play(lazy, [])
    with pytest.raises(ConfigError, match="must return its reward"):
        play(strange, ["6", "5"])

    async def boundless(messages, base_url, api_key):
        await two_questions(messages, base_url, api_key)
        return {"right": 1e39}

    with pytest.raises(RewardError, match="must be finite, also in fp32"):
        play(boundless, ["6", "5"])  # fails the episode, not the run


def test_episodes_are_kept_apart_and_the_server_closes_with_the_last():
    seen = []

    async def agent(messages, base_url, api_key):
        seen.append((base_url, api_key))
        return await two_questions(messages, base_url, api_key)

    async def main():
        tokenizer = make_chat_tokenizer()
        workflow = AgentWorkflow(agent, right)
        prompt = make_prompt(tokenizer, answer="5")
        results = []

        async def run(reply):
            results.append(await workflow.run(prompt, ScriptedContext(tokenizer, ["6", reply])))

        for _ in range(2):  # opens again
            async with anyio.create_task_group() as tasks:
                for reply in "5678":
                    tasks.start_soon(run, reply)
            async with aiohttp.ClientSession() as client:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await client.get(seen[-1][0] + "/models")
        return results

    results = anyio.run(main)
    assert sorted(r.reward for r in results) == [0.0] * 6 + [1.0] * 2
    assert len(set(seen)) == 8


def test_only_the_key_of_the_episode_opens_it():
    statuses = {}

    async def agent(messages, base_url, api_key):
        async with aiohttp.ClientSession() as client:
            for key in ("wrong", api_key):
                headers = {"Authorization": f"Bearer {key}"}
                async with client.get(f"{base_url}/models", headers=headers) as reply:
                    statuses[key == api_key] = reply.status
            other = base_url.replace("/v1", "x/v1")
            async with client.get(f"{other}/models", headers=headers) as reply:
                statuses["other"] = reply.status
        return await two_questions(messages, base_url, api_key)

    play(agent, ["6", "5"], reward=right)
    assert statuses == {False: 401, True: 200, "other": 404}


def test_an_agent_that_cannot_be_reached_or_fed_is_refused():
    with pytest.raises(ConfigError, match="`agent` must take `base_url`"):
        AgentWorkflow(lambda messages: 0.0)
    with pytest.raises(ConfigError, match="the agent asks for 'solution', which is no column"):
        AgentWorkflow(lambda base_url, solution: 0.0).validate(["answer"])
    with pytest.raises(ConfigError, match="`conversations` must be"):
        AgentWorkflow(two_questions, conversations="two")
