"""How far trainer and servers differ on the same weights, from what, and what less would cost.

Each server samples sequences (32 prompts of 32 tokens, 128 new ones) and scores the first server's;
the trainer scores all of them in several ways. What is reported: mean |dlogprob| over the sampled
tokens, of every pair, and with `--speed` each server's throughput (512 requests of 128 + 512
tokens, best of two).
Start the servers before, with the flags that are to be compared:

    python -m benchmarks.h200.probe --urls default=http://127.0.0.1:30000 fp32_head=... --out p.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from benchmarks.h200.client import NEW_TOKENS, PROMPT_TOKENS, REQUESTS, bare, make_prompts
from benchmarks.h200.serving import (
    hardware,
    model_of,
    parse_arguments,
    versions_of,
    write_report,
)
from lightning_grpo.policy import packed as head
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import parallelize

SEQUENCES, START, SAMPLED = 32, 32, 128
Rows = list[list[float]]
"""Logprobs of the sampled tokens, `[sequences][SAMPLED]`."""


async def ask(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def one(body: dict[str, Any]) -> dict[str, Any]:
            async with session.post(f"{url}/generate", json=body) as reply:
                reply.raise_for_status()
                return await reply.json()

        return await asyncio.gather(*map(one, bodies))


def sample(url: str) -> tuple[list[list[int]], Rows]:
    """Sequences, and the logprobs that the server reports of what it samples."""
    bodies = [
        {
            "input_ids": ids,
            "sampling_params": {
                "max_new_tokens": SAMPLED,
                "ignore_eos": True,
                "temperature": 1.0,
            },
            "return_logprob": True,
        }
        for ids in make_prompts(400, SEQUENCES, START)
    ]
    replies = asyncio.run(ask(url, bodies))
    sequences = [
        body["input_ids"] + reply["output_ids"] for body, reply in zip(bodies, replies, strict=True)
    ]
    return sequences, [[e[0] for e in r["meta_info"]["output_token_logprobs"]] for r in replies]


def scored(url: str, sequences: list[list[int]]) -> Rows:
    """What the server gives them when it reads them."""
    bodies = [
        {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        for ids in sequences
    ]
    replies = asyncio.run(ask(url, bodies))
    return [[e[0] for e in r["meta_info"]["input_token_logprobs"]][START:] for r in replies]


FP32_LOGITS = head._logits


def bf16_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """In place of the head's own, which keeps them in fp32."""
    return (hidden @ weight.t()).float()


class Trainer:
    """Scores sequences on the GPU as a run does, and in other precisions."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._mesh = init_device_mesh(device.type, (1,))

    def ways(self) -> dict[str, Callable[[list[list[int]]], Rows]]:
        """By name."""
        return {
            "trainer, bf16 with fp32 logits (a run's)": lambda s: self.packed("bfloat16", s),
            "trainer, bf16 with bf16 logits": self.packed_bf16_logits,
            "trainer, bf16 products only (autocast)": self.autocast,
            "trainer, fp32": lambda s: self.packed("float32", s),
        }

    def packed(self, dtype: str, sequences: list[list[int]]) -> Rows:
        """By the package's policy, sharded over one GPU."""
        policy = PackedPolicy(load_policy(str(self._path)).to(self._device))
        parallelize(policy, self._mesh, param_dtype=dtype)
        bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0)
        ids = torch.tensor([i for row in sequences for i in row])
        with torch.no_grad():
            logprobs, _ = policy(ids.to(self._device), bounds.to(self._device))
        parts = logprobs.float().cpu().split([len(row) for row in sequences])
        return [part[START:].tolist() for part in parts]

    def packed_bf16_logits(self, sequences: list[list[int]]) -> Rows:
        """The same, but for the head."""
        head._logits = bf16_logits
        try:
            return self.packed("bfloat16", sequences)
        finally:
            head._logits = FP32_LOGITS

    @torch.no_grad()
    def autocast(self, sequences: list[list[int]]) -> Rows:
        """fp32 weights and residual stream, bf16 matrix products."""
        model = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.float32)
        model.to(self._device)
        rows: Rows = []
        with torch.autocast(self._device.type, torch.bfloat16):
            for sequence in sequences:
                ids = torch.tensor([sequence], device=self._device)
                logits = model(input_ids=ids).logits[0, :-1].float()
                logprobs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
                rows.append(logprobs[START - 1 :].cpu().tolist())
        return rows


def difference(left: Rows, right: Rows) -> float:
    """Mean |left - right|."""
    pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    return round(statistics.mean(abs(a - b) for a, b in pairs), 6)


def table(scores: dict[str, Rows]) -> dict[str, dict[str, float]]:
    """Of every pair."""
    return {
        one: {other: difference(scores[one], scores[other]) for other in scores if other != one}
        for one in scores
    }


def throughput(url: str) -> float:
    """Tokens/s."""
    prompts = make_prompts(400, REQUESTS, PROMPT_TOKENS)
    return round(max(asyncio.run(bare(url, prompts, NEW_TOKENS)) for _ in range(2)))


class Report(dict[str, Any]):
    """What is known; written after each part, whose failure it keeps."""

    def __init__(self, path: Path, **entries: Any) -> None:
        super().__init__(entries, errors={})
        self._path = path

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """What the function gives; None if it fails."""
        try:
            return function()
        except Exception:  # noqa: BLE001 - one part's failure is a result
            self["errors"][what] = traceback.format_exc()
            return None
        finally:
            write_report(self._path, self)


def compare(report: Report, urls: dict[str, str], trainer: Trainer) -> None:
    """Servers first, then the trainer's ways, then the pairs."""
    found = {
        name: report.attempt(f"{name} samples", lambda u=u: sample(u)) for name, u in urls.items()
    }
    sampled = {name: each for name, each in found.items() if each}
    sequences = next(iter(sampled.values()))[0]
    scores: dict[str, Rows] = {}
    for name, url in urls.items():
        if rows := report.attempt(f"{name} scores", lambda u=url: scored(u, sequences)):
            scores[f"server, {name}"] = rows
    report["sampled_against"] = {}
    for way, score in trainer.ways().items():
        if rows := report.attempt(way, lambda s=score: s(sequences)):
            scores[way] = rows
        report["sampled_against"][way] = {
            name: report.attempt(f"{name}, {way}", lambda s=score, f=f: difference(s(f[0]), f[1]))
            for name, f in sampled.items()
        }
        report["pairs"] = table(scores)


def main() -> None:
    """Compare, and measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--urls", nargs="+", required=True, metavar="NAME=URL")
    parser.add_argument("--speed", action="store_true", help="measure throughput, too")
    args = parse_arguments(parser)
    urls = dict(entry.split("=", 1) for entry in args.urls)
    report = Report(args.out, hardware=hardware(), sglang=versions_of(list(urls.values())))
    device = torch.device("cpu" if args.smoke else f"cuda:{args.train_device}")
    if not args.smoke:
        torch.cuda.set_device(device)
    compare(report, urls, Trainer(model_of(args), device))
    if args.speed:
        report["tokens_per_s"] = {}
        for name, url in urls.items():
            rate = report.attempt(f"{name} speed", lambda u=url: throughput(u))
            report["tokens_per_s"][name] = rate
    write_report(args.out, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
