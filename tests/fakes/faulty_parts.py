"""Parts of the path of a model, each with one fault that is easily made and hardly seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_grpo.certify.checks import Parts, stepped
from lightning_grpo.certify.ranks import ShardsInFp64
from lightning_grpo.engine.model import ModelRunner, load_model
from lightning_grpo.policy.attention import PackedLayout
from lightning_grpo.policy.load import without_bars
from lightning_grpo.policy.packed import LogitForm, PackedPolicy
from lightning_grpo.policy.recurrent import recurrent_parts
from lightning_grpo.weights.gather import gather_weights


class SeesTheNextRow(PackedPolicy):
    """Rows are cut one token too early: the last token of each begins the next one's attention."""

    def hidden_states(self, input_ids, layout, replay=None):
        bounds = layout.cu_seqlens.clone()
        bounds[1:-1] -= 1
        wrong = PackedLayout(bounds)
        wrong.positions = PackedLayout(layout.cu_seqlens).positions
        return super().hidden_states(input_ids, wrong)[layout.unique]


class StatesLeak(PackedPolicy):
    """What recurrent layers remember of a row reaches the next one."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        for part in recurrent_parts(model):
            part.forward = partial(type(part).forward, part)


class WindowsLeak(PackedPolicy):
    """States begin anew, but short convolutions see the end of the row before."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        for part in recurrent_parts(model):
            part.forward = partial(self.one_window, part, part.forward)

    @staticmethod
    def one_window(part, forward, hidden_states, packing, **kwargs):
        window, size = type(part).forward, part.conv_kernel_size - 1
        out = forward(hidden_states=hidden_states, packing=packing, **kwargs)
        for start in packing.cu_seqlens[1:-1].tolist():
            seen = hidden_states[:, max(0, start - size) : start + 1]
            out[:, start] = window(part, seen)[:, -1]
        return out


class OneFactorForAllRows(PackedPolicy):
    """RoPE as transformers computes it: by the longest row of the pack."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        for module in model.modules():
            vars(module).pop("forward", None)


class OneWindowTooMany(PackedPolicy):
    """Sees one token more than its window."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        for module in model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window += 1


class LeavesOutTheCap(PackedPolicy):
    """Takes the head's logits as they are."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.logit_form = LogitForm()


class MultipliesWhatItShouldDivide(PackedPolicy):
    """Scales logits the other way round."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.logit_form = LogitForm(1 / self.logit_form.scale)


class NoCapInTheGradient(PackedPolicy):
    """The right logprobs, with the gradient of logits that have no cap."""

    def forward(self, *args, **kwargs):
        right, entropy = super().forward(*args, **kwargs)
        form, self.logit_form = self.logit_form, LogitForm()
        without, _ = super().forward(*args, **kwargs)
        self.logit_form = form
        return without + (right - without).detach(), entropy


class NoSoftcap(PackedPolicy):
    """Attention's scores as they are."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        without_softcaps(model)


class SinksOfOtherHeads(PackedPolicy):
    """Each head has the sink of the next one."""

    def hidden_states(self, input_ids, layout, replay=None):
        sinks = [p.data for name, p in self.model.named_parameters() if name.endswith("sinks")]
        kept = [values.clone() for values in sinks]
        for values in sinks:
            values.copy_(values.roll(1))
        hidden = super().hidden_states(input_ids, layout)
        for values, own in zip(sinks, kept, strict=True):
            values.copy_(own)
        return hidden


class FrozenSinks(PackedPolicy):
    """Sinks have no gradient."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("sinks"))


def without_softcaps(model: nn.Module) -> nn.Module:
    """A model whose attention has no caps any more."""
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    return model


class SharesTooMuch(PackedPolicy):
    """Where prompts are shared, each token gets its neighbour's hidden state."""

    def hidden_states(self, input_ids, layout, replay=None):
        hidden = super().hidden_states(input_ids, layout)
        return hidden.roll(1, 0) if len(layout.repeats) else hidden


class Noisy(PackedPolicy):
    """Draws."""

    def hidden_states(self, input_ids, layout, replay=None):
        hidden = super().hidden_states(input_ids, layout)
        return hidden + 1e-6 * torch.randn_like(hidden)


class Detached(PackedPolicy):
    """The right logprobs, of which the last has no gradient."""

    def forward(self, *args, **kwargs):
        logprobs, entropy = super().forward(*args, **kwargs)
        return torch.cat([logprobs[:-1], logprobs[-1:].detach()]), entropy


class AveragesRows(PackedPolicy):
    """The right logprobs, whose gradient is divided by how many rows are packed."""

    def forward(self, input_ids, cu_seqlens=None, *args, **kwargs):
        logprobs, entropy = super().forward(input_ids, cu_seqlens, *args, **kwargs)
        part = logprobs / (len(cu_seqlens) - 1)
        return logprobs.detach() + part - part.detach(), entropy


class KeepsSomethingElsewhere(PackedPolicy):
    """Counts its passes, which change what it gives, and leaves the count out of checkpoints."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.passes = 0

    def forward(self, *args, **kwargs):
        logprobs, entropy = super().forward(*args, **kwargs)
        self.passes += logprobs.requires_grad
        return logprobs * (1 + 1e-3 * self.passes), entropy


class CountsNothing(PackedPolicy):
    """Takes its work for none."""

    def flops(self, lengths, predicted):
        return 0.0


class SumsOverRanks(PackedPolicy):
    """The right logprobs, whose gradient is summed over ranks, not averaged."""

    def forward(self, *args, **kwargs):
        logprobs, entropy = super().forward(*args, **kwargs)
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        more = logprobs * (ranks - 1)
        return logprobs + more - more.detach(), entropy


def leaves_one_out(name: str) -> Any:
    """Reduces all gradients but one norm's."""
    return LeavesOneOut() if name == "ddp" else Parts().strategy(name)


class LeavesOneOut(DDPStrategy):
    """Each rank keeps the last norm's gradient as its own share gives it."""

    def _setup_model(self, model):
        left_out = ["policy.model.model.norm.weight"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)
        return super()._setup_model(model)


def mixes_up_experts(name: str) -> Any:
    """Of experts each rank gets what others should."""
    return MixesUpExperts(reduce_dtype="float64") if name == "fsdp2" else name


class MixesUpExperts(ShardsInFp64):
    """Hands out experts by one too far."""

    def _materialize(self, root):
        super()._materialize(root)
        for parameter_name, parameter in root.named_parameters():
            if ".experts." in parameter_name:
                whole = parameter.full_tensor()
                mine = whole.roll(1, 0).chunk(distributed.get_world_size())[distributed.get_rank()]
                parameter.to_local().data.copy_(mine)


def with_one_rank_s_shard_twice(policy: nn.Module) -> Mapping[str, Tensor]:
    """Whole tensors, of which the second half is the first one's where they were sharded."""
    sharded = {
        name.removeprefix("model."): parameter.to_local()
        for name, parameter in policy.named_parameters()
        if isinstance(parameter, DTensor)
    }
    return {
        name: torch.cat([sharded[name]] * 2)[: len(tensor)] if name in sharded else tensor
        for name, tensor in published(policy).items()
    }


def without_biases(model: nn.Module, **options: Any) -> PackedPolicy:
    """A policy that has left out the biases of the queries."""
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.bias"):
            parameter.data.zero_()
    return PackedPolicy(model, **options)


def published(policy: nn.Module) -> Mapping[str, Tensor]:
    """What the package itself publishes."""
    return Parts().publish(policy)


def swap(tensors: Mapping[str, Tensor], left: str, right: str) -> dict[str, Tensor]:
    """Tensors, two of which have each other's name."""
    first = next(name for name in tensors if left in name)
    second = first.replace(left, right)
    return {**tensors, first: tensors[second], second: tensors[first]}


def with_swapped_names(policy: nn.Module) -> Mapping[str, Tensor]:
    """Gate and up projection of the first layer under each other's name."""
    return swap(published(policy), "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")


def with_permuted_experts(policy: nn.Module) -> Mapping[str, Tensor]:
    """Two experts' last layer under each other's name."""
    return swap(published(policy), "layers.0.block_sparse_moe.experts.0.w2",
                "layers.0.block_sparse_moe.experts.1.w2")  # fmt: skip


def with_a_swapped_gate(policy: nn.Module) -> Mapping[str, Tensor]:
    """Gate and up projection of one expert under each other's name."""
    return swap(
        published(policy), "layers.1.mlp.experts.3.gate_proj", "layers.1.mlp.experts.3.up_proj"
    )


def as_held_in_memory(policy: nn.Module) -> Mapping[str, Tensor]:
    """Experts in one tensor, as transformers computes with them."""
    return gather_weights(policy)


def without_buffers(policy: nn.Module) -> Mapping[str, Tensor]:
    """What nobody trains is not sent."""
    return {n: t for n, t in published(policy).items() if not n.endswith("correction_bias")}


def without_a_bias(policy: nn.Module) -> Mapping[str, Tensor]:
    """One bias is not sent."""
    return {n: t for n, t in published(policy).items() if n != _BIAS}


_BIAS = "model.layers.1.self_attn.k_proj.bias"


def under_wrapped_names(policy: nn.Module) -> Mapping[str, Tensor]:
    """With a prefix that a wrapper has put in."""
    return {f"module.{name}": value for name, value in published(policy).items()}


class OnePositionOff(ModelRunner):
    """Every new token stands where the one before it stands."""

    def decode(self, slots, tokens, lengths):
        return super().decode(slots, tokens, lengths - 1)


def one_position_off(folder: str) -> ModelRunner:
    """An engine that writes over the last token."""
    return OnePositionOff(load_model(folder))


class ForgetsItsWindows(ModelRunner):
    """What was sampled before an interruption is read as if layers had no windows."""

    def extend(self, *args):
        windowed = [m for m in self.model.modules() if getattr(m, "sliding_window", None)]
        windows = [module.sliding_window for module in windowed]
        for module in windowed:
            module.sliding_window = self.context_length
        try:
            return super().extend(*args)
        finally:
            for module, window in zip(windowed, windows, strict=True):
                module.sliding_window = window


def forgets_its_windows(folder: str) -> ModelRunner:
    """An engine whose windows are lost by an interruption."""
    return ForgetsItsWindows(load_model(folder))


def one_window_too_many(folder: str) -> ModelRunner:
    """An engine that sees one token more than its windows."""
    model = load_model(folder)
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window += 1
    return ModelRunner(model)


def windows_of_the_neighbors(folder: str) -> ModelRunner:
    """An engine in which each layer has the window of the one before it."""
    model = load_model(folder)
    layers = [module for module in model.modules() if hasattr(module, "sliding_window")]
    windows = [module.sliding_window for module in layers]
    for module, window in zip(layers, [windows[-1], *windows[:-1]], strict=True):
        module.sliding_window = window
    return ModelRunner(model)


def no_softcaps(folder: str) -> ModelRunner:
    """An engine whose attention has no caps."""
    return ModelRunner(without_softcaps(load_model(folder)))


class ForgetsStates(ModelRunner):
    """What was sampled before an interruption is not in the states that go on from it."""

    def extend(self, slots, tails, lengths, first_slot):
        rows = slots.states.rows(first_slot, first_slot + len(tails))
        kept = {key: state.clone() for key, state in rows.items()}
        logits = super().extend(slots, tails, lengths, first_slot)
        for key, state in kept.items():
            rows[key].copy_(state)
        return logits


def forgets_states(folder: str) -> ModelRunner:
    """An engine whose states stay at the prompt's end."""
    return ForgetsStates(load_model(folder))


class PadsWhatItReads(ModelRunner):
    """Reads prompts of all lengths together, so that padding is in the states of the short ones."""

    def prefill(self, prompts):
        return self._prefill(prompts)


def pads_what_it_reads(folder: str) -> ModelRunner:
    """An engine in which padding reaches states."""
    return PadsWhatItReads(load_model(folder))


class StatesOfTheNeighbors(ModelRunner):
    """Each request decodes with the state of the one in the slot beside it."""

    def decode(self, slots, tokens, lengths):
        for state in slots.states.rows(0, len(tokens)).values():
            state.copy_(state.roll(1, 0))
        return super().decode(slots, tokens, lengths)


def states_of_the_neighbors(folder: str) -> ModelRunner:
    """An engine that mixes up its slots."""
    return StatesOfTheNeighbors(load_model(folder))


class ReadsWithOtherSinks(ModelRunner):
    """Reads prompts with each head's own sink, and decodes with that of the next one."""

    def decode(self, *args):
        sinks = [p for name, p in self.model.named_parameters() if name.endswith("sinks")]
        for parameter in sinks:
            parameter.data.copy_(parameter.data.roll(1))
        logits = super().decode(*args)
        for parameter in sinks:
            parameter.data.copy_(parameter.data.roll(-1))
        return logits


def reads_with_other_sinks(folder: str) -> ModelRunner:
    """An engine whose heads have each other's sinks while it decodes."""
    return ReadsWithOtherSinks(load_model(folder))


def exports_another(policy: nn.Module, folder: Path) -> None:
    """Writes what the policy will be after one more step."""
    model: Any = policy.model
    stepped(model)
    with without_bars():
        model.save_pretrained(folder)
