"""The frozen reference policy of a KL penalty: whole, sharded, in host memory, or a LoRA's base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_grpo.algorithm.kl import KLPenalty
from lightning_grpo.policy.check import check_architecture
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.lora import WithoutAdapter
from lightning_grpo.policy.materialize import materialize_from_folder
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.shipped import resolve_path
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from lightning_grpo.strategies.parallelize import reshard


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
        self._model_kwargs = model_kwargs
        self._is_base = has_adapter and kl is not None and kl.reference is None
        self._policy: PackedPolicy | None = None

    def check(self) -> None:
        """Refuse a reference of another model that can't score packed sequences.

        Raises:
            ConfigError: Why not, and what to use instead.
        """
        if self._kl is not None and self._kl.reference is not None:
            check_architecture(resolve_path(self._path), self._model_kwargs)

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
