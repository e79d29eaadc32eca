"""The same game by an agent that knows nothing of training: it was written for any OpenAI server.

    python agent.py http://127.0.0.1:30000/v1 any-key

`AgentWorkflow` runs `play` with a `base_url` of its own, and its calls become trajectories.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import game
from openai import AsyncOpenAI


async def play(messages: list[dict[str, Any]], answer: str, base_url: str, api_key: str) -> float:
    """Guesses until it is right, twice at most.

    Args:
        messages: The question.
        answer: The number.
        base_url: Of the server.
        api_key: Of the server.

    Returns:
        1.0 for the number.
    """
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(2):
            reply = await client.chat.completions.create(model="policy", messages=messages)
            said = reply.choices[0].message
            if game.reward(said.content or "", answer):
                return 1.0
            told = game.feedback(said.content or "", answer)
            messages = [*messages, said, {"role": "user", "content": told}]
    return 0.0


if __name__ == "__main__":
    question = [{"role": "user", "content": game.question(30)}]
    print(asyncio.run(play(question, "41", base_url=sys.argv[1], api_key=sys.argv[2])))
