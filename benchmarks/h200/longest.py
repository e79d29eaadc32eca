"""The longest response that trains on one GPU, and on two that compute each sequence together.

Each length is a run of `benchmarks.h200.step`: two sequences in micro-batches of their own, 128
tokens of a prompt and the rest a response, blocks recomputed in the backward pass, the head in
chunks. Lengths double from `--begin` until one fails, then the gap is halved `--halvings` times.
With `offloaded` parameters and optimizer state are in host memory. What is reported of a length is
what `step` says of it, and of one that failed its error, so that another reason than memory shows.

    python -m benchmarks.h200.longest --out longest.json                       # on two GPUs
    python -m benchmarks.h200.longest --gpus 1 --shapes Qwen3-4B --out longest.json
    python -m benchmarks.h200.longest --smoke --out longest.json               # small, on this CPU
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.h200.serving import hardware, write_report
from benchmarks.h200.step import PROMPT_TOKENS

STEPS = 4
STRATEGY = ["--trainer.strategy", "lightning_grpo.FSDP2Strategy"]
WAYS = {"in memory": "false", "offloaded": "true"}


def trains(shape: str, tokens: int, gpus: int, offload: str, args: argparse.Namespace) -> Any:
    """What a few steps on sequences of so many tokens took, or their error."""
    out = args.out.absolute().with_name(f"{args.out.stem}_step.json")
    more = ["--trainer.devices", str(gpus), *STRATEGY]
    more += ["--trainer.strategy.sequence_parallel_size", str(gpus)]
    more += ["--trainer.strategy.cpu_offload", offload]
    words = [sys.executable, "-m", "benchmarks.h200.step", "--only", "long, checkpointed"]
    words += ["--shape", shape, "--tokens", str(tokens), "--steps", str(STEPS), "--out", str(out)]
    words += ["--smoke"] if args.smoke else []
    subprocess.run([*words, "--", *more], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())["variants"]["long, checkpointed"]


def longest(shape: str, gpus: int, offload: str, args: argparse.Namespace) -> dict[str, Any]:
    """The longest length that trained, and all that were tried."""
    tried: dict[int, Any] = {}

    def works(tokens: int) -> bool:
        tried[tokens] = trains(shape, tokens, gpus, offload, args)
        print(shape, gpus, tokens, json.dumps(tried[tokens])[:200], flush=True)
        return "error" not in tried[tokens]

    best, tokens = 0, args.begin
    while tokens <= args.most and works(tokens):
        best, tokens = tokens, 2 * tokens
    step = best // 2 if tokens in tried else 0  # 0: none failed
    for _ in range(args.halvings if step else 0):
        best += step if works(best + step) else 0
        step //= 2
    return {"response": max(0, best - PROMPT_TOKENS), "tried": tried}


def main() -> None:
    """Each shape, on each number of GPUs, in each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["Qwen2.5-1.5B", "Qwen3-4B"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--begin", type=int, default=32768, help="tokens of the first length")
    parser.add_argument("--most", type=int, default=1 << 20, help="tokens of the last")
    parser.add_argument("--halvings", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="small, on this CPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.ways, args.begin, args.most = args.shapes[:1], ["in memory"], 192, 256
    report: dict[str, Any] = {"hardware": hardware(), "longest": {}}
    for shape in args.shapes:
        for gpus in args.gpus:
            for way in args.ways:
                name = f"{shape}, {gpus} GPU{'s' * (gpus > 1)}, {way}"
                report["longest"][name] = longest(shape, gpus, WAYS[way], args)
                write_report(args.out, report)


if __name__ == "__main__":
    main()
