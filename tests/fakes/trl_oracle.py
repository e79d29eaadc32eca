"""One small batch, seen both as TRL 1.16's padded tensors and as our packed micro-batch.

Run as a program where trl==1.16.0 is installed, it writes the golden numbers again:
`python -m tests.fakes.trl_oracle`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_grpo.algorithm.batch import Denominators, MicroBatch, expand
from lightning_grpo.algorithm.corrections import OPSM, Correction, TokenTIS
from lightning_grpo.algorithm.losses import (
    K3,
    Aggregation,
    CappedCISPOLoss,
    ConstantLength,
    GRPOLoss,
    GSPOLoss,
    KLPenalty,
    PolicyLoss,
    SAPOLoss,
    SequenceMean,
    TokenMean,
    WeightedK3,
)
from lightning_grpo.objective import minibatch_loss
from lightning_grpo.policy.packed import PackedPolicy

GOLDEN = Path(__file__).parents[1] / "golden" / "trl-1.16.0.json"
TEMPERATURE = 0.8
MAX_COMPLETION = 16
PROMPTS = (2, 2, 2, 2, 5, 5, 5, 5)
COMPLETIONS = (8, 3, 6, 1, 4, 7, 2, 5)
ADVANTAGES = (1.2, -0.7, 0.3, -0.8, 1.5, -0.5, -0.5, -0.5)


@dataclass(frozen=True)
class Case:
    """The same objective in TRL's words and in ours."""

    name: str
    trl: dict[str, Any]
    loss: PolicyLoss
    aggregation: Aggregation
    correction: Correction | None = None
    kl: KLPenalty | None = None
    sampled_by_another: bool = field(default=False)


CLIPS = {"epsilon": 0.2, "epsilon_high": 0.28}
GRPO = GRPOLoss(0.2, 0.28)
DAPO = {"loss_type": "dapo", **CLIPS}
CASES = (
    Case("grpo", {"loss_type": "grpo", **CLIPS}, GRPO, SequenceMean()),
    Case("bnpo", {"loss_type": "bnpo", **CLIPS}, GRPO, TokenMean()),
    Case("dr_grpo", {"loss_type": "dr_grpo", **CLIPS}, GRPO, ConstantLength(MAX_COMPLETION)),
    Case("dapo", DAPO, GRPO, TokenMean()),
    Case("dapo_delta", {**DAPO, "delta": 1.35}, GRPOLoss(0.2, 0.28, dual_clip=1.35), TokenMean()),
    Case(
        "cispo",
        {"loss_type": "cispo", "epsilon_high": 1.3},
        CappedCISPOLoss(cap=1.3),
        TokenMean(),
    ),
    Case(
        "sapo",
        {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        SAPOLoss(1.0, 1.05),
        SequenceMean(),
    ),
    Case(
        "gspo",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.03,
            "epsilon_high": 0.04,
        },
        GSPOLoss(0.03, 0.04),
        SequenceMean(),
    ),
    Case("dapo_tis", DAPO, GRPO, TokenMean(), correction=TokenTIS(2.0), sampled_by_another=True),
    Case(
        "dapo_opsm",
        {**DAPO, "off_policy_mask_threshold": 0.05},
        GRPO,
        TokenMean(),
        correction=OPSM(0.05),
    ),
    Case("dapo_kl", {**DAPO, "beta": 0.04}, GRPO, TokenMean(), kl=KLPenalty(0.04, WeightedK3())),
    Case(
        "dapo_kl_unweighted",
        {**DAPO, "beta": 0.04, "use_bias_correction_kl": False},
        GRPO,
        TokenMean(),
        kl=KLPenalty(0.04, K3()),
    ),
)


def oracle_model() -> Qwen3ForCausalLM:
    """A model whose weights are a formula, so that no random generator can change them."""
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                steps = torch.arange(parameter.numel(), dtype=torch.float64)
                wave = torch.sin(steps * (1.7 + 0.13 * i)) * 0.2
                parameter.copy_(wave.view_as(parameter))
    return model


def _sequences() -> tuple[list[list[int]], list[list[int]]]:
    prompts, completions = [], []
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        group = row // 4
        prompts.append([3 + (17 * group + 29 * t) % 300 for t in range(prompt)])
        completions.append(
            [3 + (row * row * 7 + t * t * 13 + 5 * t) % 300 for t in range(completion)]
        )
    return prompts, completions


def packed_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids`, `cu_seqlens` and the response mask."""
    prompts, completions = _sequences()
    ids = [token for p, c in zip(prompts, completions, strict=True) for token in p + c]
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    mask = [t >= p for p, n in zip(PROMPTS, lengths, strict=True) for t in range(n)]
    return torch.tensor(ids), torch.tensor([0, *lengths]).cumsum(0), torch.tensor(mask)


def make_inputs() -> dict[str, list[float]]:
    """Logprobs of the other policies at each sampled token: the model's plus a wave."""
    ids, cu_seqlens, mask = packed_tokens()
    with torch.no_grad():
        logprobs, _ = PackedPolicy(oracle_model())(ids, cu_seqlens, TEMPERATURE)
    steps = torch.arange(int(mask.sum()), dtype=torch.float32)
    waves = {"proximal": 0.4 * torch.sin(steps), "sampling": 0.6 * torch.cos(2 * steps)}
    waves["reference"] = 0.5 * torch.sin(3 * steps)
    return {
        name: [round(x, 6) for x in (logprobs[mask] + wave).tolist()]
        for name, wave in waves.items()
    }


def ours(case: Case, inputs: dict[str, list[float]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of this package."""
    ids, cu_seqlens, mask = packed_tokens()
    policy = PackedPolicy(oracle_model())
    logprobs, _ = policy(ids, cu_seqlens, TEMPERATURE, positions_mask=mask)

    def spread(name: str) -> Tensor:
        tokens = torch.zeros(len(ids))
        tokens[mask] = torch.tensor(inputs[name])
        return tokens

    batch = MicroBatch(
        input_ids=ids,
        cu_seqlens=cu_seqlens,
        response_mask=mask,
        loss_mask=mask,
        behavior_logprobs=spread("sampling" if case.sampled_by_another else "proximal"),
        proximal_logprobs=spread("proximal"),
        reference_logprobs=spread("reference"),
        weight_versions=torch.zeros(len(ids), dtype=torch.int64),
        advantages=expand(torch.tensor(ADVANTAGES), cu_seqlens),
        temperature=torch.full((len(ids),), TEMPERATURE),
        trajectory_index=torch.arange(len(PROMPTS)),
        denominators=Denominators(int(mask.sum()), len(PROMPTS), 2),
    )
    total, _ = minibatch_loss(
        logprobs,
        batch,
        case.loss,
        aggregation=case.aggregation,
        correction=case.correction,
        kl=case.kl,
    )
    total.backward()
    return total.item(), {
        n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None
    }


def trl_inputs(case: Case, inputs: dict[str, list[float]]) -> dict[str, Tensor]:
    """The same batch as `GRPOTrainer._compute_loss` wants it: prompts left, completions right."""
    prompts, completions = _sequences()
    width, length = max(PROMPTS), max(COMPLETIONS)
    completion_mask = torch.tensor([[t < n for t in range(length)] for n in COMPLETIONS]).long()

    def padded(name: str) -> Tensor:
        rows = torch.zeros(completion_mask.shape)
        rows[completion_mask.bool()] = torch.tensor(inputs[name])
        return rows

    found = {
        "prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([c + [0] * (length - len(c)) for c in completions]),
        "completion_mask": completion_mask,
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": padded("proximal"),
        "ref_per_token_logps": padded("reference"),
        "num_items_in_batch": completion_mask.sum(),
    }
    if case.sampled_by_another:
        ratio = (padded("proximal") - padded("sampling")).exp()
        found["importance_sampling_ratio"] = ratio.clamp(max=2.0)
    return found


def trls(case: Case, inputs: dict[str, list[float]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of TRL's own trainer; needs trl==1.16.0."""
    import datasets
    import trl

    from tests.fakes.tiny_model import make_tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        oracle_model().save_pretrained(folder)
        arguments = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            max_completion_length=MAX_COMPLETION,
            temperature=TEMPERATURE,
            per_device_train_batch_size=8,
            num_generations=4,
            model_init_kwargs={"dtype": "float32"},
            **case.trl,
        )
        trainer = trl.GRPOTrainer(
            model=folder,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 8),
            processing_class=make_tiny_tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    if case.sampled_by_another:
        trainer.use_vllm = True
        trainer.vllm_importance_sampling_correction = True
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, trl_inputs(case, inputs))
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def grad_norm(gradients: dict[str, Tensor]) -> float:
    """Norm of all gradients together."""
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))


def _golden_cases(inputs: dict[str, list[float]]) -> Iterator[tuple[str, dict[str, float]]]:
    for case in CASES:
        loss, gradients = trls(case, inputs)
        yield case.name, {"loss": loss, "grad_norm": grad_norm(gradients)}


def write_golden() -> None:
    """Writes inputs, losses and gradient norms of TRL."""
    inputs = make_inputs()
    cases = dict(_golden_cases(inputs))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"trl": "1.16.0", "inputs": inputs, "cases": cases}, indent=1))


if __name__ == "__main__":
    write_golden()
