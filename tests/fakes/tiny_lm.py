"""A tiny language model in an ordinary LightningModule, trained micro-batch by micro-batch."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.policy.load import materialize_from_folder
from lightning_grpo.strategies.fsdp2 import gradient_sync

VOCAB = 61


def make_lm(tied: bool = True, seed: int = 0, heads: int = 2) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Policy(nn.Module):
    """The root: everything is used from inside its forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits.float()


def global_batch(step: int) -> torch.Tensor:
    """Eight sequences, the same on every rank."""
    return torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(step))


class Steps:
    """A sized loader of step numbers that remembers where it is."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        while self.position < self.length:
            self.before_fetch(self.position)
            self.position += 1
            yield self.position - 1
        self.position = 0

    def before_fetch(self, step: int) -> None:
        """For a test to override."""

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class TinyModule(L.LightningModule):
    """Next-token loss over the global batch: each rank has its share, in two micro-batches."""

    def __init__(
        self, folder: str | None = None, tied: bool = True, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.folder = folder
        self.tied = tied
        self.checkpointing = checkpointing
        self.policy: Policy | None = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.was_meta = False

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        self.policy = Policy(make_lm(self.tied, seed=3))
        self.was_meta = self.policy.model.get_input_embeddings().weight.is_meta
        if self.checkpointing:
            self.policy.train()
            self.policy.model.gradient_checkpointing_enable()

    def sharding_root(self) -> nn.Module:
        return self.policy

    def on_train_batch_start(self, batch, batch_idx) -> None:
        self.trainer.optimizers[0].zero_grad()

    def optimizer_zero_grad(self, *args, **kwargs) -> None:
        pass

    def training_step(self, batch, batch_idx):
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        batch = global_batch(batch)
        share = batch[rank::world_size].to(self.device)
        micro_batches = share.chunk(2)
        total = torch.zeros(())
        for k, ids in enumerate(micro_batches):
            last = k == len(micro_batches) - 1
            with gradient_sync(self, enabled=last):
                logits = self.policy(ids)[:, :-1]
                summed = F.cross_entropy(
                    logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="sum"
                )
                loss = summed / batch[:, 1:].numel() * world_size
                if not last:
                    self.trainer.strategy.backward(loss, None)
            total += loss.detach().cpu() / world_size
        self.losses.append(float(self.trainer.strategy.reduce(total, reduce_op="sum")))
        return loss

    def on_before_optimizer_step(self, optimizer) -> None:
        total = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
        self.norms.append(float(total.full_tensor() if hasattr(total, "full_tensor") else total))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class MetaModule(TinyModule):
    """Built on the meta device, filled from a folder."""

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        materialize_from_folder(module.model, self.folder, device=device)


def make_trainer(strategy, folder: Path | str, devices: int, **kwargs) -> L.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy,
        "max_steps": 4,
        "gradient_clip_val": 0.5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "use_distributed_sampler": False,
    }
    return L.Trainer(**{**settings, **kwargs})
