"""A whole asynchronous run on two GPUs, one serving and one training, at `max_staleness` 0, 1, 2.

The workload is fixed here: the Qwen2.5-1.5B shape with random weights in bf16 on the server, fp32
masters and bf16 compute on the trainer; 32 prompts x 8 completions of 512 tokens a step, 12 steps,
the first 4 not counted. A random model never ends by itself, so every completion has 512 tokens;
lengths thus do not vary, which flatters generation. The rule: steps at staleness 1 and 2 reach at
least 95 % of (T_generate + T_train) / max(T_generate, T_train) times the speed at staleness 0, both
taken from the run at staleness 0, where nothing overlaps.

    python -m benchmarks.h200.async_run --out run.json
    python -m benchmarks.h200.async_run --smoke --out run.json
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from benchmarks.h200.serving import hardware, make_model, make_servers, write_report
from lightning_grpo import (
    Evaluation,
    FSDP2Strategy,
    GRPOModule,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
    TokenTIS,
    WeightSync,
)
from lightning_grpo.shipped import resolve_path

STEPS, WARM = 12, 4
BATCH, GROUP, NEW_TOKENS = 32, 8, 512


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
    """One run; medians of its steps."""
    L.seed_everything(0)
    batch, group, tokens = (2, 2, 16) if args.smoke else (BATCH, GROUP, NEW_TOKENS)
    kind = "embedded" if args.smoke else "sglang"
    data = RolloutDataModule(
        prompts=Prompts(str(make_prompts(folder)), column="question"),
        workflow=RLVRWorkflow(reward, Sampling(max_new_tokens=tokens)),
        servers=make_servers(kind, folder, args.serve_device),
        batch_size=batch,
        group_size=group,
        max_staleness=staleness,
        evaluation=Evaluation(),
    )
    module = GRPOModule(
        str(model),
        correction=TokenTIS(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=not args.smoke),
        max_tokens_per_microbatch=16384,
    )
    logger = CSVLogger(folder, name="", version="run")
    trainer = L.Trainer(
        accelerator="cpu" if args.smoke else "gpu",
        devices=1 if args.smoke else [args.train_device],
        strategy="auto" if args.smoke else FSDP2Strategy(),
        max_steps=args.steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        callbacks=[WeightSync(bucket_mb=4096)],
        logger=logger,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/step_s")]
    return summary(rows[args.warm :])


def summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Medians of the steps that count."""
    wanted = (
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
        "health/event_loop_lag_s",
    )
    found: dict[str, Any] = {"steps": len(rows)}
    for name in wanted:
        values = [float(row[name]) for row in rows if row.get(name)]
        if values:
            found[name] = round(statistics.median(values), 8)
    found["steps_s"] = [round(float(row["time/step_s"]), 3) for row in rows]
    return found


def judge(report: dict[str, Any]) -> None:
    """What the rule says."""
    base = report["staleness_0"]
    step, generate = base["time/step_s"], base["time/wait_rollout_s"]
    train = step - generate
    ideal = (generate + train) / max(generate, train)
    report["rule"] = {"t_generate_s": generate, "t_train_s": train, "ideal_speedup": ideal}
    for staleness in (1, 2):
        row = report.get(f"staleness_{staleness}")
        if row is not None:
            speedup = step / row["time/step_s"]
            report["rule"][f"staleness_{staleness}"] = {
                "speedup": round(speedup, 4),
                "share_of_ideal": round(speedup / ideal, 4),
            }


def main() -> None:
    """Run each staleness in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "bench-model")
    parser.add_argument("--serve-device", type=int, default=1)
    parser.add_argument("--train-device", type=int, default=0)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--warm", type=int, default=WARM)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = Path(resolve_path("shipped:quickstart")) if args.smoke else make_model(args.model)
    report: dict[str, Any] = {
        "hardware": hardware(),
        "workload": {"batch": BATCH, "group": GROUP, "new_tokens": NEW_TOKENS, "steps": args.steps},
    }
    for staleness in args.staleness:
        folder = Path(tempfile.mkdtemp())
        report[f"staleness_{staleness}"] = run(model, folder, staleness, args)
        if 0 in args.staleness:
            judge(report)
        write_report(args.out, report)


if __name__ == "__main__":
    main()
