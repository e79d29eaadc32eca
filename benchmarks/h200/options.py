"""A few steps with each option that needs a GPU, on the real server: that it works, and its memory.

Four steps of 8 prompts x 8 completions of 256 tokens on the Qwen2.5-1.5B shape with random weights;
the weights go to the server after each, and a probe must agree. `probe_change` is how far the last
step moved the trainer's logprobs: well above `probe`, or agreeing would mean little.

    python -m benchmarks.h200.options --serve-device 1 --out options.json
    python -m benchmarks.h200.options --smoke --out options.json
"""

from __future__ import annotations

import argparse
import csv
import gc
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from benchmarks.h200.async_run import make_prompts, numbers, reward
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
    KLPenalty,
    LoRA,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
)

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": LoRA()},
    "lora_fast": {"lora": LoRA()},
    "reference": {"kl": KLPenalty(0.01)},
    "reference_offloaded": {"kl": KLPenalty(0.01, offload=True)},
    "cpu_offload": {},
}
LEARNING_RATES = {"lora": 1e-4, "lora_fast": 1e-3}


def run(case: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One short run."""
    L.seed_everything(0)
    folder = Path(tempfile.mkdtemp())
    batch, group, tokens = (2, 2, 16) if args.smoke else (8, 8, 256)
    data = RolloutDataModule(
        prompts=Prompts(str(make_prompts(folder)), column="question"),
        workflow=RLVRWorkflow(reward, Sampling(max_new_tokens=tokens)),
        servers=make_servers(args, folder),
        batch_size=batch,
        group_size=group,
        max_staleness=0,
    )
    rate = LEARNING_RATES.get(case, 1e-5)
    module = GRPOModule(
        str(model),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, fused=True),
        **CASES[case],
    )
    logger = CSVLogger(folder, name="", version="run")
    offloads = case == "cpu_offload" and not args.smoke
    trainer = L.Trainer(
        accelerator="cpu" if args.smoke else "gpu",
        devices=1 if args.smoke else [args.train_device],
        strategy=FSDP2Strategy(cpu_offload=offloads),
        max_steps=STEPS,
        log_every_n_steps=1,
        enable_checkpointing=False,
        logger=logger,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        steps = [numbers(row) for row in csv.DictReader(file) if row.get("time/step_s")]
    report = data.session.report
    assert report is not None
    found: dict[str, Any] = {"probe": report.probe_diff, "probe_change": report.probe_change}
    if not args.smoke:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(args.train_device) / 2**30, 1)
    return found | {"every_step": steps}


def main() -> None:
    """Each case in turn; one that fails says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parse_arguments(parser)
    warnings.simplefilter("ignore")
    model = model_of(args)
    report: dict[str, Any] = {"hardware": hardware()}
    if args.url:
        report["sglang"] = versions_of([args.url])
    for case in args.cases:
        try:
            found = run(case, model, args)
        except Exception:  # noqa: BLE001 - one case's failure is a result
            found = {"error": traceback.format_exc()}
        report[case] = found
        write_report(args.out, report)
        gc.collect()
        if not args.smoke:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(args.train_device)


if __name__ == "__main__":
    main()
