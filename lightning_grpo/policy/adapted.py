"""A linear layer with an adapter whose update survives half precision; needs PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override


class AdaptedLinear(Linear):
    """x W + (x A) B * alpha / rank, rounded once.

    PEFT's own layer adds the update to what the base layer has rounded already, so that in bf16 an
    update below half a unit is lost at every token: the policy would hardly train at first, and
    differ from servers that compute with merged weights. Here the update goes into the sum of the
    matrix product, which is kept in fp32. One adapter, without dropout.
    """

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: `[..., in]`; gives `[..., out]`."""
        (name,) = self.active_adapters
        base, scale = self.get_base_layer(), self.scaling[name]
        assert isinstance(base, nn.Linear | Conv1D)
        if scale == 0.0:  # switched off
            return base(x)
        rows = x.flatten(0, -2)
        update = self.lora_B[name](self.lora_A[name](rows)) * scale
        weight = base.weight if isinstance(base, Conv1D) else base.weight.t()
        summed = torch.addmm(update, rows, weight)
        if base.bias is not None:
            summed = summed + base.bias.to(summed.dtype)  # autocast leaves it as it is
        return summed.unflatten(0, x.shape[:-1])
