"""What the serving benchmarks share: arguments, a model with random weights, servers, a report.

Where SGLang is not installed but lies in a folder, `SGLANG_SITE` names that; the servers'
interpreter is then a script that puts it on the path, which the trainer's must not have.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.servers.base import RunningServers, Servers
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.shipped import resolve_path

SERVER_FLAGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "sampling-backend": "pytorch",
    "attention-backend": "fa3",
    "cuda-graph-max-bs-prefill": 512,
    "cuda-graph-max-bs-decode": 512,
    "max-running-requests": 512,
    "disable-radix-cache": True,
    "context-length": 4096,
}


_MIXTURE: dict[str, Any] = {
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": False,  # SGLang's Qwen3-MoE knows no tied head
    "max_position_embeddings": 32768,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 131072,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "max_position_embeddings": 131072,
    },
    # 3.3 billion parameters, of which a token meets 1.0, and a dense one of as many as those.
    "Qwen3-MoE-3B": _MIXTURE
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "dense as Qwen3-MoE-3B": _MIXTURE | {"model_type": "qwen3"},
    # Three layers of a gated delta rule for one of attention, as in Qwen3.5; 0.66 billion.
    "Qwen3.5-0.7B": {
        "model_type": "qwen3_5_text",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "intermediate_size": 3584,
        "linear_num_value_heads": 16,
    },
}


def make_model(folder: Path, shape: str = "Qwen2.5-1.5B") -> Path:
    """A shape with random weights in bf16, and the quickstart's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 151936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    ends = {"bos_token_id": None, "eos_token_id": 0}
    config = AutoConfig.for_model(**common | ends | SHAPES[shape])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    config.architectures = [type(model).__name__]
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


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parser's own arguments, and those that all of these programs take."""
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--smoke", action="store_true", help="small, on this CPU, with the embedded engine")
    add("--model", type=Path, help="where the model is, or is to be made")
    add("--shape", default="Qwen2.5-1.5B", choices=list(SHAPES))
    add("--url", help="of a server that runs, with this model; None: start one")
    add("--serve-device", type=int, default=0)
    add("--train-device", type=int, default=0)
    return parser.parse_args()


def model_of(args: argparse.Namespace) -> Path:
    """The folder of the model, made if it is not there."""
    if args.smoke:
        return Path(resolve_path("shipped:quickstart"))
    return make_model(args.model or Path(tempfile.gettempdir()) / args.shape, args.shape)


def make_servers(args: argparse.Namespace, folder: Path, **flags: Any) -> Servers:
    """The server that runs, or one to be started on one GPU (the CPU engine to try things out)."""
    folder.mkdir(parents=True, exist_ok=True)
    if args.url is not None:
        return RunningServers([args.url], connect_timeout_s=300)
    if args.smoke:
        return EmbeddedServers(max_running_requests=512)
    return SGLangServers(
        1,
        devices=[args.serve_device],
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
    import transformers

    return {
        "gpus": listed,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def versions_of(urls: Sequence[str]) -> dict[str, str]:
    """What serves there."""
    found = {}
    for url in urls:
        with urllib.request.urlopen(f"{url}/server_info", timeout=30) as reply:
            found[url] = str(json.load(reply).get("version"))
    return found


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Keeps what is known so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report), flush=True)
