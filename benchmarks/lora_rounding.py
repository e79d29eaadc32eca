"""What becomes of a LoRA adapter's update in bf16: at the trainer, and merged at a server.

A random model of Qwen2.5-1.5B's width and few layers, as a checkpoint in bf16, is trained with an
adapter on random sequences with random advantages (in fp32). After some of the steps its logprobs
are computed in bf16 as a trainer does, beside the adapter, and as a server does, with merged
weights: once with PEFT's layer and weights rounded to the nearest, once with the package's own
layer and rounding. The yardstick is the same model in fp32.

    python benchmarks/lora_rounding.py --out benchmarks/results/lora_rounding.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from lightning_grpo import LoRA
from lightning_grpo.policy.adapted import AdaptedLinear
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.weights.gather import gather_weights

SEQUENCES, TOKENS, VOCABULARY = 8, 64, 4096
MEASURED_AFTER = (1, 2, 3, 5, 8, 12)
WAYS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "peft, rounded to the nearest": (Linear.forward, True),
    "ours, rounded by chance": (AdaptedLinear.forward, False),
}


def make_model(layers: int) -> Qwen2ForCausalLM:
    """Random weights that bf16 can hold."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).bfloat16().float().eval()


class Case:
    """One policy with its adapter, computed in several ways."""

    def __init__(self, layers: int) -> None:
        model = make_model(layers)
        LoRA().add_to(model)
        self.policy = PackedPolicy(model)
        self.ids = torch.randint(0, 400, (SEQUENCES * TOKENS,))
        self.bounds = torch.arange(SEQUENCES + 1) * TOKENS
        self.adapted = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
        self.server = make_model(layers)
        self.serving = PackedPolicy(self.server.bfloat16())

    def logprobs(self) -> Tensor:
        """In fp32, with gradient."""
        return self.policy(self.ids, self.bounds)[0]

    @torch.no_grad()
    def as_trainer(self, forward: Callable[..., Tensor]) -> Tensor:
        """In bf16, from fp32 weights, as FSDP2Strategy computes."""
        masters = {p: p.data for p in self.policy.parameters()}
        for p, master in masters.items():
            p.data = master.bfloat16()
        for layer in self.adapted:
            layer.forward = forward.__get__(layer)
        found = self.logprobs()
        for layer in self.adapted:
            del layer.forward
        for p, master in masters.items():
            p.data = master
        return found

    @torch.no_grad()
    def as_server(self, to_the_nearest: bool) -> Tensor:
        """In bf16, from merged weights."""
        dtype = None if to_the_nearest else torch.bfloat16
        sent = gather_weights(self.policy, dtype)
        self.server.load_state_dict(sent, strict=False)  # the head is tied
        return self.serving(self.ids, self.bounds)[0]


def difference(left: Tensor, right: Tensor) -> float:
    """Mean |difference of logprobs|."""
    return round((left - right).abs().mean().item(), 5)


def measure(layers: int, rate: float) -> list[dict[str, object]]:
    """One row for each measured step."""
    case = Case(layers)
    advantages = torch.randn(SEQUENCES).repeat_interleave(TOKENS)
    before = case.logprobs().detach()
    trained = [p for p in case.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rows: list[dict[str, object]] = []
    for step in range(1, MEASURED_AFTER[-1] + 1):
        loss = -(case.logprobs() * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step not in MEASURED_AFTER:
            continue
        true = case.logprobs().detach()
        row: dict[str, object] = {"step": step, "moved_in_fp32": difference(true, before)}
        for name, (forward, to_the_nearest) in WAYS.items():
            trainer, server = case.as_trainer(forward), case.as_server(to_the_nearest)
            row[name] = {
                "server_from_trainer": difference(server, trainer),
                "trainer_from_fp32": difference(trainer, true),
                "server_from_fp32": difference(server, true),
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Both learning rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-5, 1e-4])
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "peft": peft.__version__, "on": platform.machine()}
    report: dict[str, object] = {"layers": args.layers, "versions": versions}
    for rate in args.rates:
        report[f"lr {rate:g}"] = measure(args.layers, rate)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
