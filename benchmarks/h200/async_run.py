"""A whole asynchronous run on two GPUs, one serving and one training, at `max_staleness` 0, 1, 2.

The workload is fixed here: the Qwen2.5-1.5B shape with random weights in bf16 on the server, fp32
masters and bf16 compute on the trainer; 32 prompts x 8 completions of 512 tokens a step. A random
model hardly ever ends by itself, so nearly every completion has 512 tokens; lengths thus do not
vary, which flatters generation. Steps that count: 5, after 2 that warm up; at the end of a run
nothing new is sampled any more, which makes its last steps quick, so as many steps as the staleness
follow that do not count.

The rule: steps at staleness 1 and 2 reach at least 95 % of (T_generate + T_train) /
max(T_generate, T_train) times the speed at staleness 0, both times from the run at staleness 0,
where nothing overlaps; speed is by the mean of the steps that count.

    python -m benchmarks.h200.async_run --serve-device 1 --out run.json
    python -m benchmarks.h200.async_run --shared --out run.json     # server and trainer on one GPU
    python -m benchmarks.h200.async_run --shared --release --staleness 0 --out run.json
    python -m benchmarks.h200.async_run --smoke --out run.json
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from benchmarks.h200.serving import (
    hardware,
    make_servers,
    model_of,
    parse_arguments,
    versions_of,
    write_report,
)
from lightning_grpo import (
    FSDP2Strategy,
    GRPOModule,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
    TokenTIS,
    WeightSync,
)
from lightning_grpo.weights.process_group import IPCTransport

WARM, COUNTED = 2, 5
BATCH, GROUP, NEW_TOKENS = 32, 8, 512
WANTED = (
    "time/step_s",
    "time/wait_rollout_s",
    "time/forward_backward_s",
    "time/optimizer_s",
    "time/weight_sync_s",
    "time/servers_paused_s",
    "idle/trainer_fraction",
    "idle/server_fraction",
    "mismatch/probe",
    "mismatch/abs_logprob_diff",
    "staleness/mean",
    "throughput/tokens_per_s",
    "rollout/tokens_per_s",
    "health/event_loop_lag_s",
)


def reward(completion_ids: list[int]) -> float:
    """A coin: groups need variance, and nothing is to be learnt."""
    return float(sum(completion_ids) % 2)


def make_prompts(folder: Path, count: int = 2000) -> Path:
    """Questions of about 128 tokens of the quickstart's tokenizer."""
    text = "Tom has 3 apples and buys 4 more apples. How many apples does Tom have now? "
    rows = [{"question": f"{i}. {text * 5}"} for i in range(count)]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(model: Path, folder: Path, staleness: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run; what its steps took."""
    L.seed_everything(0)
    batch, group, tokens = (2, 2, 16) if args.smoke else (BATCH, GROUP, NEW_TOKENS)
    data = RolloutDataModule(
        prompts=Prompts(str(make_prompts(folder)), column="question"),
        workflow=RLVRWorkflow(reward, Sampling(max_new_tokens=tokens)),
        servers=make_servers(args, folder),
        batch_size=batch,
        group_size=group,
        max_staleness=staleness,
    )
    module = GRPOModule(
        str(model),
        correction=TokenTIS(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=not args.smoke),
        max_tokens_per_microbatch=args.max_tokens,
    )
    logger = CSVLogger(folder, name="", version="run")
    trainer = L.Trainer(
        accelerator="cpu" if args.smoke else "gpu",
        devices=1 if args.smoke else [args.train_device],
        strategy="auto" if args.smoke else FSDP2Strategy(),
        max_steps=WARM + COUNTED + staleness,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        callbacks=[
            WeightSync(IPCTransport() if args.shared else None, release_memory=args.release)
        ],
        logger=logger,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/step_s")]
    found = summary(rows[WARM : WARM + COUNTED])
    if not args.smoke:
        found["trainer_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        torch.cuda.reset_peak_memory_stats()
    return found | {"every_step": [numbers(row) for row in rows]}


def numbers(row: dict[str, str]) -> dict[str, float]:
    """What is wanted of one step."""
    return {name: round(float(row[name]), 6) for name in WANTED if row.get(name)}


def summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Of the steps that count: medians, and the mean that the speed is judged by."""
    steps = [numbers(row) for row in rows]
    found: dict[str, Any] = {"steps": len(steps)}
    found["mean_step_s"] = round(statistics.mean(step["time/step_s"] for step in steps), 6)
    found["mean_wait_s"] = round(statistics.mean(step["time/wait_rollout_s"] for step in steps), 6)
    for name in WANTED:
        values = [step[name] for step in steps if name in step]
        if values:
            found[name] = statistics.median(values)
    return found


def judge(report: dict[str, Any]) -> None:
    """What the rule says."""
    base = report["staleness_0"]
    if "error" in base:
        return
    step, generate = base["mean_step_s"], base["mean_wait_s"]
    train = step - generate
    ideal = step / max(generate, train)
    report["rule"] = {"t_generate_s": generate, "t_train_s": train, "ideal_speedup": ideal}
    for staleness in (1, 2):
        row = report.get(f"staleness_{staleness}", {})
        if "mean_step_s" in row:
            speedup = step / row["mean_step_s"]
            report["rule"][f"staleness_{staleness}"] = {
                "speedup": round(speedup, 4),
                "share_of_ideal": round(speedup / ideal, 4),
            }


def main() -> None:
    """Run each staleness in turn; one that fails says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", action="store_true", help="server and trainer on one GPU")
    parser.add_argument("--release", action="store_true", help="servers' memory, while training")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-tokens", type=int, default=16384)
    args = parse_arguments(parser)
    warnings.simplefilter("ignore")
    model = model_of(args)
    report: dict[str, Any] = {
        "hardware": hardware(),
        "workload": {"batch": BATCH, "group": GROUP, "new_tokens": NEW_TOKENS},
        "shared": args.shared,
        "release_memory": args.release,
        "max_tokens_per_microbatch": args.max_tokens,
    }
    if args.url:
        report["sglang"] = versions_of([args.url])
    for staleness in args.staleness:
        folder = Path(tempfile.mkdtemp())
        try:
            found = run(model, folder, staleness, args)
        except Exception:  # noqa: BLE001 - one run's failure is a result
            found = {"error": traceback.format_exc()}
        gc.collect()
        if not args.smoke:
            torch.cuda.empty_cache()
        report[f"staleness_{staleness}"] = found
        if "staleness_0" in report:
            judge(report)
        write_report(args.out, report)


if __name__ == "__main__":
    main()
