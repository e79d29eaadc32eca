"""From a micro-batch to its loss, and the reference policy of a KL penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.algorithm.batch import MicroBatch, to_device
from lightning_grpo.algorithm.corrections import Correction
from lightning_grpo.algorithm.layers import Replay
from lightning_grpo.algorithm.losses import (
    Aggregation,
    KLPenalty,
    PolicyLoss,
    TokenMean,
)
from lightning_grpo.algorithm.metrics import Metrics, Sum, masked_mean, merge, mismatch_metrics
from lightning_grpo.errors import MOST, require_number
from lightning_grpo.loader import Minibatch, Rollout, on_device, token_rows
from lightning_grpo.policy.check import check_reference
from lightning_grpo.policy.load import load_policy, materialize_from_folder
from lightning_grpo.policy.lora import WithoutAdapter
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.shipped import resolve_path
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy, reshard

TokenLoss = Callable[[Tensor, MicroBatch], tuple[Tensor, Metrics]]


def minibatch_loss(
    policy_logprobs: Tensor,
    batch: MicroBatch,
    loss: TokenLoss,
    *,
    aggregation: Aggregation,
    correction: Correction | None = None,
    kl: KLPenalty | None = None,
    entropy_coefficient: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """This micro-batch's part of the minibatch's loss: the parts add up over ranks too.

    Per token: loss times the correction's weight, plus the KL penalty, minus the entropy bonus;
    then the aggregation's weighted sum with the global denominators of the minibatch.

    Args:
        policy_logprobs: Under the policy being trained, with gradient, `[tokens]`.
        batch: The micro-batch. Without `proximal_logprobs` the policy anchors its own clip.
        loss: A policy loss, or a module's `token_loss`.
        aggregation: How token losses become one number (most often `loss.aggregation`).
        correction: Weights for samples of another policy.
        kl: Penalty for leaving the reference policy.
        entropy_coefficient: Bonus for entropy; needs `batch.entropy` with gradient.

    Returns:
        The scalar to call `backward` on, and metrics by name.
    """
    batch = batch.with_proximal(policy_logprobs)
    token_loss, metrics = loss(policy_logprobs, batch)
    if correction is not None and batch.proximal_logprobs is not None:
        weights, more = correction(batch.proximal_logprobs, batch)
        token_loss, metrics = token_loss * weights.detach(), merge(metrics, more)
    if kl is not None:
        penalty, more = kl(policy_logprobs, batch)
        token_loss, metrics = token_loss + penalty, merge(metrics, more)
    if batch.entropy is not None:
        entropy = torch.where(batch.loss_mask, batch.entropy, 0.0)
        metrics = merge(metrics, {"policy/entropy": masked_mean(entropy, batch.loss_mask)})
        if entropy_coefficient:
            token_loss = token_loss - entropy_coefficient * entropy
    elif entropy_coefficient:
        raise ValueError("`batch.entropy` must be set for an entropy bonus, got None.")
    # A token outside the mask may carry NaN from a user's loss; 0 * NaN would spread it.
    masked = torch.where(batch.loss_mask, token_loss, 0.0)
    return (aggregation.weights(batch) * masked).sum(), metrics


@dataclass(frozen=True)
class Objective:
    """What is minimized.

    Args:
        loss: The policy loss: any callable `(policy_logprobs, batch) -> ([tokens], metrics)`.
        correction: Weights for samples of another policy; None anchors the clip at the behavior
            policy.
        kl: Penalty for leaving the reference policy.
        entropy_coefficient: Weight of the entropy bonus.
    """

    loss: TokenLoss
    correction: Correction | None = None
    kl: KLPenalty | None = None
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number("entropy_coefficient", self.entropy_coefficient, least=-MOST)

    @property
    def aggregation(self) -> Aggregation:
        """The loss's own aggregation; a plain function gets the mean over tokens."""
        return self.loss.aggregation if isinstance(self.loss, PolicyLoss) else TokenMean()

    @property
    def skips_zero_advantages(self) -> bool:
        """Whether a trajectory with advantage zero has no gradient, so that no pass is needed."""
        alone = self.kl is None and self.entropy_coefficient == 0.0
        return alone and isinstance(self.loss, PolicyLoss) and self.loss.is_zero_at_zero_advantage

    def anchor(
        self,
        policy: nn.Module,
        rollout: Rollout,
        steps: int,
        device: torch.device,
        reference: nn.Module | None = None,
    ) -> None:
        """Fix where the clip is anchored, before the first of `steps` steps on a rollout batch.

        Without a correction that is the behavior policy; with one the proximal policy, which is
        scored in the same micro-batches as training, or, if there is one step only, is the policy
        itself, detached. A KL penalty's reference is scored here, too, which is a model of its own:
        its routers choose for themselves.

        Args:
            policy: A `PackedPolicy`, before the first step.
            rollout: Gets the logprobs.
            steps: Optimizer steps on it.
            device: Where they are computed.
            reference: Another `PackedPolicy`, frozen; needed with a KL penalty.
        """
        if self.kl is not None:
            assert reference is not None, "a KL penalty needs its reference policy"
            rollout.reference_logprobs = score(reference, rollout, device, replays=False)
        if self.correction is None:
            rollout.proximal_logprobs = rollout.sequences.behavior_logprobs
        elif steps > 1:
            rollout.proximal_logprobs = score(policy, rollout, device)

    def micro_batch_loss(
        self,
        policy: nn.Module,
        minibatch: Minibatch,
        k: int,
        device: torch.device,
        token_loss: TokenLoss | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The k-th micro-batch's part of the minibatch's loss, to call `backward` on.

        Parts add up over micro-batches and ranks. Where gradients are averaged over ranks (DDP,
        FSDP) multiply by their number.

        Args:
            policy: A `PackedPolicy`.
            minibatch: The optimizer step.
            k: Which of its micro-batches.
            device: Where it is computed.
            token_loss: Takes the place of `loss` (a subclass's hook).
        """
        host = minibatch.micro_batch(k)
        replay = None if host.routes is None else Replay(host.routes)
        batch = on_device(replace(host, routes=None), device)
        logprobs, entropy = policy(
            host.input_ids,
            host.cu_seqlens,
            batch.temperature,
            with_entropy=True,
            positions_mask=host.loss_mask,
            **_replayed(replay),
        )
        is_filler = not minibatch.rollout.plans[minibatch.index][k]
        replayed = {} if replay is None else replay.metrics(nothing=is_filler)
        if not self.entropy_coefficient:
            entropy = entropy.detach()
        if minibatch.pass_index == 0 and not is_filler:
            minibatch.rollout.policy_logprobs.setdefault((minibatch.index, k), logprobs.detach())
        loss, metrics = minibatch_loss(
            logprobs,
            replace(batch, entropy=entropy),
            loss=token_loss or self.loss,
            aggregation=self.aggregation,
            correction=self.correction,
            kl=self.kl,
            entropy_coefficient=self.entropy_coefficient,
        )
        metrics |= {"policy/loss": Sum(loss.detach()), **replayed}
        if minibatch.is_first:
            metrics.update(mismatch_metrics(logprobs, batch, minibatch.rollout.version))
        return loss, metrics


@torch.no_grad()
def score(
    policy: nn.Module, rollout: Rollout, device: torch.device, replays: bool = True
) -> Tensor:
    """Logprobs of this rank's share under `policy`, `[share tokens]`, in training's own passes.

    Args:
        policy: A `PackedPolicy`.
        rollout: The share.
        device: Where it is computed.
        replays: Whether tokens go through the experts that servers chose, where they are known.
    """
    dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    scores = torch.zeros_like(rollout.sequences.behavior_logprobs, dtype=dtype)
    for index, plan in enumerate(rollout.plans):
        minibatch = Minibatch(rollout, index, 0, is_first=False, is_last=False)
        for k, rows in enumerate(plan):
            batch: MicroBatch = minibatch.micro_batch(k)
            logprobs, _ = policy(
                batch.input_ids,
                batch.cu_seqlens,
                to_device(batch.temperature, device),
                positions_mask=batch.response_mask,
                **_replayed(Replay(batch.routes) if replays and batch.routes is not None else None),
            )
            if rows:
                scores[token_rows(rollout.sequences, rows)] = logprobs.cpu()
    return scores


def _replayed(replay: Replay | None) -> dict[str, Replay]:
    """An argument for a `PackedPolicy`; none for what only looks like one."""
    return {} if replay is None else {"replay": replay}


class ReferencePolicy:
    """Holds the reference from the first rollout batch on.

    It is no `nn.Module`, so that a module may hold it without training, sharding or saving it.

    Args:
        kl: The penalty that asks for it; None: there is none.
        model: What is trained, the reference where the penalty names no other.
        model_kwargs: For `from_pretrained`.
        has_adapter: Whether what is trained is an adapter: then the model below it is there
            already, and nothing is loaded.
    """

    def __init__(
        self,
        kl: KLPenalty | None,
        model: str,
        model_kwargs: dict[str, Any],
        has_adapter: bool = False,
    ) -> None:
        self._kl = kl
        self._path = (kl.reference if kl is not None else None) or model
        self._model = model
        self._model_kwargs = model_kwargs
        self._is_base = has_adapter and kl is not None and kl.reference is None
        self._policy: PackedPolicy | None = None

    def check(self, row_ranks: int = 1) -> None:
        """Refuse a reference of another model that can't score packed sequences.

        Args:
            row_ranks: How many ranks would compute each row together.

        Raises:
            ConfigError: Why not, and what to use instead.
        """
        if self._kl is not None and self._kl.reference is not None:
            paths = resolve_path(self._path), resolve_path(self._model)
            check_reference(*paths, self._model_kwargs, row_ranks)

    @contextmanager
    def on(
        self, policy: nn.Module, device: torch.device, strategy: object = None
    ) -> Iterator[nn.Module | None]:
        """The reference, ready to score while the context is open; None without a penalty.

        Under FSDP2Strategy it is sharded as the policy is, and entering is a collective.

        Args:
            policy: What is trained.
            device: Where it computes.
            strategy: The Trainer's.
        """
        if self._kl is None:
            yield None
        elif self._is_base:
            yield WithoutAdapter(policy)
        else:
            offload = self._kl.offload and device.type != "cpu"
            sharding = strategy if isinstance(strategy, FSDP2Strategy) else None
            if self._policy is None:
                self._policy = self._load(device, sharding, offload)
            if sharding is None:
                self._policy.to(device)
            yield self._policy
            if sharding is not None:
                reshard(self._policy)  # no backward comes that would do it
            elif offload:
                self._policy.to("cpu")

    def _load(
        self, device: torch.device, sharding: FSDP2Strategy | None, offload: bool
    ) -> PackedPolicy:
        path, meta = resolve_path(self._path), sharding is not None
        model = load_policy(path, meta=meta, model_kwargs=self._model_kwargs)
        policy = PackedPolicy(model).requires_grad_(False)
        if sharding is not None:
            sharding.shard(policy, offload)
            home = torch.device("cpu") if offload else device
            materialize_from_folder(model, path, device=home, model_kwargs=self._model_kwargs)
            for buffer in policy.buffers():
                buffer.data = buffer.data.to(device)
        return policy
