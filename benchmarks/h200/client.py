"""The pool against a bare asyncio loop on the same server, alternating, with logprobs.

512 requests of 128 + 512 tokens, five times each in turn; then again while the main thread trains,
as in a run, where both share one interpreter. The rule: at least 0.97 of the bare loop, both times.

    python -m benchmarks.h200.client --out client.json            # one GPU, or --train-device 1
    python -m benchmarks.h200.client --smoke --out client.json    # the CPU engine, to try it out
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM

from benchmarks.h200.serving import (
    hardware,
    make_servers,
    model_of,
    parse_arguments,
    versions_of,
    write_report,
)
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.pool import ServerPool
from lightning_grpo.serving.server import ServerHandle
from lightning_grpo.types import Sampling

REQUESTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 128, 512, 5


def make_prompts(vocab: int, requests: int, tokens: int) -> list[list[int]]:
    """Token ids, the same every time."""
    noise = random.Random(0)
    return [[noise.randrange(5, vocab) for _ in range(tokens)] for _ in range(requests)]


async def bare(url: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Post all, read all; tokens/s."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def one(ids: list[int]) -> int:
            body = {
                "input_ids": ids,
                "sampling_params": {"max_new_tokens": new_tokens, "temperature": 1.0},
                "return_logprob": True,
            }
            async with session.post(f"{url}/generate", json=body) as reply:
                return len((await reply.json())["output_ids"])

        started = time.perf_counter()
        counts = await asyncio.gather(*map(one, prompts))
        return sum(counts) / (time.perf_counter() - started)


async def pooled(pool: ServerPool, prompts: list[list[int]], new_tokens: int) -> float:
    """The same by the pool; tokens/s."""
    sampling = Sampling(max_new_tokens=new_tokens)
    started = time.perf_counter()
    completions = await asyncio.gather(
        *(pool.generate(ids, sampling, group_key=i // 8) for i, ids in enumerate(prompts))
    )
    return sum(len(c.token_ids) for c in completions) / (time.perf_counter() - started)


async def compare(
    handle: ServerHandle, prompts: list[list[int]], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Both in turn; medians and their ratio."""
    rates: dict[str, list[float]] = {"bare": [], "pool": []}
    requirements = Requirements("bench")
    async with ServerPool([handle], requirements, lambda ids: "") as pool:
        await bare(handle.url, prompts, new_tokens)  # warms the server up
        for _ in range(rounds):
            rates["bare"].append(await bare(handle.url, prompts, new_tokens))
            rates["pool"].append(await pooled(pool, prompts, new_tokens))
            print({name: round(values[-1]) for name, values in rates.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_s": {name: [round(v) for v in values] for name, values in rates.items()},
        "ratio_of_medians": round(median["pool"] / median["bare"], 4),
    }


def train_until(stop: threading.Event, model_path: Path, device: str) -> int:
    """Training steps on the main thread until told to stop; how many there were."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(5, 400, (4, 512), device=device)
    steps = 0
    while not stop.is_set():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def in_background(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """The rollout side runs as in a run: one loop in one thread beside the trainer's."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def while_training(
    args: argparse.Namespace, model: Path, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` gives on a thread of its own while this one trains."""
    stop = threading.Event()

    def beside_training() -> dict[str, Any]:
        try:
            return measure()
        except Exception:  # noqa: BLE001 - one part's failure is a result
            return {"error": traceback.format_exc()}
        finally:
            stop.set()

    thread, results = in_background(beside_training)
    device = "cpu" if args.smoke else f"cuda:{args.train_device}"
    steps = train_until(stop, model, device)
    thread.join()
    return {**results[0], "training_steps": steps}


def main() -> None:
    """Alone, then while training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--training-rounds", type=int, default=ROUNDS)
    args = parse_arguments(parser)
    requests, tokens, new = (16, 8, 8) if args.smoke else (REQUESTS, PROMPT_TOKENS, NEW_TOKENS)
    model = model_of(args)
    report: dict[str, Any] = {"hardware": hardware(), "requests": requests, "new_tokens": new}
    work = Path(tempfile.mkdtemp())
    servers = make_servers(args, work, **{"skip-tokenizer-init": True})
    try:
        servers.api_key = ""
        (handle,) = servers.start(str(model), work)
        report["sglang"] = versions_of([handle.url])
        prompts = make_prompts(400, requests, tokens)
        report["alone"] = asyncio.run(compare(handle, prompts, new, args.rounds))
        write_report(args.out, report)
        report["while_training"] = while_training(
            args, model, lambda: asyncio.run(compare(handle, prompts, new, args.training_rounds))
        )
        write_report(args.out, report)
    finally:
        servers.stop()


if __name__ == "__main__":
    main()
