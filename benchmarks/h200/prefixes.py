"""What a shared prompt saves of a training pass: seconds and memory, with sharing and without.

The Qwen2.5-1.5B shape in bf16 with random weights, forward and backward of whole groups in one
micro-batch, compiled as in a run: prompts of 64, 512 and 4,096 tokens, groups of 8 and 16,
log-normal responses of 480 tokens on average. Medians of 5 after 2, in turn.

The rule: sharing is never slower.

    python -m benchmarks.h200.prefixes --out prefixes.json
    python -m benchmarks.h200.prefixes --smoke --out prefixes.json
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.h200.serving import SHAPES, hardware, make_model, write_report
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.shipped import resolve_path

PROMPTS, GROUPS = (64, 512, 4096), (8, 16)
MEAN, SIGMA, LEAST_TOKENS = 480, 0.6, 8192
WARM, ROUNDS = 2, 5


def micro_batch(
    prompt: int, group: int, mean: int, least: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups until there are enough tokens: ids, bounds and which tokens are responses."""
    draw = random.Random(0)
    ids: list[int] = []
    bounds, mask = [0], []
    while not ids or len(ids) < least:
        start = [draw.randrange(5, vocab) for _ in range(prompt)]
        for _ in range(group):
            drawn = draw.lognormvariate(0.0, SIGMA) * mean / 2.718281828 ** (SIGMA**2 / 2)
            response = int(min(max(drawn, 16), 4 * mean))
            ids += start + [draw.randrange(5, vocab) for _ in range(response)]
            mask += [False] * prompt + [True] * response
            bounds.append(len(ids))
    return torch.tensor(ids), torch.tensor(bounds), torch.tensor(mask)


def run_pass(policy: PackedPolicy, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of a forward and a backward."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    ids, bounds, mask = batch
    policy(ids, bounds, positions_mask=mask)[0].sum().backward()
    policy.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measured(policy: PackedPolicy, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Both ways, in turn."""
    seconds: dict[str, list[float]] = {"shared": [], "alone": []}
    peaks = {}
    for name in seconds:
        policy.share_prefixes = name == "shared"
        for _ in range(WARM):
            run_pass(policy, batch)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            run_pass(policy, batch)
            peaks[f"{name}_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for _ in range(ROUNDS):
        for name, each in seconds.items():
            policy.share_prefixes = name == "shared"
            each.append(run_pass(policy, batch))
    found = {f"{name}_s": round(statistics.median(each), 4) for name, each in seconds.items()}
    return found | peaks | {"times_as_fast": round(found["alone_s"] / found["shared_s"], 2)}


def main() -> None:
    """Every prompt and group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="Qwen2.5-1.5B", choices=list(SHAPES))
    parser.add_argument("--smoke", action="store_true", help="small, on this CPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prompts, mean, least = (PROMPTS, MEAN, LEAST_TOKENS)
    if args.smoke:
        prompts, mean, least = (4, 16, 64), 24, 64
        policy = PackedPolicy(load_policy(resolve_path("shipped:quickstart")))
    else:
        folder = make_model(Path(tempfile.gettempdir()) / args.shape, args.shape)
        model = load_policy(str(folder)).to(device="cuda", dtype=torch.bfloat16)
        policy = PackedPolicy(model, compiled=True)
    report: dict[str, Any] = {"hardware": hardware(), "rows": []}
    for prompt, group in itertools.product(prompts, GROUPS):
        batch = micro_batch(prompt, group, mean, least, policy.model.config.vocab_size)
        row = {"prompt": prompt, "group": group, "tokens": len(batch[0])}
        row |= measured(policy, batch)
        report["rows"].append(row)
        print(row, flush=True)
        write_report(args.out, report)


if __name__ == "__main__":
    main()
