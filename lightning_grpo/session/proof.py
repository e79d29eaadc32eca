"""The trainer's side of a proof: what the sent weights score, and what the policy itself does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.policy.snapshot_scorer import SnapshotScorer
from lightning_grpo.strategies.fsdp2 import reshard, unshard
from lightning_grpo.weights.gather import ADAPTED_PART
from lightning_grpo.weights.proof import (
    Probe,
    Rounding,
    Scores,
    SentScores,
    check_policy,
    kind_of,
    mean_difference,
    require_finite,
)

DRIFT = 0.25
"""After so large a mean change of the scores their rounding is measured again."""
KEPT_FRACTION = 0.05
"""Weights of at most this part of a GPU keep a place there, which lets a CUDA graph score them."""


class TrainerProof:
    """Rank 0's scores of what is sent to the servers, and its comparison with the policy.

    Args:
        probe: What is scored.
        server_kinds: Precisions that servers compute in, by their own names.
    """

    def __init__(self, probe: Probe, server_kinds: Collection[str]) -> None:
        self.probe = probe
        self._server_kinds = {kind_of(kind) for kind in server_kinds}
        self._scorer: SnapshotScorer | None = None
        self._measured: Scores | None = None
        self._rounding = Rounding()

    @property
    def memory(self) -> Mapping[str, Tensor] | None:
        """Where the next snapshot should be gathered; None: anywhere."""
        return self._scorer.memory if self._scorer is not None else None

    def score(self, policy: nn.Module, snapshot: Mapping[str, Tensor]) -> SentScores:
        """Score a snapshot; the first time thoroughly, and how it rounds is measured, too.

        Raises:
            WeightSyncError: The weights are broken, or not those of the policy's model.
        """
        first = self._scorer is None
        if self._scorer is None:
            keep = _fits_beside(snapshot)
            self._scorer = SnapshotScorer(packed(policy).model, keep_memory=keep)
        self._scorer.hold(snapshot)
        scores = self._scorer.scores(self.probe.sequences)
        require_finite(scores)
        if self._measured is None or mean_difference(self._measured, scores) > DRIFT:
            self._measured = scores
            self._rounding = Rounding(weights=self._scorer.weight_rounding(self.probe.sequences))
        kind = _kind(snapshot)
        self._measure({kind, *self._server_kinds})
        if first and self.probe.thorough:
            scores = scores + self._scorer.scores(self.probe.thorough, once=True)
        return SentScores(scores, kind, self._rounding)

    def check_policy(
        self, version: int, sent: SentScores, scores: Scores, kind: str, merged: bool
    ) -> float:
        """Compare what was sent with the policy; see `weights.proof.check_policy`."""
        self._measure({kind})
        sent = SentScores(sent.scores, sent.kind, self._rounding)
        return check_policy(version, sent, scores, kind, merged=merged)

    def _measure(self, kinds: set[str]) -> None:
        assert self._scorer is not None
        known = self._rounding.compute
        new = {k: self._scorer.rounding(self.probe.sequences, k) for k in kinds - known.keys()}
        if new:
            self._rounding = Rounding({**known, **new}, self._rounding.weights)


@torch.no_grad()
def policy_scores(
    policy: nn.Module, sequences: Sequence[Sequence[int]]
) -> tuple[list[list[float]], str]:
    """Score sequences by the pass that trains; on every rank, since shards need all.

    Args:
        policy: A `PackedPolicy`, sharded or not, or what Fabric made of it: its pass is taken.
        sequences: Token ids.

    Returns:
        Logprobs `[sequences][tokens]`, of which entry 0 of a sequence says nothing, and the
        precision in which the policy computed.
    """
    device = next(policy.parameters()).device
    computed: list[torch.dtype] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        computed.append(output.last_hidden_state.dtype)

    hook = packed(policy).model.get_decoder().register_forward_hook(look)
    unshard(policy)
    try:
        scores = [
            policy(torch.tensor(ids).to(device, non_blocking=True))[0].float().tolist()
            for ids in sequences
        ]
    finally:
        hook.remove()
        reshard(policy)  # the optimizer and callbacks look at the shards
    return scores, str(computed[0]).removeprefix("torch.")


def packed(policy: nn.Module) -> PackedPolicy:
    """The policy inside of what Fabric or DDP put around it.

    Raises:
        ConfigError: There is none.
    """
    inner: Any = policy
    while not isinstance(inner, PackedPolicy):
        if not isinstance(inner, nn.Module) or not hasattr(inner, "module"):
            raise ConfigError(
                "`policy` must be a PackedPolicy, or what Fabric made of one, got a "
                f"{type(policy).__name__}."
            )
        inner = inner.module
    return inner


def is_adapted(policy: nn.Module) -> bool:
    """Whether adapters are merged into what is sent."""
    return any(ADAPTED_PART in name.split(".") for name, _ in policy.named_parameters())


def _kind(snapshot: Mapping[str, Tensor]) -> str:
    """The dtype in which most of a snapshot travels."""
    largest = max(snapshot.values(), key=lambda tensor: tensor.numel())
    return str(largest.dtype).removeprefix("torch.")


def _fits_beside(snapshot: Mapping[str, Tensor]) -> bool:
    """Whether the weights may keep their place on the GPU between two publishes."""
    some = next(iter(snapshot.values()))
    if not some.is_cuda:
        return False
    total = torch.cuda.get_device_properties(some.device).total_memory
    return sum(tensor.nbytes for tensor in snapshot.values()) <= KEPT_FRACTION * total
