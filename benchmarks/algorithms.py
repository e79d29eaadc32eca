"""The quickstart with each algorithm: held-out accuracy after 30 steps, several seeds, as a table.

python benchmarks/algorithms.py --seeds 3 --out benchmarks/results/algorithms.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_grpo import (
    CISPOLoss,
    ConstantLength,
    EmbeddedServers,
    GroupAdvantage,
    GRPOLoss,
    GRPOModule,
    GSPOLoss,
    LeaveOneOutAdvantage,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
    SAPOLoss,
    SequenceMean,
    TokenTIS,
    Truncation,
)
from lightning_grpo.rewards import gsm8k
from lightning_grpo.rollout import has_variance

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
MAX_NEW_TOKENS = 56

STALE = {"loss": GRPOLoss(), "correction": TokenTIS()}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "GRPO": {"module": {"loss": GRPOLoss(clip_high=0.2, aggregation=SequenceMean())}},
    "Dr.GRPO": {
        "module": {
            "loss": GRPOLoss(clip_high=0.2, aggregation=ConstantLength(MAX_NEW_TOKENS)),
            "advantage": GroupAdvantage(divide_by_std=False),
        }
    },
    "DAPO": {
        "module": {"loss": GRPOLoss(), "truncation": Truncation("mask", penalty_buffer=12)},
        "data": {"keep_group": has_variance},
    },
    # A step at this rate moves a sequence's mean ratio by 5e-3: ten times the published bounds.
    "GSPO": {"module": {"loss": GSPOLoss(clip_low=0.03, clip_high=0.04)}},
    "GSPO, published bounds": {"module": {"loss": GSPOLoss()}},
    "CISPO": {"module": {"loss": CISPOLoss()}},
    "SAPO": {"module": {"loss": SAPOLoss()}},
    "RLOO": {"module": {"loss": GRPOLoss(), "advantage": LeaveOneOutAdvantage()}},
    "decoupled PPO, staleness 2": {"module": STALE, "data": {"max_staleness": 2}},
    "decoupled PPO, staleness 4": {"module": STALE, "data": {"max_staleness": 4}},
}
"""What differs from quickstart.yaml, whose optimizer, batch and staleness of 1 are everyone's."""


def train(name: str, seed: int, steps: int, out: Path) -> None:
    """One run; writes the model to `out/model` and its rewards to `out/rewards.json`."""
    settings = ALGORITHMS[name]
    torch.set_num_threads(1)
    L.seed_everything(seed)
    rewards: list[float] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            rewards.append(float(trainer.callback_metrics["reward/mean"]))

    data = RolloutDataModule(
        prompts=Prompts("shipped:quickstart/train.jsonl", column="question", seed=seed),
        workflow=RLVRWorkflow(gsm8k, Sampling(max_new_tokens=MAX_NEW_TOKENS)),
        servers=EmbeddedServers(max_running_requests=128),
        **settings.get("data", {}),
    )
    module = GRPOModule(
        "shipped:quickstart",
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0),
        **settings["module"],
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=out,
        callbacks=[Record()],
    )
    trainer.fit(module, data)
    module.export(out / "model")
    (out / "rewards.json").write_text(json.dumps(rewards))


def run_one(name: str, seed: int, steps: int, out: Path) -> tuple[float, list[float]]:
    """Held-out accuracy after, and the rewards of, one run in a process of its own."""
    from benchmarks.held_out import accuracy

    out.mkdir(parents=True)
    command = [sys.executable, __file__, "--steps", str(steps), "--one", name, str(seed), str(out)]
    with (out / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if code.returncode:
        raise SystemExit(f"{name}, seed {seed}, failed: {(out / 'log').read_text()[-2000:]}")
    return accuracy(out / "model"), json.loads((out / "rewards.json").read_text())


def about() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "lightning")},
    }


def compact(report: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    """Run every algorithm and seed, print the table; a report's other rows stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--out", type=Path, default=Path("algorithms.json"))
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SEED", "FOLDER"), help="internal")
    args = parser.parse_args()
    if args.one:
        train(args.one[0], int(args.one[1]), args.steps, Path(args.one[2]))
        return
    from benchmarks.held_out import accuracy

    report = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    report |= about() | {"steps": args.steps}
    report.setdefault("base", accuracy(REPOSITORY / "examples/quickstart/model"))
    work = Path(tempfile.mkdtemp(prefix="algorithms_"))
    for name in args.only:
        row = report["rows"][name] = {"held_out": [], "rewards": []}
        for seed in range(args.seeds):
            held_out, rewards = run_one(name, seed, args.steps, work / f"{name} {seed}")
            row["held_out"].append(held_out)
            row["rewards"].append([round(reward, 4) for reward in rewards])
        shown = "  ".join(f"{a:.3f}" for a in row["held_out"])
        print(f"{name:28s} {shown}", flush=True)
        args.out.write_text(compact(report))


if __name__ == "__main__":
    main()
