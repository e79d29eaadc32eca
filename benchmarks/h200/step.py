"""The training step that a user gets: `lightning-grpo replay` on made-up trajectories, no server.

The Qwen2.5-1.5B shape with random weights, 64 sequences a step in groups of 8 that share a prompt
of 128 tokens, log-normal lengths of 600 tokens on average (about 40k tokens a step). A variant is
a set of options of the command line; each is run alone, `--steps` steps. `share` is the median of
`throughput/mfu` after the third step: model FLOPs of the whole step over the matrix peak, which is
measured in the same process.

The rule: at least 0.60 at 45 GiB or less.

With `--tokens` every sequence has exactly so many, four a step (two above 32k), one in each
micro-batch: the shapes that prime-rl publishes (`BENCHMARKS.md` of 2026-02, one H100, fake data, of
the nominal 989 TFLOP/s): Qwen3-0.6B 11.1 % and 11.9k tokens/s at 16k, 26.8 % and 10.2k at 64k;
Qwen3-4B with LoRA of rank 16 21.7 % and 6.2k, 37.4 % and 4.2k.

    python -m benchmarks.h200.step --out step.json
    python -m benchmarks.h200.step --only "compiled, 8k" --out step.json
    python -m benchmarks.h200.step --shape Qwen3-0.6B --tokens 65536 --only long --out s.json
    python -m benchmarks.h200.step --shape Qwen3-4B --tokens 16384 --only "long, LoRA" --out s.json
    python -m benchmarks.h200.step --smoke --out step.json
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.h200.main_job import lightning_grpo
from benchmarks.h200.serving import SHAPES, hardware, make_model, write_report
from lightning_grpo.rollout.records import write_groups
from lightning_grpo.shipped import resolve_path
from lightning_grpo.types import NO_VERSION, Group, Prompt, RouterShape, Routes, Trajectory

GROUPS, GROUP, PROMPT_TOKENS, MEAN_TOKENS, SIGMA, LONGEST = 8, 8, 128, 600, 0.6, 2048
WARM = 3
LONG = 32768
COLUMNS = {
    "share": "throughput/mfu",
    "peak_gib": "health/gpu_peak_gb",
    "forward_backward_s": "time/forward_backward_s",
    "optimizer_s": "time/optimizer_s",
    "wait_s": "time/wait_rollout_s",
    "tokens_per_s": "throughput/tokens_per_s",
}
TOKENS = "--model.max_tokens_per_microbatch"
COMPILED = ["--model.compile", "true"]
# As on several ranks: block by block, with FSDP's own hooks.
SHARDED = ["--trainer.strategy", "lightning_grpo.FSDP2Strategy"]
SHARDED += ["--trainer.strategy.reshard_after_forward", "false"]
CHECKPOINTED = ["--model.gradient_checkpointing", "true"]
ADAPTER = ["--model.lora.rank", "16"]
REPLAYED = ["--model.router_replay", "true"]
VARIANTS: dict[str, list[str]] = {
    "eager, 8k": [TOKENS, "8192"],
    "compiled, 8k": [TOKENS, "8192", *COMPILED],
    "compiled, 8k, sharded": [TOKENS, "8192", *COMPILED, *SHARDED],
    "compiled, 10k": [TOKENS, "10240", *COMPILED],
    "compiled, 12k": [TOKENS, "12288", *COMPILED],
    "compiled, 16k": [TOKENS, "16384", *COMPILED],
    "eager, 16k": [TOKENS, "16384"],
    "eager, 8k, routes replayed": [TOKENS, "8192", *REPLAYED],
    "compiled, 8k, routes replayed": [TOKENS, "8192", *COMPILED, *REPLAYED],
    "long": [*COMPILED],
    "long, checkpointed": [*COMPILED, *CHECKPOINTED],
    "long, LoRA": [*COMPILED, *ADAPTER],
    "long, LoRA, checkpointed": [*COMPILED, *ADAPTER, *CHECKPOINTED],
}


@dataclass(frozen=True)
class Load:
    """What a step trains on: groups, their sequences, tokens of each (None: drawn), and routers."""

    groups: int = GROUPS
    group: int = GROUP
    mean: int = MEAN_TOKENS
    tokens: int | None = None
    routers: RouterShape | None = None


def length(draw: random.Random, load: Load) -> int:
    """Of one sequence, prompt included."""
    if load.tokens is not None:
        return load.tokens
    drawn = draw.lognormvariate(0.0, SIGMA) * load.mean / 2.718281828 ** (SIGMA**2 / 2)
    return int(min(max(drawn, PROMPT_TOKENS + 16), LONGEST))


def routes(draw: random.Random, num_tokens: int, shape: RouterShape) -> Routes:
    """Experts of no server: some other ones for each token and layer, all as often as another."""
    assert shape.width == 1
    rows = bytearray()
    for _ in range(num_tokens * shape.layers):
        first = draw.randrange(shape.experts)
        rows += bytes((first + k) % shape.experts for k in range(shape.top_k))
    return Routes(bytes(rows), shape)


def made_up(draw: random.Random, row: int, version: int, vocab: int, load: Load) -> Group:
    """A group of random tokens with random rewards."""
    ids = tuple(draw.randrange(5, vocab) for _ in range(PROMPT_TOKENS))
    trajectories = []
    for i in range(load.group):
        new = length(draw, load) - PROMPT_TOKENS
        mask = (False,) * PROMPT_TOKENS + (True,) * new
        reward = float(i % 2)
        trajectories.append(
            Trajectory(
                input_ids=(*ids, *(draw.randrange(5, vocab) for _ in range(new))),
                response_mask=mask,
                logprobs=tuple(-12.0 if m else 0.0 for m in mask),
                versions=tuple(version if m else NO_VERSION for m in mask),
                reward=reward,
                rewards={"score": reward},
                text="...",
                truncated=False,
                temperature=1.0,
                routes=None if load.routers is None else routes(draw, len(mask) - 1, load.routers),
            )
        )
    prompt = Prompt(ids, f"prompt {row}", row=row)
    return Group(prompt, tuple(trajectories), admitted_version=version)


def record(folder: Path, steps: int, vocab: int, load: Load) -> None:
    """As many rollout batches as steps."""
    draw = random.Random(0)
    for step in range(steps):
        made = [made_up(draw, row, step, vocab, load) for row in range(load.groups)]
        write_groups(folder / f"step_{step:06d}.parquet", made, step=step, version=step)


def measured(folder: Path) -> dict[str, Any]:
    """Medians after the first steps, and what all steps took."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("time/step_s")]
    seconds = [float(row["time/step_s"]) for row in rows]
    found: dict[str, Any] = {
        "step_s": round(statistics.median(seconds[WARM:]), 4),
        "all_steps_s": [round(each, 3) for each in seconds],
    }
    for name, column in COLUMNS.items():
        values = [float(row[column]) for row in rows[WARM:] if row.get(column)]
        if values:
            found[name] = round(statistics.median(values), 4)
    return found


def callbacks(profiling: bool, out: Path) -> str:
    """None of the shipped config's; those that profile, if that is asked."""
    outs = {"ProfileStep": out, "IdleGPU": out.with_name(f"{out.stem}_idle.json")}
    made = [
        {"class_path": f"benchmarks.h200.profiling.{name}", "init_args": {"out": str(to)}}
        for name, to in outs.items()
    ]
    return json.dumps(made if profiling else [])


def prepared(args: argparse.Namespace) -> tuple[Path, Any, Load]:
    """The model, its config, and what a step trains on; adds to the options of replay."""
    load = Load(mean=args.mean)
    if args.tokens:
        load = Load(1 if args.tokens > LONG else 2, 2, tokens=args.tokens)
    if args.smoke:
        model = args.model or Path(resolve_path("shipped:quickstart"))
        args.steps = 8
        args.more += ["--trainer.accelerator", "cpu", "--model.optimizer.init_args.fused", "false"]
    else:
        model = make_model(args.model or Path(tempfile.gettempdir()) / args.shape, args.shape)
    if args.tokens:
        args.more += [TOKENS, str(args.tokens)]
    config = AutoConfig.from_pretrained(model)
    if getattr(config, "num_experts", 0):
        layers, top_k = config.num_hidden_layers, config.num_experts_per_tok
        load = replace(load, routers=RouterShape(layers, top_k, config.num_experts))
    return model, config, load


def main() -> None:
    """Each variant in turn; one that fails says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="where the model is, or is to be made")
    parser.add_argument("--shape", default="Qwen2.5-1.5B", choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mean", type=int, default=MEAN_TOKENS, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, help="of each sequence")
    parser.add_argument("--profile", action="store_true", help="the seventh and on, beside --out")
    parser.add_argument("--smoke", action="store_true", help="small, on this CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("more", nargs="*", help="further options of replay, after --")
    args = parser.parse_args()
    model, config, load = prepared(args)
    work = Path(tempfile.mkdtemp())
    record(work / "recorded", args.steps, config.vocab_size, load)
    report: dict[str, Any] = {"hardware": hardware(), "variants": {}}
    for name in args.only:
        folder = work / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        words = ["replay", "--from", str(work / "recorded"), "--config", "gsm8k.yaml"]
        words += ["--model.model", str(model), "--trainer.default_root_dir", str(folder)]
        words += ["--trainer.max_steps", str(args.steps), "--trainer.devices", "1"]
        profiled = args.out.absolute().with_name(f"{args.out.stem}_{folder.name}.json")
        words += ["--trainer.callbacks", callbacks(args.profile, profiled)]
        words += ["--trainer.enable_checkpointing", "false", *VARIANTS[name], *args.more]
        screen, began = profiled.with_suffix(".log"), time.monotonic()
        with screen.open("w") as lines:  # there also where this program is ended meanwhile
            done = subprocess.run(
                lightning_grpo(folder, *words), cwd=folder, stdout=lines, stderr=lines, check=False
            )
        row = {"seconds": round(time.monotonic() - began, 1)}
        said = screen.read_text()[-1500:]
        row |= measured(folder) if done.returncode == 0 else {"error": said}
        report["variants"][name] = row
        print(said, name, json.dumps(row), sep="\n", flush=True)
        write_report(args.out, report)


if __name__ == "__main__":
    main()
