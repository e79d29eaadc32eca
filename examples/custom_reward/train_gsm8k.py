"""The program of the front page: GSM8K on GPUs, with SGLang. The reward stands in the script."""

import lightning as L
import torch

from lightning_grpo import (
    FSDP2Strategy,
    GRPOModule,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
    SGLangServers,
)


def reward(completion: str, answer: str) -> float:
    return float(completion.partition("####")[2].strip() == answer.partition("####")[2].strip())


gsm8k = Prompts("openai/gsm8k", "main", column="question", suffix="\nEnd with #### and the answer.")
data = RolloutDataModule(
    prompts=gsm8k,
    workflow=RLVRWorkflow(reward, Sampling(max_new_tokens=1024)),
    servers=SGLangServers(),
    batch_size=256,
    group_size=4,
    max_staleness=2,
)
module = GRPOModule(
    "Qwen/Qwen2.5-1.5B-Instruct", optimizer=lambda params: torch.optim.AdamW(params, lr=1.7e-5)
)
trainer = L.Trainer(strategy=FSDP2Strategy(), max_steps=290, gradient_clip_val=1.0)
trainer.fit(module, data)
