"""The pool against a bare asyncio loop on the same server, alternating, with logprobs.

512 requests of 128 + 512 tokens, five times each in turn; then again while the main thread trains.
The rule: at least 0.97 of the bare loop, both times.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM

from benchmarks.h200.serving import hardware, make_model, make_servers, write_report
from lightning_grpo.rollout.pool import ServerPool
from lightning_grpo.rollout.verify import Requirements
from lightning_grpo.servers.base import ServerHandle
from lightning_grpo.shipped import resolve_path
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


async def compare(handle: ServerHandle, prompts: list[list[int]], new_tokens: int) -> dict:
    """Both in turn; medians and their ratio."""
    rates: dict[str, list[float]] = {"bare": [], "pool": []}
    requirements = Requirements("bench")
    async with ServerPool([handle], requirements, lambda ids: "") as pool:
        await bare(handle.url, prompts, new_tokens)  # warms the server up
        for _ in range(ROUNDS):
            rates["bare"].append(await bare(handle.url, prompts, new_tokens))
            rates["pool"].append(await pooled(pool, prompts, new_tokens))
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


def main() -> None:
    """Alone, then while training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "bench-model")
    parser.add_argument("--serve-device", type=int, default=0)
    parser.add_argument("--train-device", type=int, default=0)
    args = parser.parse_args()
    requests, tokens, new = (16, 8, 8) if args.smoke else (REQUESTS, PROMPT_TOKENS, NEW_TOKENS)
    model = Path(resolve_path("shipped:quickstart")) if args.smoke else make_model(args.model)
    report: dict[str, Any] = {"hardware": hardware(), "requests": requests, "new_tokens": new}
    work = Path(tempfile.mkdtemp())
    kind = "embedded" if args.smoke else "sglang"
    servers = make_servers(kind, work, args.serve_device, **{"skip-tokenizer-init": True})
    try:
        (handle,) = servers.start(str(model), work)
        prompts = make_prompts(400, requests, tokens)
        report["alone"] = asyncio.run(compare(handle, prompts, new))
        write_report(args.out, report)
        stop = threading.Event()

        def beside_training() -> dict:
            try:
                return asyncio.run(compare(handle, prompts, new))
            finally:
                stop.set()

        thread, results = in_background(beside_training)
        device = "cpu" if args.smoke else f"cuda:{args.train_device}"
        steps = train_until(stop, model, device)
        thread.join()
        report["while_training"] = {**results[0], "training_steps": steps}
        write_report(args.out, report)
    finally:
        servers.stop()


if __name__ == "__main__":
    main()
