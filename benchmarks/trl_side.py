"""The quickstart's task with TRL's GRPOTrainer, timed step by step, for `vs_trl.py`."""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lightning_grpo.rewards import gsm8k
from lightning_grpo.shipped import resolve_path

SAVED_AFTER = (10, 20, 30)


def reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The same reward, in TRL's signature (conversational completions)."""
    return [gsm8k(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]


class Clock(TrainerCallback):
    """Takes the time of each step, saving included in none."""

    def __init__(self, out: Path, tokenizer: Any) -> None:
        self.out, self.tokenizer = out, tokenizer
        self.ends: list[float] = []
        self.models: dict[int, str] = {}
        self.saving_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more step."""
        now = time.perf_counter()
        self.ends.append(now - self.saving_s)
        if state.global_step in SAVED_AFTER:
            folder = self.out / f"model-{state.global_step}"
            kwargs["model"].save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.models[state.global_step] = str(folder)
            self.saving_s += time.perf_counter() - now


def main() -> None:
    """Train and write `result.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = resolve_path("shipped:quickstart")
    tokenizer = AutoTokenizer.from_pretrained(model)
    clock = Clock(args.out, tokenizer)
    rows = load_dataset(
        "json", data_files=resolve_path("shipped:quickstart/train.jsonl"), split="train"
    )
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
    config = GRPOConfig(
        output_dir=str(args.out / "trl"),
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=56,
        max_steps=args.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        seed=args.seed,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    (args.out / "result.json").write_text(
        json.dumps(
            {
                "step_seconds": seconds,
                "samples_per_step": 128,
                "models": clock.models,
                "phases": {"step_time_s": sum(seconds)},
                "rewards": [entry["reward"] for entry in history],
                "trl": version("trl"),
            }
        )
    )


if __name__ == "__main__":
    main()
