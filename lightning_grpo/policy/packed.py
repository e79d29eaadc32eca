"""PackedPolicy: packed tokens to logprobs, with its output head and its norms.

From hidden states to logprobs and entropies, without ever holding all logits at once.

Rows are taken in chunks; the backward pass computes each chunk's logits again. Where all rows fit
into one chunk the logits are kept, and no product is computed twice. Compiled in bf16, as many
probabilities are kept as a bound allows, in the dtype in which the gradient of their logits is
multiplied. Logits are fp32 (or wider) also when hidden states and weights are bf16, or are made so
by autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from lightning_grpo._compat import compile_sparingly, lets_choose_attention, no_split_modules
from lightning_grpo.algorithm.batch import to_device
from lightning_grpo.algorithm.layers import Replay, RouterReplay, fuse_norms
from lightning_grpo.errors import ConfigError, require_count
from lightning_grpo.policy.attention import (
    NotPackedError,
    PackedLayout,
    RowFactors,
    predicted_positions,
    register_packed_attention,
    size_of,
)
from lightning_grpo.policy.load import compute_as_served
from lightning_grpo.policy.recurrent import (
    STATE_FLOPS,
    attention_layers,
    keep_sequences_apart,
    recurrent_parts,
    state_numbers,
)
from lightning_grpo.policy.sequence_parallel import RowShare

MAX_CHUNK_LOGITS = 2**26
"""Logits of one chunk: 256 MiB in fp32."""


MAX_KEPT_PROBABILITIES = 2**30
"""2 GiB in bf16."""


def largest_chunk(device: torch.device) -> int:
    """Logits of one chunk: on GPUs each chunk's share of the head's gradient costs memory traffic.

    On one H200 with a vocabulary of 152k, 2^28 instead of 2^26 took 7 % off a whole step.
    """
    return MAX_CHUNK_LOGITS if device.type == "cpu" else 4 * MAX_CHUNK_LOGITS


def chunk_rows(vocab_size: int, max_logits: int = MAX_CHUNK_LOGITS) -> int:
    """How many rows are computed at once."""
    return max(1, max_logits // vocab_size)


def head_logprobs(  # noqa: PLR0913 - all of what a head is made of
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    max_logits: int = MAX_CHUNK_LOGITS,
    compiled: bool = False,
    cap: float | None = None,
    max_kept: int = MAX_KEPT_PROBABILITIES,
) -> tuple[Tensor, Tensor | None]:
    """Logprobs of `targets` under softmax(hidden weight^T / temperature), and its entropy.

    Args:
        hidden: `[rows, hidden]`.
        weight: Of the language-model head, `[vocab, hidden]`.
        targets: int64 `[rows]`.
        temperature: fp32 `[rows]`.
        with_entropy: Whether to compute the entropy too (with gradient).
        max_logits: Largest number of logits held at once.
        compiled: Whether what is done to the logits is compiled: each is then read once or twice.
        cap: Logits are cap * tanh(logits / cap) before the temperature; None: as they are.
        max_kept: Largest number of probabilities kept for backward, compiled in bf16.

    Returns:
        fp32 `[rows]`, and the same or None.
    """
    vocab, device = weight.shape[0], hidden.device.type
    rows = chunk_rows(vocab, max_logits)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with _without_autocast(device):
        keeps = compiled and cap is None and weight.dtype == torch.bfloat16
        most = max_kept // vocab if keeps and torch.is_grad_enabled() else 0
        logprobs, entropy = _Head.apply(
            hidden, weight, targets, temperature, with_entropy, rows, compiled, cap, most
        )
    return logprobs, entropy if with_entropy else None


def _without_autocast(device: str) -> torch.autocast:
    """It would round every product to bf16, logits too."""
    return torch.autocast(device, enabled=False)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype == torch.bfloat16:
        # Products of bf16 are exact in fp32, so this is the fp32 head at the speed of bf16.
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    return hidden.to(dtype) @ weight.to(dtype).t()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a total that may be wider, which it is rounded to once."""
    if total.is_cuda and total.dtype == torch.float32 and left.dtype == torch.bfloat16:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _of_targets(log_softmax: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Of each row: the target's logprob, and the entropy."""
    logprobs = log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1)
    if not with_entropy:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def _grad_logits(
    log_softmax: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of all logits but the targets'."""
    scale = grad_logprobs.unsqueeze(1)
    if grad_entropy is not None:
        # dH / dz_j = -p_j (log p_j + H)
        scale = scale + grad_entropy.unsqueeze(1) * (log_softmax + entropy.unsqueeze(1))
    return log_softmax.exp().mul_(-scale / temperature.unsqueeze(1)).to(dtype)


def _grad_targets(
    logprobs: Tensor, entropy: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """The gradient of the targets' logits, neither divided by the temperature nor capped yet."""
    found = grad_logprobs * (1 - logprobs.exp())
    if grad_entropy is not None:
        found -= grad_entropy * logprobs.exp() * (logprobs + entropy)
    return found


def _log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    # In place: memory that is new costs a CPU more than what is written into it.
    return torch.log_softmax(logits.div_(temperature.unsqueeze(1)), dim=-1)


def _look(
    logits: Tensor,
    temperature: Tensor,
    targets: Tensor,
    with_entropy: bool,
    cap: float | None,
    kept: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What `_of_targets` gives, the log of the sum of exponentials, and the probabilities to keep.

    Reads logits only.
    """
    scaled = capped(logits, cap) / temperature.unsqueeze(1)
    log_softmax = torch.log_softmax(scaled, dim=-1)
    logprobs, entropy = _of_targets(log_softmax, targets, with_entropy)
    log_sum = scaled.gather(1, targets.unsqueeze(1)).squeeze(1) - logprobs
    return logprobs, entropy, log_sum, None if kept is None else log_softmax.exp().to(kept)


def _grad_of_kept(
    probabilities: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """As `_grad_logits`, from what `_look` kept."""
    exact = probabilities.to(temperature.dtype)
    scale = grad_logprobs.unsqueeze(1)
    if grad_entropy is not None:
        log_softmax = exact.clamp_min(torch.finfo(exact.dtype).tiny).log()  # p log p is 0 at p = 0
        scale = scale + grad_entropy.unsqueeze(1) * (log_softmax + entropy.unsqueeze(1))
    return (exact * (-scale / temperature.unsqueeze(1))).to(probabilities.dtype)


def _grad_of_look(  # noqa: PLR0913 - each is read once
    logits: Tensor,
    temperature: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
    cap: float | None,
) -> Tensor:
    values = capped(logits, cap)
    log_softmax = values / temperature.unsqueeze(1) - log_sum.unsqueeze(1)
    more = (temperature, entropy, grad_logprobs, grad_entropy)
    if cap is None:
        return _grad_logits(log_softmax, *more, dtype)
    return _grad_logits(log_softmax, *more, values.dtype).mul_(_slope(values, cap)).to(dtype)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits bent so that none is beyond a cap (`final_logit_softcapping`); None: as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _slope(values: Tensor, cap: float) -> Tensor:
    """The derivative of what `capped` gave."""
    return 1 - (values / cap).square()


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def _run(function: Any, compiled: bool, *arguments: Any) -> Any:
    """Call a function of rows, compiled for any number of them."""
    if not compiled:
        return function(*arguments)
    for each in arguments:
        if isinstance(each, Tensor):
            torch._dynamo.maybe_mark_dynamic(each, 0)
    return _compiled(function)(*arguments)


def _parts(start: int, rows: int, *tensors: Tensor) -> list[Tensor]:
    """Rows of each, as tensors of their own: where a view begins would be compiled in."""
    return [each[start : start + rows].clone() for each in tensors]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - an autograd function takes no keywords
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        with_entropy: bool,
        rows: int,
        compiled: bool,
        cap: float | None,
        most_kept: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, log_sum = torch.zeros_like(logprobs), torch.empty_like(logprobs)
        temperature = temperature.to(dtype)
        looks = compiled or cap is not None  # the slope of a cap is known from logits alone
        kept: list[Tensor] = []  # of the first chunks, in turn
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            values = _logits(hidden[part], weight)  # read in one go; else made log-softmax
            if looks:
                keep = weight.dtype if min(start + rows, len(hidden)) <= most_kept else None
                own = _parts(start, rows, temperature, targets)
                logprobs[part], entropy[part], log_sum[part], probabilities = _run(
                    _look, compiled, values, *own, with_entropy, cap, keep
                )
                kept += [] if probabilities is None else [probabilities]
            else:
                values = _log_softmax(values, temperature[part])
                logprobs[part], entropy[part] = _of_targets(values, targets[part], with_entropy)
            if len(hidden) <= rows and not kept:
                kept = [values]
        ctx.rows, ctx.compiled, ctx.cap, ctx.looks = rows, compiled, cap, looks
        ctx.keeps_probabilities = bool(most_kept)
        ctx.set_materialize_grads(False)  # most often nobody asks for the entropy's
        ctx.save_for_backward(
            hidden, weight, targets, temperature, logprobs, entropy, log_sum, *kept
        )
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Any, ...]:
        hidden, weight, targets, temperature, logprobs, entropy, log_sum, *kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=temperature.dtype) if need_weight else None
        scale = torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs
        of_targets = _grad_targets(logprobs, entropy, scale, grad_entropy)
        if ctx.cap is not None:
            of_targets *= _slope((logprobs + log_sum) * temperature, ctx.cap)
        of_targets = (of_targets / temperature).to(weight.dtype)
        with _without_autocast(hidden.device.type):
            for i, start in enumerate(range(0, len(hidden), ctx.rows)):
                part = slice(start, start + ctx.rows)
                grad = _Head._grad_of_chunk(ctx, start, scale, grad_entropy, *kept[i : i + 1])
                grad.scatter_(1, targets[part].unsqueeze(1), of_targets[part].unsqueeze(1))
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), hidden[part].to(grad.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 7

    @staticmethod
    def _grad_of_chunk(
        ctx: Any,
        start: int,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The gradient of a chunk's logits but the targets', in the dtype of the weights."""
        hidden, weight, _, temperature, _, entropy, log_sum, *_ = ctx.saved_tensors
        tensors = (temperature, log_sum, entropy, grad_logprobs)
        temperature, log_sum, *own = _parts(start, ctx.rows, *tensors)
        of_entropy = None
        if grad_entropy is not None:
            (of_entropy,) = _parts(start, ctx.rows, grad_entropy)
        if kept is not None and ctx.keeps_probabilities:
            more = (temperature, *own, of_entropy)
            return cast("Tensor", _run(_grad_of_kept, ctx.compiled, kept, *more))
        values = _logits(hidden[start : start + ctx.rows], weight) if kept is None else kept
        if ctx.looks:
            rest = (temperature, log_sum, *own, of_entropy, weight.dtype, ctx.cap)
            return cast("Tensor", _run(_grad_of_look, ctx.compiled, values, *rest))
        log_softmax = _log_softmax(values, temperature) if kept is None else kept
        return _grad_logits(log_softmax, temperature, own[0], own[1], of_entropy, weight.dtype)


_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
"""The others that set `logits_scaling` (Granite, MiniCPM3) divide by it."""


@dataclass(frozen=True)
class LogitForm:
    """What a model does to the logits of its head.

    Attributes:
        scale: They are multiplied by it, which is a temperature.
        cap: They are bent so that none is beyond it; None: they are not.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """By the names that transformers' configs have for it."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scaling = float(getattr(config, "logits_scaling", None) or 1.0)
        multiplies = config.model_type in _MULTIPLY_BY_LOGITS_SCALING
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(scale * scaling if multiplies else scale / scaling, cap)

    def __call__(self, logits: Tensor) -> Tensor:
        """Make a model's logits of those of its head, `[..., vocab]`."""
        return capped(logits if self.scale == 1 else logits * self.scale, self.cap)


class PackedPolicy(nn.Module):
    """A causal language model of transformers on packed sequences.

    Each sequence gets the logprobs that it gets alone and that servers give it: the model computes
    in evaluation mode, whatever mode it is put into.

    All parameters are used from inside `forward`, so it is the right root for `fully_shard`. Give
    that root `MixedPrecisionPolicy(cast_forward_inputs=False)`: temperatures are no activations.

    Args:
        model: The model; its attention implementation is set to the packed one.
        max_logits: Largest number of logits held at once; None: 2^26 on CPUs, 2^28 (1 GiB) on GPUs.
        share_prefixes: Computes a prompt once for sequences in a row that begin with it.
        compiled: Whether the decoder's blocks, and on GPUs the head, are compiled by torch.compile.
        router_replay: Whether passes may be told which experts their tokens go through.

    Attributes:
        row_group: Ranks that compute each row together (sequence parallelism): all are given the
            same rows, and get all of their logprobs. None: each has rows of its own.

    Raises:
        ConfigError: The model can't be computed on packed sequences, or its routers be told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_logits: int | None = None,
        share_prefixes: bool = True,
        compiled: bool = False,
        router_replay: bool = False,
    ) -> None:
        super().__init__()
        self.row_group: ProcessGroup | None = None
        if max_logits is not None:
            require_count("max_logits", max_logits, most=1 << 36)
        _check(model)
        model.set_attn_implementation(register_packed_attention())
        if not compiled:  # the compiler fuses them with what stands beside them
            fuse_norms(model)
        model.config.use_cache = False
        self.model = model
        self.logit_form = LogitForm.of(model.config)
        self._factors = RowFactors(model)
        self._attention_layers = attention_layers(model.config) if recurrent_parts(model) else 0
        self.max_logits = max_logits
        self.share_prefixes = share_prefixes
        self.compiled = compiled
        self.router_replay = RouterReplay(model) if router_replay else None
        if compiled:
            compile_blocks(model)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        temperature: Tensor | float = 1.0,
        with_entropy: bool = False,
        positions_mask: Tensor | None = None,
        replay: Replay | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logprobs under softmax(logits / temperature), as the servers report them.

        Ids, bounds, mask and experts are best in host memory: where sequences start and what they
        share is then known without a wait for the GPU.

        Args:
            input_ids: int64 `[tokens]`.
            cu_seqlens: `[sequences + 1]`; None: the tokens are one sequence.
            temperature: One for all, or fp32 `[tokens]`.
            with_entropy: Whether to compute entropies too.
            positions_mask: Tokens whose logprobs are wanted (most often `response_mask`), bool
                `[tokens]`; the others get 0 and cost no logits. None: all.
            replay: The experts that tokens go through, and what is counted of them; nothing
                without `router_replay`. Prompts are shared where their experts are the same, too.

        Returns:
            Logprobs `[tokens]`: entry t is log p(token t | tokens before t), 0 for the first
            token of each sequence. Entropies `[tokens]` of the distributions that the tokens were
            drawn from, laid out alike, or None. Both at least fp32.
        """
        replay = None if self.router_replay is None else replay
        layout = self._layout(input_ids, cu_seqlens, replay)
        if self.row_group is not None:
            layout.share = RowShare(self.row_group, len(layout.unique))
        predicted = predicted_positions(layout, positions_mask)
        device = next(self.model.get_input_embeddings().parameters()).device
        if replay is not None and self.router_replay is not None:
            experts = replay.experts[layout.unique]
            experts = to_device(layout.own(experts, -1), device)
            replay.begin(experts, self.router_replay, layout.num_own)
        scored = self.score(
            to_device(input_ids, device),
            layout.to(device),
            to_device(predicted, device),
            temperature,
            with_entropy,
            replay,
        )
        if replay is not None and self.router_replay is not None and not self.compiled:
            self.router_replay.require_told(replay, type(self.model).__name__)
        return scored

    def score(
        self,
        input_ids: Tensor,
        layout: PackedLayout,
        predicted: Tensor,
        temperature: Tensor | float = 1.0,
        with_entropy: bool = False,
        replay: Replay | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `forward` returns, for a layout that is known already.

        Nothing here waits for the device, so that a CUDA graph can capture it. A sharded policy
        must be called by `forward`, which gathers its parameters.

        Args:
            input_ids: int64 `[tokens]`.
            layout: Of these tokens.
            predicted: Positions whose logprobs are wanted, as `predicted_positions` gives them.
            temperature: One for all, or fp32 `[tokens]`.
            with_entropy: Whether to compute entropies too.
            replay: The experts of the unique tokens.
        """
        hidden = self.hidden_states(input_ids, layout, replay)
        per_row, form = _per_row(temperature, predicted, hidden), self.logit_form
        share, before = layout.share, layout.unique_of[predicted - 1]
        logprobs, entropy = head_logprobs(
            hidden.index_select(0, before if share is None else before - share.start),
            self.model.get_output_embeddings().weight,
            input_ids[predicted],
            per_row if form.scale == 1 else per_row / form.scale,
            with_entropy,
            self.max_logits or largest_chunk(hidden.device),
            self.compiled and hidden.is_cuda,
            form.cap,
        )
        empty = logprobs.new_zeros(len(input_ids))

        def laid_out(values: Tensor) -> Tensor:
            own = empty.index_copy(0, predicted, values)
            return own if share is None else share.whole(own)

        return laid_out(logprobs), None if entropy is None else laid_out(entropy)

    def flops(self, lengths: Sequence[int], predicted: int) -> float:
        """Floating-point operations of a forward and a backward pass, as model FLOPs are counted.

        What is computed twice, or saved by sharing prompts, doesn't count; a frozen weight has no
        gradient of its own. Mixtures of experts count as if every expert saw every token.

        Args:
            lengths: Tokens of each sequence.
            predicted: Tokens whose logprobs are wanted.
        """
        config, head = (
            self.model.config.get_text_config(),
            self.model.get_output_embeddings().weight,
        )
        outside = {id(head), id(self.model.get_input_embeddings().weight)}
        trunk = [p for p in self.model.parameters() if id(p) not in outside]
        of_trunk = sum(p.numel() * (6 if p.requires_grad else 4) for p in trunk)
        of_head = head.numel() * (6 if head.requires_grad else 4)
        attending, width = attention_layers(config), 0
        if attending:
            heads = config.num_attention_heads
            width = heads * (size_of(config, "head_dim") or config.hidden_size // heads)
        # Two products of [length, length], halved by the causal mask; backward has twice that.
        attention = 6 * width * attending * sum(n * n for n in lengths)
        of_token = of_trunk + STATE_FLOPS * state_numbers(config)
        return float(of_token * sum(lengths) + of_head * predicted + attention)

    def hidden_states(
        self, input_ids: Tensor, layout: PackedLayout, replay: Replay | None = None
    ) -> Tensor:
        """Compute what the head sees of each unique token, `[unique, hidden]`.

        Args:
            input_ids: int64 `[tokens]`.
            layout: Of these tokens.
            replay: The experts of the unique tokens.
        """
        if self.model.get_input_embeddings().training:
            compute_as_served(self.model)
        with self._factors.of_rows(layout):
            return self._hidden(input_ids, layout, replay)

    def _layout(
        self, input_ids: Tensor, cu_seqlens: Tensor | None, replay: Replay | None
    ) -> PackedLayout:
        if cu_seqlens is None:
            return PackedLayout.of_one(len(input_ids), input_ids.device)
        bounds = cu_seqlens.tolist()
        # A prompt is not the same to two sequences with other factors of RoPE.
        alike = self._factors.are_one([end - start for start, end in pairwise(bounds)])
        shared = input_ids if self.share_prefixes and alike else None
        return PackedLayout(cu_seqlens, shared, bounds, None if replay is None else replay.experts)

    def _hidden(self, input_ids: Tensor, layout: PackedLayout, replay: Replay | None) -> Tensor:
        """The last hidden state of each unique token, `[unique, hidden]`."""
        routes = {} if replay is None else {"routes": replay}
        before = layout.attended
        try:
            output = self.model.get_decoder()(
                input_ids=layout.own(input_ids[layout.unique]).unsqueeze(0),
                position_ids=layout.own(layout.positions).unsqueeze(0),
                use_cache=False,
                packing=layout,
                **routes,
            )
        except NotPackedError as error:
            raise ConfigError(
                f"`model` must {error.rule}, {type(self.model).__name__} {error.reason}. Way out: "
                "a model that does, such as Qwen3 or Llama."
            ) from error
        if not self.compiled and layout.attended - before < self._attention_layers:
            raise ConfigError(
                f"`model` must leave its attention to transformers, {type(self.model).__name__} "
                f"computes that of some layers itself: {layout.attended - before} of "
                f"{self._attention_layers} asked for it. Way out: a model such as Qwen3 or Llama."
            )
        hidden: Tensor = output.last_hidden_state.squeeze(0)
        return hidden


def compile_blocks(model: PreTrainedModel, backend: Any = compile_sparingly) -> None:
    """Have each block of the decoder compiled when it is first run, for any number of tokens.

    Args:
        model: Changed in place; state dicts and names stay.
        backend: Of torch.compile.
    """
    kinds = set(no_split_modules(model))
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(dynamic=True, backend=backend)


def _per_row(temperature: Tensor | float, positions: Tensor, hidden: Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.new_full((len(positions),), float(temperature), dtype=dtype)
    if temperature.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"`temperature` must be fp32 (0.7 is no bf16 number), got {temperature.dtype}. Under "
            "fully_shard give the root MixedPrecisionPolicy(cast_forward_inputs=False)."
        )
    return temperature[positions] if temperature.ndim else temperature.expand(len(positions))


def _may_choose_attention(model: PreTrainedModel) -> bool:
    """Of hybrids transformers doesn't say it; that they do it is looked at in each pass."""
    return bool(recurrent_parts(model)) and lets_choose_attention(model)


def _check(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    keep_sequences_apart(model)
    if not (model._supports_attention_backend or _may_choose_attention(model)):
        raise ConfigError(
            f"`model` must let transformers choose its attention, {name} doesn't. Way out: a "
            "model with `_supports_attention_backend`, such as Qwen3 or Llama."
        )
    form = LogitForm.of(config)
    if form.cap is not None and form.scale != 1:
        raise ConfigError(
            f"`model` must scale its logits or cap them, {name} sets both, and which comes first "
            "is not known. Way out: a model that does one of the two."
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        found = type(head).__name__ + (" with one" if isinstance(head, nn.Linear) else "")
        raise ConfigError(
            f"`model` must end in a linear head without bias, {name} has {found}. "
            "Way out: a causal language model such as Qwen3 or Llama."
        )
