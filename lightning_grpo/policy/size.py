"""How large a model is, and what training it takes of a GPU: memory, and operations.

Held against what torch reported of peaks on an H200 (`benchmarks/results`): within a twentieth of
most, and a seventh of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.policy.attention import size_of
from lightning_grpo.policy.packed import largest_chunk
from lightning_grpo.policy.recurrent import STATE_FLOPS, attention_layers, state_numbers

HALF, FULL = 2, 4
"""Bytes of a number in bf16 and in fp32."""
ADAM_STATES = 2
ADAPTER_FRACTION = 0.02
"""Of the parameters, that an adapter of the usual rank trains."""
CHUNK_LOGITS = largest_chunk(torch.device("cuda"))
LOGIT_COPIES = 5
"""Of a chunk's logits while logprob and entropy are computed: as the head gives them, scaled, their
log-softmax, its exponential and the product of both, in fp32. Compiled, two of them and the
probabilities that are kept are no more."""
CONTEXT_BYTES = 2 << 30
"""CUDA's own, kernels, workspaces and what the allocator can't use."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model's size counts.

    Attributes:
        parameters: How many.
        embedding: Of these in the embedding and in the head (once where they are tied).
        layers: Blocks.
        hidden: Width between blocks.
        intermediate: Width within a block's MLP, as far as one token passes it.
        query_width: Queries of one token in one layer, in numbers.
        kv_width: Keys and values of one token in one layer, in numbers.
        vocab: Logits of a token.
        recurrent: Of the blocks, those without attention: what they remember doesn't grow.
        states: Numbers that a token reads and writes of what is remembered, in all blocks.
    """

    parameters: int
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    kv_width: int
    vocab: int
    recurrent: int = 0
    states: int = 0

    @property
    def attending(self) -> int:
        """Blocks with attention."""
        return self.layers - self.recurrent

    @property
    def kv_bytes_per_token(self) -> int:
        """What a server keeps of each token, in bf16."""
        return self.attending * self.kv_width * HALF


def model_size(config: Any) -> ModelSize | None:
    """The size of a config's causal language model; None where its widths have other names."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    intermediate = size_of(config, "intermediate_size") or getattr(config, "n_inner", None)
    if not (heads and hidden and layers) or hasattr(config, "kv_lora_rank"):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(end.weight): end.weight for end in ends if end is not None}
    head_dim = size_of(config, "head_dim") or hidden // heads
    kv_heads = size_of(config, "num_key_value_heads") or heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=sum(table.numel() for table in tables.values()),
        layers=layers,
        hidden=hidden,
        intermediate=(intermediate or 4 * hidden) * experts,
        query_width=heads * head_dim,
        kv_width=2 * kv_heads * head_dim,
        vocab=config.vocab_size,
        recurrent=layers - attention_layers(config),
        states=state_numbers(config),
    )


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory and time depend on it.

    Attributes:
        max_tokens: Of the largest micro-batch.
        ranks: GPUs that train.
        sharded: By `fsdp2`, which computes in bf16; otherwise all of the model is on each rank.
        half: Whether passes compute in bf16.
        keeps: Whether a sharded model's parameters stay gathered from pass to pass.
        checkpointing: Whether blocks keep their inputs only, and compute the rest again.
        compiled: Whether blocks are compiled.
        trained_fraction: Of the parameters; an adapter trains a hundredth.
        offloaded: Whether parameters and optimizer state are in host memory.
        reference: Where the reference policy of a KL penalty is: `gpu`, `host`, or there is none.
        chunk_logits: Logits that are computed at once.
        shard_size: Ranks that share one copy of a sharded model; None: all.
        row_ranks: Ranks that compute each row together.
    """

    max_tokens: int
    ranks: int = 1
    sharded: bool = True
    half: bool = True
    keeps: bool = True
    checkpointing: bool = False
    compiled: bool = False
    trained_fraction: float = 1.0
    offloaded: bool = False
    reference: str = ""
    chunk_logits: int = CHUNK_LOGITS
    shard_size: int | None = None
    row_ranks: int = 1

    @property
    def shares(self) -> int:
        """Into how many parts the sequences of a minibatch are cut."""
        return self.ranks // self.row_ranks

    @property
    def shards(self) -> int:
        """Ranks over which parameters and optimizer state are divided."""
        return min(self.shard_size or self.ranks, self.ranks) if self.sharded else 1

    @property
    def bytes_each(self) -> int:
        """Of a number in a pass."""
        return HALF if self.half else FULL

    def bounded(self, sequences: int, longest: int | None) -> TrainingSetup:
        """With no larger micro-batches than a minibatch makes.

        Args:
            sequences: Of a minibatch, which the ranks share out.
            longest: Tokens of the longest, which is never split; None: not known.
        """
        if longest is None:
            return self
        most = -(-sequences // self.shares) * longest
        return replace(self, max_tokens=min(max(self.max_tokens, longest), most))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank's GPU at the end of a micro-batch's forward pass, when they are most.

    Attributes:
        weights: fp32.
        gradients: fp32. Those of earlier micro-batches are whole on every rank: they are summed
            over ranks, and sharded, with the last one's.
        optimizer: The two moments of Adam, fp32.
        copies: The weights in bf16: to compute with, and to send to the servers.
        reference: The reference policy's weights.
        activations: What backward needs of each block.
        logits: Of one chunk, and what is computed of them.
        context: What torch doesn't count: CUDA's own, and what the allocator can't use.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    reference: int
    activations: int
    logits: int
    context: int = CONTEXT_BYTES

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def total(self) -> int:
        """What is taken of the GPU."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What torch counts, and a run logs as `health/gpu_peak_gb`."""
        return self.total - self.context


def kept_numbers(size: ModelSize, *, compiled: bool = False) -> int:
    """What backward needs of one block for each token, in numbers.

    Inputs and outputs of both norms; rotated queries, keys, values and what attention gives; the
    MLP's gate, its activation, its up projection and their product (the accounting of Korthikanti
    et al., arXiv 2205.05198, for blocks of today and packed sequences, which have neither dropout
    nor masks). A recurrent layer counts as if it were attention. Compiled, the norms' outputs, the
    activation and the product are computed again.
    """
    attention = 2 * size.query_width + size.kv_width
    return (2 if compiled else 4) * (size.hidden + size.intermediate) + attention


def training_memory(size: ModelSize, setup: TrainingSetup) -> TrainingMemory:
    """Estimate the memory of one rank.

    Args:
        size: Of the model.
        setup: How it is trained.
    """
    whole, trained = size.parameters, int(size.parameters * setup.trained_fraction)
    tokens = -(-setup.max_tokens // setup.row_ranks)
    buckets = 2 if setup.ranks > 1 and not setup.sharded else 1  # DDP has its own beside them
    block = kept_numbers(size, compiled=setup.compiled)
    kept = size.layers * size.hidden + block if setup.checkpointing else size.layers * block
    gathered = whole
    if setup.sharded and not setup.keeps:  # the root, and the blocks at work and next
        gathered = size.embedding + 2 * (whole - size.embedding) // size.layers
    if not setup.sharded and not setup.half:
        gathered = 0
    return TrainingMemory(
        weights=0 if setup.offloaded else FULL * whole // setup.shards,
        gradients=FULL * trained * buckets,
        optimizer=0 if setup.offloaded else ADAM_STATES * FULL * trained // setup.shards,
        copies=setup.bytes_each * gathered + HALF * whole,
        reference=FULL * whole // setup.shards if setup.reference == "gpu" else 0,
        activations=tokens * kept * setup.bytes_each,
        logits=LOGIT_COPIES * FULL * min(setup.chunk_logits, tokens * size.vocab),
    )


def training_flops(
    size: ModelSize, lengths: Sequence[int], predicted: int, trained_fraction: float = 1.0
) -> tuple[float, float]:
    """Operations of a forward and a backward pass, as `PackedPolicy.flops` counts them.

    Args:
        size: Of the model.
        lengths: Tokens of each sequence.
        predicted: Tokens whose logprobs are wanted.
        trained_fraction: Of the parameters: a frozen weight has no gradient of its own.

    Returns:
        Those of the blocks, and those of the head.
    """
    each = 4 + 2 * trained_fraction
    attention = 6 * size.query_width * size.attending * sum(n * n for n in lengths)
    per_token = each * (size.parameters - size.embedding) + STATE_FLOPS * size.states
    blocks = per_token * sum(lengths) + attention
    return blocks, each * size.vocab * size.hidden * predicted
