"""Mixed precision of one rank: passes compute with a copy of the parameters in another dtype.

On a single rank FSDP2 has nothing to shard, and its hooks, casts and gradient buffers for each
block cost the CPU more time than launching the block's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_grpo._compat import after_backward, will_accumulate

_ATTRIBUTE = "_working_copy"


class WorkingCopy:
    """The parameters of a module as its passes see them, in `dtype`.

    The module's own parameters stay the master weights, and are what `parameters()` gives outside
    of a pass. Gradients reach them through the cast, and add up over micro-batches in their dtype.

    Args:
        module: Root of all that computes; its forward is hooked.
        dtype: Of parameters in forward and backward.
        blocks: Inner modules whose gradients are added up together, once their backward is done;
            other parameters each alone.
        compiled: Whether that addition is compiled, on GPUs.

    Attributes:
        keeps: Whether the copy serves further passes after a backward: that of the next micro-batch
            of the same step does. It is made anew wherever a parameter has changed.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        blocks: Sequence[nn.Module] = (),
        compiled: bool = False,
    ) -> None:
        self.keeps = False
        self._compiled = compiled
        self._dtype = dtype
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter.is_floating_point() and parameter.dtype != dtype
        ]
        cast = {parameter: None for _, _, parameter in self._places}
        self._groups: list[list[nn.Parameter]] = []
        for block in blocks:
            self._groups.append([each for each in block.parameters() if each in cast])
            for each in self._groups[-1]:
                del cast[each]  # shared with a later block, it is this one's
        self._groups += [[each] for each in cast]
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._made_of: tuple[bool, list[int]] | None = None
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)
        module.register_state_dict_pre_hook(self._put_back)
        module.register_load_state_dict_pre_hook(self._put_back)
        setattr(module, _ATTRIBUTE, self)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._make(differentiable=torch.is_grad_enabled())
        self._swap(with_copies=True)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._swap(with_copies=False)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        with_grad = [tensor for tensor in tensors if tensor.requires_grad]
        for tensor in with_grad:
            tensor.register_hook(self._begin_backward)
        if self._made_of is not None and not self._made_of[0]:
            self._drop()

    def _begin_backward(self, grad: Tensor) -> None:
        """Activations that are computed again need the copy as much as the first time."""
        self._make(differentiable=True)  # hooks run without gradients, a second forward does not
        self._swap(with_copies=True)
        after_backward(self._end_backward)

    def _end_backward(self) -> None:
        self._swap(with_copies=False)
        if not self.keeps:
            self._drop()

    def _put_back(self, *call: Any) -> None:
        """A backward pass that failed has no end: what is saved then is the master weights, too."""
        self._swap(with_copies=False)

    def _make(self, *, differentiable: bool) -> None:
        versions = [parameter._version for _, _, parameter in self._places]
        if self._made_of in ((True, versions), (differentiable, versions)):
            return
        self._made_of = differentiable, versions
        with torch.set_grad_enabled(differentiable):
            for group in self._groups:
                trained = [each for each in group if each.requires_grad]
                copies = _Cast.apply(self._dtype, self._compiled, *trained)
                self._copies.update(zip(trained, copies, strict=True))
                frozen = (each for each in group if not each.requires_grad)
                self._copies.update((each, each.to(self._dtype)) for each in frozen)

    def _drop(self) -> None:
        self._copies, self._made_of = {}, None

    def _swap(self, with_copies: bool) -> None:
        for owner, name, parameter in self._places:
            # Straight into the dictionary: a module takes nothing but parameters by assignment.
            used = self._copies[parameter] if with_copies else parameter
            owner._parameters[name] = used  # type: ignore[assignment]


class _Cast(torch.autograd.Function):
    """Copies of parameters in a dtype; backward adds to the parameters' gradients in one pass.

    Autograd itself would first make a gradient of the parameter's dtype, and then add that: on a
    GPU two kernels, and almost twice the memory traffic, for every parameter and micro-batch.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, compiled: bool, *masters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.masters = masters  # not saved: nothing is read of their values
        ctx.compiled = compiled
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(each, dtype=dtype) for each in masters]
        if copies:
            torch._foreach_copy_(copies, masters)  # a few kernels, not one for each
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        left: list[Tensor | None] = list(grads)
        totals: list[Tensor] = []
        added: list[Tensor] = []
        nodes = (node for node, _ in ctx.next_functions)  # of tensors alone
        for i, (master, node) in enumerate(zip(ctx.masters, nodes, strict=True)):
            grad = left[i]
            if grad is not None and master.grad is not None and _plainly_added(master, node):
                totals.append(master.grad)
                added.append(grad)
                left[i] = None
        if added and ctx.compiled and totals[0].is_cuda:
            _add_compiled()(totals, added)
        elif added:
            _add(totals, added)
        pairs = zip(left, ctx.masters, strict=True)
        return (None, None, *(grad if grad is None else grad.to(m.dtype) for grad, m in pairs))


@functools.cache
def _add_compiled() -> Any:
    """For tensors of two dtypes torch has no kernel that takes several, and a slow one for each."""
    return torch.compile(_add, dynamic=False)


def _add(totals: list[Tensor], added: list[Tensor]) -> None:
    torch._foreach_add_(totals, added)


def _plainly_added(parameter: nn.Parameter, node: Any) -> bool:
    """Whether all that autograd would do with a gradient is to add it to the parameter's."""
    hooked = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    if torch.is_grad_enabled():
        return False  # the gradient is to be differentiated itself
    return not hooked and node is not None and will_accumulate(node)


def working_copies(module: nn.Module) -> list[WorkingCopy]:
    """Those of a module and of what is inside."""
    return [each for m in module.modules() if (each := vars(m).get(_ATTRIBUTE)) is not None]
