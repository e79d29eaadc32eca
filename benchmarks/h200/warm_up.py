"""A minute of supervised fine-tuning on problems' own solutions, so that a model knows the form.

Packed rows through the package's own policy; the loss is the mean negative logprob of the
solution's tokens, the end of the turn included. Calculator marks (`<<4*3=12>>`) are removed.

    python -m benchmarks.h200.warm_up MODEL train.jsonl OUT --rows 600
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lightning_grpo.policy.load import export_policy, load_policy
from lightning_grpo.policy.packed import PackedPolicy

SUFFIX = "\nThink step by step. End with the answer alone after ####."
BATCH, WARM_UP_STEPS = 32, 10


def encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Prompt and solution as token ids."""
    asked = [{"role": "user", "content": row["question"] + SUFFIX}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    solution = re.sub(r"<<.*?>>", "", row["answer"]) + tokenizer.eos_token
    return prompt, tokenizer.encode(solution, add_special_tokens=False)


def loss_of(policy: PackedPolicy, rows: list[tuple[list[int], list[int]]], device: str) -> Any:
    """Mean negative logprob of the solutions' tokens."""
    ids = torch.tensor([i for prompt, answer in rows for i in prompt + answer], device=device)
    learnt = [k >= len(p) for p, a in rows for k in range(len(p) + len(a))]
    mask = torch.tensor(learnt, device=device)
    lengths = torch.tensor([0, *(len(p) + len(a) for p, a in rows)], device=device)
    logprobs, _ = policy(ids, lengths.cumsum(0), positions_mask=mask)
    return -logprobs[mask].mean()


def main() -> None:
    """One pass, or several."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, help="of the data; all where not given")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = PackedPolicy(load_policy(args.model)).to(device)
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.rows]
    rows = [encode(tokenizer, json.loads(line)) for line in lines]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95))
    total, started = args.epochs * (len(rows) // BATCH), time.monotonic()
    for step in range(total):
        if step % (len(rows) // BATCH) == 0:
            random.Random(step).shuffle(rows)
        at = step % (len(rows) // BATCH) * BATCH
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARM_UP_STEPS, 1.05 - step / total)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(policy, rows[at : at + BATCH], device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == total - 1:
            spent = time.monotonic() - started
            print(f"step {step + 1}/{total} loss {loss.item():.3f} {spent:.0f} s", flush=True)
    export_policy(policy.model, tokenizer, args.out)


if __name__ == "__main__":
    main()
