"""What is checked of a policy before servers are waited for, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import load_policy, load_tokenizer
from lightning_grpo.policy.packed import PackedPolicy

_ROW_TOKENS = 16
_RENAMED = 0.01
"""Of a tokenizer's entries: a family's models rename a few of its reserved ones."""
_GPU_ROUNDING = 0.1
"""Mean |dlogprob| of two passes that draw nothing: sums whose order is left to a GPU."""


def check_architecture(
    model: str,
    model_kwargs: dict[str, Any] | None = None,
    adapt: Callable[[PreTrainedModel], None] | None = None,
) -> None:
    """Refuse a model that the packed pass can't compute, by one pass over shapes without values.

    Args:
        model: Hub id or folder.
        model_kwargs: For `from_pretrained`.
        adapt: What is done to the model once it is built (`LoRA.add_to`).

    Raises:
        ConfigError: Why it can't be trained, and what to use instead.
    """
    policy = load_policy(model, meta=True, model_kwargs=model_kwargs)
    if adapt is not None:
        adapt(policy)
    packed = PackedPolicy(policy)
    with torch.device("meta"), torch.no_grad():
        try:
            packed(torch.zeros(_ROW_TOKENS, dtype=torch.int64))
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"`model` must take packed sequences, {type(policy).__name__} doesn't: {error}. "
                "Way out: a causal language model such as Qwen3 or Llama."
            ) from error
        except (RuntimeError, NotImplementedError):
            pass  # what depends on values (the routes of some mixtures) shows when there are any


def check_reference(reference: str, model: str, model_kwargs: dict[str, Any] | None = None) -> None:
    """Refuse a reference of another model that can't score the policy's tokens.

    Args:
        reference: Hub id or folder of the reference.
        model: Hub id or folder of the policy.
        model_kwargs: For `from_pretrained`.

    Raises:
        ConfigError: It can't score packed sequences, or its token ids mean something else.
    """
    check_architecture(reference, model_kwargs)
    ours = _vocabulary(model)
    rows, needed = (
        load_policy(each, meta=True, model_kwargs=model_kwargs).config.vocab_size
        for each in (reference, model)
    )
    beyond = [token for token, i in ours.items() if rows <= i < needed]
    if beyond:
        raise ConfigError(
            f"`kl.reference` must have an embedding of all tokens of the policy, {reference!r} has "
            f"one of {rows} rows, too few for {beyond[0]!r}. Way out: a reference of the same "
            "family, or none, which is the model at the start."
        )
    theirs = {i: token for token, i in _vocabulary(reference).items()}
    other = {i: token for token, i in ours.items() if theirs.get(i, token) != token}
    if len(other) > _RENAMED * len(ours):
        token_id = min(other)
        raise ConfigError(
            f"`kl.reference` must have the policy's tokenizer, in that of {reference!r} "
            f"{len(other)} ids mean something else: {token_id} is {theirs[token_id]!r} and not "
            f"{other[token_id]!r}. Way out: a reference of the same family, or none, which is the "
            "model at the start."
        )


def _vocabulary(model: str) -> dict[str, int]:
    """Ids of a model's tokens; none where weights come alone, of which nobody can tell."""
    try:
        return load_tokenizer(model).get_vocab()
    except ConfigError:
        return {}


@torch.no_grad()
def check_two_passes(policy: PackedPolicy) -> None:
    """Refuse a model that gives the same tokens other logprobs each time, or none that are finite.

    Such a model differs from the servers by its own noise, which no weight sync can mend. On every
    rank, as shards need all; the policy is in the state in which it trains.

    Raises:
        ConfigError: With the module that draws random numbers, where one does.
    """
    embedding = policy.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    device = next(policy.parameters()).device
    ids = (torch.arange(2 * _ROW_TOKENS, device=device) * 37 + 11) % embedding.num_embeddings
    bounds = torch.tensor([0, _ROW_TOKENS, 2 * _ROW_TOKENS], device=device)
    before = _random_state(device)
    first, second = (policy(ids, bounds)[0] for _ in range(2))
    if not first.isfinite().all():
        raise ConfigError(
            "`model` must give finite logprobs, and its weights give none that are: they hold NaN "
            "or infinity, or overflow. Way out: another checkpoint."
        )
    draws = not torch.equal(before, _random_state(device))
    difference = (first - second).abs().mean().item()
    if difference > (0.0 if draws or device.type == "cpu" else _GPU_ROUNDING):
        with _watching(policy.model, device) as drew:
            policy(ids, bounds)
        source = f", which {', '.join(drew[:3])} drew" if drew else ", not torch's"
        raise ConfigError(
            "`model` must give the same tokens the same logprobs, and two passes differ by "
            f"{difference:.2g} on average, by random numbers{source}. Set what makes them (a "
            "dropout, a jitter) to 0: by its name in `model_kwargs`, or in config.json."
        )


@contextmanager
def _watching(model: nn.Module, device: torch.device) -> Iterator[list[str]]:
    """Collects the innermost modules during whose forward random numbers are drawn."""
    drew: list[str] = []
    before: list[tuple[Tensor, int]] = []

    def enter(_: nn.Module, __: Any) -> None:
        before.append((_random_state(device), len(drew)))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        state, count = before.pop()
        if len(drew) == count and not torch.equal(state, _random_state(device)):
            drew.append(f"{names[module]} ({type(module).__name__})")

    names = {module: name for name, module in model.named_modules() if name}
    hooks = [
        hook
        for module in names
        for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    try:
        yield drew
    finally:
        for hook in hooks:
            hook.remove()


def _random_state(device: torch.device) -> Tensor:
    """Of torch's generators; it changes when one is drawn from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


HALF, FULL = 2, 4
"""Bytes of a number in bf16 and in fp32."""
ADAM_STATES = 2
ADAPTER_FRACTION = 0.02
"""Of the parameters, that an adapter of the usual rank trains."""
HIDDEN_KEPT, INTERMEDIATE_KEPT = 10, 4
"""Activations of a block that backward needs, in hidden and intermediate widths (measured on the
Qwen2.5-1.5B shape: 2.4 MiB a token without compilation)."""
HEAD_BYTES = 4 << 30
"""Logits of a chunk, their softmax and the head's gradient (`policy/packed.py`)."""
CONTEXT_BYTES = 2 << 30
"""CUDA's own, kernels, workspaces and what the allocator can't use."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model's size counts.

    Attributes:
        parameters: How many.
        layers: Blocks.
        hidden: Width between blocks.
        intermediate: Width within a block's MLP, as far as one token passes it.
        kv_width: Keys and values of one token in one layer, in numbers.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int

    @property
    def kv_bytes_per_token(self) -> int:
        """What a server keeps of each token, in bf16."""
        return self.layers * self.kv_width * HALF


def model_size(config: Any) -> ModelSize | None:
    """The size of a config's causal language model; None where its widths have other names."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if not (heads and hidden and layers) or hasattr(config, "kv_lora_rank"):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return ModelSize(
        sum(p.numel() for p in model.parameters()),
        layers,
        hidden,
        (intermediate or 4 * hidden) * experts,
        2 * kv_heads * head_dim,
    )


def training_bytes(
    size: ModelSize,
    tokens: int,
    *,
    ranks: int = 1,
    sharded: bool = True,
    checkpointing: bool = False,
    trained_fraction: float = 1.0,
    offloaded: bool = False,
) -> int:
    """Estimate what one rank takes of its GPU at the end of a micro-batch's forward pass.

    Args:
        size: Of the model.
        tokens: Of the largest micro-batch.
        ranks: Over which parameters, gradients and optimizer state are sharded.
        sharded: By `fsdp2`, which computes in bf16; otherwise all of it is on each rank, in fp32.
        checkpointing: Whether blocks keep their inputs only.
        trained_fraction: Of the parameters; an adapter trains a hundredth.
        offloaded: Whether parameters, gradients and optimizer state are in host memory.
    """
    shards = ranks if sharded else 1
    trained = FULL * (1 + ADAM_STATES) * trained_fraction  # gradients and Adam's two moments
    states = 0 if offloaded else size.parameters * (FULL + trained) / shards
    copies = size.parameters * HALF * (2 if sharded else 1)  # in bf16: to compute with, and to send
    compute = HALF if sharded else FULL
    block = HIDDEN_KEPT * size.hidden + INTERMEDIATE_KEPT * size.intermediate
    kept = size.hidden if checkpointing else block
    activations = tokens * compute * (size.layers * kept + (block if checkpointing else 0))
    return int(states + copies + activations + HEAD_BYTES + CONTEXT_BYTES)
