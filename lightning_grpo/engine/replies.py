"""What the engine answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.requests import BadRequestError, Generation, Output, Request
from lightning_grpo.engine.scheduler import EngineThread
from lightning_grpo.engine.slots import decode_text, trim


def generate_reply(
    generation: Generation,
    output: Output,
    tokenizer: PreTrainedTokenizerBase | None,
    started: float,
) -> dict[str, Any]:
    """The reply about one completion, finished or (in a stream) still running.

    Args:
        generation: What was asked.
        output: What it is by now.
        tokenizer: Makes the text; None leaves it empty.
        started: When the request came, by `time.perf_counter`.
    """
    meta: dict[str, Any] = {
        "id": generation.rid,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(generation.input_ids),
        "weight_version": output.weight_version,
        "num_retractions": output.num_retractions,
    }
    if generation.return_logprob:
        meta |= _logprobs(generation, output)
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(output.token_ids),
        "cached_tokens": output.cached_tokens,
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    if output.finish_reason is not None:
        meta["weight_versions"] = output.spans
    meta["e2e_latency"] = time.perf_counter() - started
    meta["response_sent_to_client_ts"] = time.time()
    text = "" if tokenizer is None else reply_text(generation, output, tokenizer)
    return {"text": text, "output_ids": output.token_ids, "meta_info": meta}


def _logprobs(generation: Generation, output: Output) -> dict[str, Any]:
    scored: list[list[Any]] = []
    if generation.logprob_start is not None and output.input_logprobs is not None:
        ids = generation.input_ids[generation.logprob_start :]
        # The first has nothing before it that was scored.
        values = [None, *output.input_logprobs]
        scored = [[value, token, None] for value, token in zip(values, ids, strict=True)]
    return {
        "input_token_logprobs": scored,
        "output_token_logprobs": [
            [value, token, None]
            for value, token in zip(output.logprobs, output.token_ids, strict=True)
        ],
        "output_token_logprobs_length": len(output.token_ids),
    }


def reply_text(generation: Generation, output: Output, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a completion, cut at what stopped it."""
    matched = None if output.finish_reason is None else output.finish_reason.get("matched")
    if generation.no_stop_trim:
        matched = None
    ids = output.token_ids[:-1] if isinstance(matched, int) else output.token_ids
    text = decode_text(
        tokenizer,
        ids,
        skip_special_tokens=generation.skip_special_tokens,
        spaces_between_special_tokens=generation.spaces_between_special_tokens,
    )
    if output.finish_reason is None:
        # A character whose bytes are not all here is not told of yet.
        return text.rstrip("\ufffd")
    return trim(text, matched)


class Unread:
    """What a stream has not told yet: the newest output of each completion, which holds the others.

    So a reader who is slow, or stops, costs no more memory than one who waits for the end.
    """

    def __init__(self) -> None:
        self._newest: dict[int, Output] = {}
        self._some = asyncio.Event()

    def put(self, index: int, output: Output) -> None:
        """What a completion is by now."""
        self._newest[index] = output
        self._some.set()

    async def get(self) -> tuple[int, Output]:
        """The completion that has waited longest to be told of, and what it is."""
        await self._some.wait()
        index = next(iter(self._newest))
        output = self._newest.pop(index)
        if not self._newest:
            self._some.clear()
        return index, output


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


async def event_stream(request: web.Request, events: AsyncIterator[Any]) -> web.StreamResponse:
    """Answer with server-sent events, each a JSON value, and `[DONE]`."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for event in events:
        await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


@asynccontextmanager
async def sampled(
    engine: EngineThread, generations: Sequence[Generation], *, stream: bool
) -> AsyncIterator[AsyncIterator[tuple[int, Output]]]:
    """The outputs of completions, by index, until all have ended.

    Those that still run when the block is left, because nobody waits for them, are aborted.

    Args:
        engine: Generates.
        generations: What is asked.
        stream: Whether each new token is an output, or only the end.

    Raises:
        BadRequestError: A request of that name is in flight.
    """
    unread = Unread()
    running: set[str] = set()

    async def outputs() -> AsyncIterator[tuple[int, Output]]:
        while running:
            index, output = await unread.get()
            if output.finish_reason is not None:
                running.discard(generations[index].rid)
            yield index, output

    requests = [Request(g, partial(unread.put, i), stream) for i, g in enumerate(generations)]
    running.update(generation.rid for generation in generations)
    try:
        await engine.call(lambda s: s.submit(requests))
        yield outputs()
    except BadRequestError:  # none was taken: the name is another's
        running.clear()
        raise
    finally:
        if running:
            engine.post(lambda s: s.abort(sorted(running)))
