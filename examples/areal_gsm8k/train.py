"""AReaL's GSM8K walkthrough as a Lightning program; on this machine's CPU.

    python train.py                    # asynchronous: rollouts run beside the training
    python train.py --synchronous      # each batch is sampled by the newest weights

The comments name the step of AReaL's `examples/math/gsm8k_grpo.py` that a line stands for.
"""

import argparse

import lightning as L
import torch
from gsm8k import gsm8k_reward_fn, process_gsm8k_rl_dataset
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grpo import (
    EmbeddedServers,
    GRPOLoss,
    GRPOModule,
    IcePop,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
)


def gsm8k(split: str, limit: int | None = None) -> Prompts:
    """`get_gsm8k_dataset`: no rank here, rank 0 asks for all of them."""
    return Prompts(
        f"shipped:quickstart/{split}.jsonl",  # on GPUs: "openai/gsm8k", "main", split
        column="messages",
        transform=process_gsm8k_rl_dataset,
        limit=limit,
    )


def main(steps: int, synchronous: bool, held_out: int) -> None:
    """Train, evaluate on the way, and export the policy to `model`."""
    torch.set_num_threads(1)  # the engine computes beside us
    L.seed_everything(1)
    # Dataset, RLVRWorkflow, RemoteSGLangEngine and what keeps rollouts within their staleness.
    data = RolloutDataModule(
        prompts=gsm8k("train"),
        val_prompts=gsm8k("test", held_out),
        workflow=RLVRWorkflow(gsm8k_reward_fn, Sampling(max_new_tokens=56)),
        servers=EmbeddedServers(),  # on GPUs: SGLangServers()
        batch_size=16,  # train_dataset.batch_size: prompts
        group_size=8,  # gconfig.n_samples
        max_staleness=0 if synchronous else 2,  # rollout.max_head_offpolicyness
    )
    # FSDPPPOActor: compute_logp, compute_advantages and ppo_update.
    module = GRPOModule(
        "shipped:quickstart",
        loss=GRPOLoss(clip_low=0.4, clip_high=0.4),  # actor.eps_clip
        correction=IcePop(low=0.0, high=5.0),  # use_decoupled_loss, rejection_sampling
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95)),
    )
    # The loop itself: prepare_batch or rollout_batch, the step, update_weights, save, evaluate.
    trainer = L.Trainer(
        accelerator="cpu",  # on GPUs: strategy=FSDP2Strategy()
        max_steps=steps,
        val_check_interval=max(1, steps // 3),  # evaluator.freq_steps
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        callbacks=[ModelCheckpoint(monitor="eval/avg_at_1", mode="max", save_last="link")],
    )
    trainer.fit(module, data)  # rollout.pause() ... rollout.resume() around each update: WeightSync
    module.export("model")  # saver


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--held-out", type=int, default=200, help="prompts")
    options = parser.parse_args()
    main(options.steps, options.synchronous, options.held_out)
