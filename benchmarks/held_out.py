"""Held-out accuracy of a model folder on the quickstart's problems, by the embedded engine."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from lightning_grpo.policy.load import load_tokenizer
from lightning_grpo.rewards import gsm8k
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.shipped import resolve_path


def accuracy(folder: str | Path, num_problems: int = 1000, seed: int = 0) -> float:
    """Mean reward of one sample each at temperature 1."""
    tokenizer = load_tokenizer(resolve_path("shipped:quickstart"))
    prompts = Prompts("shipped:quickstart/test.jsonl", column="question").load(tokenizer)
    rows = [prompts[i] for i in range(min(num_problems, len(prompts)))]
    command = [sys.executable, "-m", "lightning_grpo.engine", "--model", str(folder)]
    command += ["--port", "0", "--exit-with-stdin", "--max-running-requests", "128"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        try:
            assert engine.stdout is not None
            url = engine.stdout.readline().decode().split()[-1]
            body = {
                "input_ids": [list(row.input_ids) for row in rows],
                "sampling_params": [
                    {"max_new_tokens": 56, "temperature": 1.0, "sampling_seed": seed * 7919 + i}
                    for i in range(len(rows))
                ],
            }
            request = urllib.request.Request(
                f"{url}/generate",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                replies = json.loads(response.read())
        finally:
            engine.terminate()
    texts = [tokenizer.decode(r["output_ids"], skip_special_tokens=True) for r in replies]
    rewards = [gsm8k(text, row.columns["answer"]) for text, row in zip(texts, rows, strict=True)]
    return sum(rewards) / len(rewards)
