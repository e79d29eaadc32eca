"""The program of the front page on this machine's CPU. Change the reward and run it."""

import lightning as L
import torch

from lightning_grpo import (
    EmbeddedServers,
    GRPOModule,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
)

torch.set_num_threads(1)  # the engine computes beside us


def reward(completion: str, answer: str) -> float:
    return float(completion.partition("####")[2].strip() == answer.partition("####")[2].strip())


data = RolloutDataModule(
    prompts=Prompts("shipped:quickstart/train.jsonl", column="question"),
    val_prompts=Prompts("shipped:quickstart/test.jsonl", column="question", limit=200),
    workflow=RLVRWorkflow(reward, Sampling(max_new_tokens=56)),
    servers=EmbeddedServers(),
    batch_size=16,
    group_size=8,
    max_staleness=1,
)
module = GRPOModule(
    "shipped:quickstart", optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4)
)
trainer = L.Trainer(
    accelerator="cpu",
    max_steps=20,
    val_check_interval=10,
    gradient_clip_val=1.0,
    log_every_n_steps=1,
)
trainer.fit(module, data)
