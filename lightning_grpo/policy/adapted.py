"""A linear layer with an adapter whose update survives half precision; needs PEFT."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D
from typing_extensions import override


class AdaptedLinear(Linear):
    """x W + (x A) B * alpha / rank, rounded once.

    PEFT's own layer adds the update to what the base layer has rounded already, so that in bf16 an
    update below half a unit is lost at every token: the policy would hardly train at first, and
    differ from servers that compute with merged weights. Here the update goes into the sum of the
    matrix product, which is kept in fp32. One adapter, without dropout.
    """

    is_off = False

    @override
    def set_scale(self, adapter: str, scale: float) -> None:
        """Switch the adapter off by a scale of 0, and on by 1."""
        super().set_scale(adapter, scale)
        self.is_off = scale == 0.0

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: `[..., in]`; gives `[..., out]`."""
        (name,) = self.active_adapters
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear | Conv1D)
        if self.is_off:
            return base(x)
        rows = x.flatten(0, -2)
        # Not `self.scaling`: a compiler takes a float for an input, which a CPU would compute with.
        scale = self.lora_alpha[name] / self.r[name]
        update = self.lora_B[name](self.lora_A[name](rows)) * scale
        weight = base.weight if isinstance(base, Conv1D) else base.weight.t()
        if torch.is_autocast_enabled(x.device.type):
            rows, weight = (t.to(update.dtype) for t in (rows, weight))
        summed = _product_and_update(rows, weight, update)
        if base.bias is not None:
            summed = summed + base.bias.to(summed.dtype)  # autocast leaves it as it is
        return summed.unflatten(0, x.shape[:-1])


def _product_and_update(rows: Tensor, weight: Tensor, update: Tensor) -> Tensor:
    if update.dtype not in (torch.bfloat16, torch.float16):
        return torch.addmm(update, rows, weight)
    return cast("Tensor", _RoundedOnce.apply(rows, weight, update))


class _RoundedOnce(torch.autograd.Function):
    """`rows @ weight + update` in half precision.

    cuBLAS has kernels for `addmm` that round the product before they add: on an H200 three quarters
    of an update below half a unit were lost.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        with torch.autocast(rows.device.type, enabled=False):  # it would round the product
            if rows.is_cuda:
                product = torch.mm(rows, weight, out_dtype=torch.float32)
            else:
                product = rows.float() @ weight.float()
            return (product + update).to(update.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = grad @ weight.t() if ctx.needs_input_grad[0] else None
        of_weight = rows.t() @ grad if ctx.needs_input_grad[1] else None
        return of_rows, of_weight, grad
