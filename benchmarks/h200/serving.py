"""What the serving benchmarks share: a model with random weights, servers, traffic, a report.

SGLang on those machines is not installed but carried (`SGLANG_SITE` names its folder); the servers'
interpreter is then a script that puts it on the path, which the trainer's must not have.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.servers.embedded import EmbeddedServers
from lightning_grpo.servers.owned import OwnedServers
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.shipped import resolve_path

SERVER_FLAGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "sampling-backend": "pytorch",
    "attention-backend": "fa3",
    "disable-prefill-cuda-graph": True,
    "cuda-graph-max-bs-decode": 512,
    "max-running-requests": 512,
    "disable-radix-cache": True,
    "context-length": 4096,
}


def make_model(folder: Path) -> Path:
    """The Qwen2.5-1.5B shape with random weights in bf16, and the quickstart's tokenizer."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=0,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    source = Path(resolve_path("shipped:quickstart"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    del model
    torch.cuda.empty_cache()
    return folder


def server_python(folder: Path) -> str:
    """The interpreter of the servers."""
    site = os.environ.get("SGLANG_SITE")
    if site is None:
        return "auto"
    script = folder / "server-python"
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH={site}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


def make_servers(kind: str, folder: Path, device: int, **flags: Any) -> OwnedServers:
    """One server on one GPU; `embedded` is the CPU engine, to try a script out."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "embedded":
        return EmbeddedServers(max_running_requests=512)
    return SGLangServers(
        1,
        devices=[device],
        memory_fraction=0.4,
        python=server_python(folder),
        flags=SERVER_FLAGS | flags,
    )


def median_of(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def hardware() -> dict[str, Any]:
    """What it ran on."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        listed = []
    import torch

    return {
        "gpus": listed,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Keeps what is known so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report), flush=True)
