"""The policy as the trainer sees it: packed tokens in, logprobs and entropies out."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_grpo.checks import require_count
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import (
    PACKED,
    NotPackedError,
    PackedLayout,
    register_packed_attention,
)
from lightning_grpo.policy.head import head_logprobs, largest_chunk
from lightning_grpo.policy.load import compute_as_served
from lightning_grpo.policy.norms import fuse_norms
from lightning_grpo.policy.rope import RowFactors

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


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
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_logits: int | None = None,
        share_prefixes: bool = True,
    ) -> None:
        super().__init__()
        if max_logits is not None:
            require_count("max_logits", max_logits, most=1 << 36)
        _check(model)
        register_packed_attention()
        model.set_attn_implementation(PACKED)
        fuse_norms(model)
        model.config.use_cache = False
        self.model = model
        self._factors = RowFactors(model)
        self.max_logits = max_logits
        self.share_prefixes = share_prefixes

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        temperature: Tensor | float = 1.0,
        with_entropy: bool = False,
        positions_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logprobs under softmax(logits / temperature), as the servers report them.

        Args:
            input_ids: int64 `[tokens]`.
            cu_seqlens: `[sequences + 1]`; None: the tokens are one sequence.
            temperature: One for all, or fp32 `[tokens]`.
            with_entropy: Whether to compute entropies too.
            positions_mask: Tokens whose logprobs are wanted (most often `response_mask`), bool
                `[tokens]`; the others get 0 and cost no logits. None: all.

        Returns:
            Logprobs `[tokens]`: entry t is log p(token t | tokens before t), 0 for the first
            token of each sequence. Entropies `[tokens]` of the distributions that the tokens were
            drawn from, laid out alike, or None. Both at least fp32.
        """
        layout = self._layout(input_ids, cu_seqlens)
        predicted = predicted_positions(layout, positions_mask)
        return self.score(input_ids, layout, predicted, temperature, with_entropy)

    def score(
        self,
        input_ids: Tensor,
        layout: PackedLayout,
        predicted: Tensor,
        temperature: Tensor | float = 1.0,
        with_entropy: bool = False,
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
        """
        hidden = self.hidden_states(input_ids, layout)
        logprobs, entropy = head_logprobs(
            hidden.index_select(0, layout.unique_of[predicted - 1]),
            self.model.get_output_embeddings().weight,
            input_ids[predicted],
            _per_row(temperature, predicted, hidden),
            with_entropy,
            self.max_logits or largest_chunk(hidden.device),
        )
        empty = logprobs.new_zeros(len(input_ids))
        logprobs = empty.index_copy(0, predicted, logprobs)
        return logprobs, None if entropy is None else empty.index_copy(0, predicted, entropy)

    def hidden_states(self, input_ids: Tensor, layout: PackedLayout) -> Tensor:
        """Compute what the head sees of each unique token, `[unique, hidden]`.

        Args:
            input_ids: int64 `[tokens]`.
            layout: Of these tokens.
        """
        if self.model.get_input_embeddings().training:
            compute_as_served(self.model)
        with self._factors.of_rows(layout):
            return self._hidden(input_ids, layout)

    def _layout(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> PackedLayout:
        if cu_seqlens is None:
            return PackedLayout.of_one(len(input_ids), input_ids.device)
        bounds = cu_seqlens.tolist()
        # A prompt is not the same to two sequences with other factors of RoPE.
        alike = self._factors.are_one([end - start for start, end in pairwise(bounds)])
        shared = input_ids if self.share_prefixes and alike else None
        return PackedLayout(cu_seqlens, shared, bounds)

    def _hidden(self, input_ids: Tensor, layout: PackedLayout) -> Tensor:
        """The last hidden state of each unique token, `[unique, hidden]`."""
        try:
            output = self.model.get_decoder()(
                input_ids=input_ids[layout.unique].unsqueeze(0),
                position_ids=layout.positions.unsqueeze(0),
                use_cache=False,
                packing=layout,
            )
        except NotPackedError as error:
            raise ConfigError(
                f"`model` must leave its attention to transformers, {type(self.model).__name__} "
                f"{error.reason}. Way out: a model that does, such as Qwen3 or Llama."
            ) from error
        hidden: Tensor = output.last_hidden_state.squeeze(0)
        return hidden


def predicted_positions(layout: PackedLayout, positions_mask: Tensor | None = None) -> Tensor:
    """Positions t whose token is predicted from t - 1: the one place that knows the shift.

    The first token of a sequence has nothing before it and is never among them. int64.
    """
    num_tokens, device = layout.num_tokens, layout.cu_seqlens.device
    if layout.num_sequences == 1 and positions_mask is None:
        return torch.arange(1, max(1, num_tokens), device=device)
    wanted = torch.ones(num_tokens, dtype=torch.bool, device=device)
    if positions_mask is not None:
        wanted &= positions_mask
    starts = layout.cu_seqlens[:-1].long()
    wanted[starts[starts < num_tokens]] = False
    return wanted.nonzero().squeeze(1)


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


def _check(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    if not model._supports_attention_backend:
        raise ConfigError(
            f"`model` must let transformers choose its attention, {name} doesn't. Way out: a "
            "model with `_supports_attention_backend`, such as Qwen3 or Llama."
        )
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise ConfigError(
            f"`model` must consist of attention layers, {name} has {sorted(other)}, which would "
            "run across the sequences of a packed row. Way out: a model without them."
        )
    transforms = [key for key in _LOGIT_TRANSFORMS if getattr(config, key, None) not in (None, 1)]
    if transforms:
        raise ConfigError(
            f"`model` must use its head's logits as they are, {name} sets {transforms}. "
            "Way out: a model without it."
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        found = type(head).__name__ + (" with one" if isinstance(head, nn.Linear) else "")
        raise ConfigError(
            f"`model` must end in a linear head without bias, {name} has {found}. "
            "Way out: a causal language model such as Qwen3 or Llama."
        )
