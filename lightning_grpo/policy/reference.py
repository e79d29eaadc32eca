"""The frozen reference policy of a KL penalty."""

from __future__ import annotations

from typing import Any

import torch

from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.packed import PackedPolicy


class ReferencePolicy:
    """Loads the reference when it is first asked for; whole on each rank.

    It is no `nn.Module`, so that a module may hold it without training, sharding or saving it.
    """

    def __init__(self) -> None:
        self._policy: PackedPolicy | None = None

    def on(self, device: torch.device, path: str, model_kwargs: dict[str, Any]) -> PackedPolicy:
        """The policy of `path`, on `device`."""
        if self._policy is None:
            policy = PackedPolicy(load_policy(path, model_kwargs=model_kwargs))
            self._policy = policy.to(device).requires_grad_(False)
        return self._policy
