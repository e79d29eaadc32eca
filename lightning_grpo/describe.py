"""What was resolved, in words: the lines that the summary prints before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import lightning as L
from torch import Tensor, nn

from lightning_grpo.rewards.sandbox import boundary
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from lightning_grpo.types import Sampling

if TYPE_CHECKING:
    from lightning_grpo.datamodule import RolloutDataModule
    from lightning_grpo.module import GRPOModule


def describe_module(module: GRPOModule, data: RolloutDataModule) -> dict[str, str]:
    """Model, loss, anchor of the clip, advantage, correction, KL penalty and every precision."""
    parameters = list(module.sharding_root().parameters())
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    served = data.session.dtypes() if data.session is not None else {}
    anchor = "the behavior policy"
    if module.correction is not None:
        anchor = "the proximal policy"
        if data.steps_per_rollout == 1:
            anchor += " (the policy itself: one optimizer step per rollout batch)"
    model = f"{module.model_name} ({count / 1e6:.2f}M parameters)"
    if module.lora is not None:
        model += f", of which {module.lora} trains {trained / 1e6:.2f}M"
    return {
        "model": model,
        "loss": f"{_hook(module, 'token_loss') or module.loss}, clip anchored at {anchor}",
        "advantage": _hook(module, "advantages") or str(module.advantage),
        "truncated": str(module.truncation),
        "correction": str(module.correction or "none"),
        "kl": str(module.kl or "none"),
        "dtypes": describe_dtypes(module.trainer, module.sharding_root(), served),
    }


def describe_dtypes(trainer: L.Trainer, policy: nn.Module, served: Mapping[str, str]) -> str:
    """Precision everywhere: of weights, compute, gradients and optimizer, then what is `served`."""
    weights = compute = gradients = _dtypes(policy.parameters())
    if isinstance(trainer.strategy, FSDP2Strategy):
        compute, gradients = trainer.strategy.compute_dtype, trainer.strategy.reduce_dtype
    elif trainer.precision == "bf16-mixed":
        compute = "bfloat16 (autocast)"
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    state = {
        "weights": weights,
        "compute": compute,
        "gradients": gradients,
        # Before the first step there is no state; it is made like the parameters.
        "optimizer": _dtypes(parameter for group in groups for parameter in group["params"]),
        **served,
    }
    return ", ".join(f"{name} {dtype}" for name, dtype in state.items())


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return " and ".join(sorted({str(each.dtype).removeprefix("torch.") for each in tensors}))


def _hook(module: GRPOModule, name: str) -> str:
    """`Class.name` where a subclass of the user's overrides a hook, else nothing."""
    owner = next(c for c in type(module).__mro__ if name in vars(c))
    own = owner.__module__.startswith("lightning_grpo.")
    return "" if own else f"{owner.__name__}.{name}"


def describe_data(
    data: RolloutDataModule, num_prompts: int, held_out: Mapping[str, int]
) -> dict[str, str]:
    """Prompts, the rollout batch and what its staleness means."""
    steps = f"{data.steps_per_rollout} optimizer step"
    if data.steps_per_rollout > 1:
        steps += f"s ({data.minibatches_per_batch} x {data.passes_per_batch} passes)"
    stale = "exactly on-policy: rollouts wait for the weights of every step"
    if data.max_staleness:
        stale = (
            f"{data.max_staleness}: groups are sampled by weights at most {data.max_staleness} "
            f"version{'s' * (data.max_staleness > 1)} older than those that train on them"
        )
    counts = ", ".join(f"{n} {name}".strip() for name, n in held_out.items())
    if counts and data.evaluation.sampling is not None:
        counts += f" ({describe_sampling(data.evaluation.sampling)})"
    few = ""
    if num_prompts < data.batch_size:
        few = f" (fewer than a batch of {data.batch_size}: some are asked several times in each)"
    said = {"programs": f"held by {boundary()}"} if data.workflow.runs_programs else {}
    return {
        "prompts": f"{num_prompts}{few}, and held out {counts or 'none'}",
        "batch": f"{data.batch_size} prompts x {data.group_size} samples, {steps}",
        "staleness": stale,
        **said,
    }


def describe_sampling(sampling: Sampling) -> str:
    """How completions are sampled; what is off is left out."""
    said = [f"temperature {sampling.temperature:g}"]
    off = {"top_p": 1.0, "top_k": -1, "min_new_tokens": 0, "stop": (), "stop_token_ids": ()}
    said += [f"{name} {vars(sampling)[name]}" for name in off if vars(sampling)[name] != off[name]]
    return ", ".join([*said, f"at most {sampling.max_new_tokens} tokens"])
