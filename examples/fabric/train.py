"""The quickstart as a plain loop with Lightning Fabric: the same parts, no Trainer.

    python train.py --steps 30

What `Trainer`, `GRPOModule` and the callbacks do for you stands here line by line. One process.
"""

import argparse

import lightning as L
import torch

from lightning_grpo import (
    EmbeddedServers,
    GroupAdvantage,
    GRPOLoss,
    Objective,
    PackedPolicy,
    Prompts,
    RLVRWorkflow,
    RolloutBatch,
    RolloutDataModule,
    Sampling,
    load_policy,
    load_tokenizer,
)
from lightning_grpo.algorithm.metrics import Metrics, merge, values
from lightning_grpo.loader import Minibatch, Prepared
from lightning_grpo.policy.load import export_policy
from lightning_grpo.rewards import gsm8k
from lightning_grpo.shipped import resolve_path
from lightning_grpo.validation import EvaluationMeans

MODEL = resolve_path("shipped:quickstart")
ADVANTAGE = GroupAdvantage()
OBJECTIVE = Objective(GRPOLoss())


def make_data(num_held_out: int) -> RolloutDataModule:
    """What `data:` is in quickstart.yaml."""
    return RolloutDataModule(
        prompts=Prompts("shipped:quickstart/train.jsonl", column="question"),
        val_prompts=Prompts("shipped:quickstart/test.jsonl", column="question", limit=num_held_out),
        workflow=RLVRWorkflow(gsm8k, Sampling(max_new_tokens=56)),
        servers=EmbeddedServers(),
        batch_size=16,
        group_size=8,
        max_staleness=1,
    )


def prepare(batch: RolloutBatch) -> Prepared:
    """Advantages of a whole rollout batch, and which trajectories have a gradient."""
    advantages = ADVANTAGE(batch.rewards, batch.group_ids)
    return Prepared(advantages, advantages != 0)


def train_on(
    fabric: L.Fabric, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Minibatch
) -> dict[str, float]:
    """One optimizer step: every packed micro-batch forward and backward, then the step."""
    if batch.is_first:
        OBJECTIVE.anchor(policy, batch.rollout, steps=1, device=fabric.device)
    metrics: Metrics = {}
    optimizer.zero_grad()
    for k in range(batch.num_micro_batches):
        loss, more = OBJECTIVE.micro_batch_loss(policy, batch, k, fabric.device)
        fabric.backward(loss)
        metrics = merge(metrics, more)
    fabric.clip_gradients(policy, optimizer, max_norm=1.0)
    optimizer.step()
    return {**batch.rollout.metrics, **values(metrics)}


def held_out(data: RolloutDataModule, step: int) -> dict[str, float]:
    """Every held-out prompt, sampled and greedy; the servers must have the newest weights."""
    means = EvaluationMeans(data.evaluation)
    for loader in data.val_dataloader():
        for batch in loader:
            means.update(batch)
    return means.record(step).metrics


def main(num_steps: int, num_held_out: int, out: str | None) -> dict[str, float]:
    """Train; the held-out scores after it."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    torch.set_num_threads(1)  # the engine computes beside us
    policy = PackedPolicy(load_policy(MODEL))
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    policy, optimizer = fabric.setup(policy, optimizer)
    data = make_data(num_held_out)
    try:
        data.start(MODEL, run_dir="runs/fabric")
        data.publish(policy, trained=False)  # rollouts begin here
        print("held-out before", held_out(data, 0))
        for step, batch in enumerate(data.batches(prepare), start=1):
            logged = train_on(fabric, policy, optimizer, batch)
            if batch.is_last:
                data.publish(policy)
            print(f"step {step}: reward {logged['reward/mean']:.3f}", flush=True)
            if step == num_steps:
                break
        scores = held_out(data, num_steps)
        print("held-out after", scores)
    finally:
        data.close()
    if out is not None:
        export_policy(policy.module.model, load_tokenizer(MODEL), out)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=200, help="prompts")
    parser.add_argument("--out", help="folder to export the policy to")
    options = parser.parse_args()
    main(options.steps, options.held_out, options.out)
