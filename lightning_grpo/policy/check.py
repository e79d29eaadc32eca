"""What is checked of a policy before servers are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_grpo.algorithm.layers import Replay
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import size_of
from lightning_grpo.policy.load import load_policy, load_tokenizer
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.policy.recurrent import recurrent_parts

_ROW_TOKENS = 16
_RENAMED = 0.01
"""Of a tokenizer's entries: a family's models rename a few of its reserved ones."""
_CPU_ROUNDING, _GPU_ROUNDING = 0.01, 0.1
"""Mean |dlogprob| of passes that draw nothing: of sums in another order, which a GPU chooses."""


def check_architecture(
    model: str,
    model_kwargs: dict[str, Any] | None = None,
    adapt: Callable[[PreTrainedModel], None] | None = None,
    router_replay: bool = False,
    row_ranks: int = 1,
) -> None:
    """Refuse a model that the packed pass can't compute, by one pass over shapes without values.

    Args:
        model: Hub id or folder.
        model_kwargs: For `from_pretrained`.
        adapt: What is done to the model once it is built (`LoRA.add_to`).
        router_replay: Whether its routers must take the experts that they are told.
        row_ranks: How many ranks would compute each row together.

    Raises:
        ConfigError: Why it can't be trained, and what to use instead.
    """
    policy = load_policy(model, meta=True, model_kwargs=model_kwargs)
    check_splittable(policy, row_ranks)
    if adapt is not None:
        adapt(policy)
    packed = PackedPolicy(policy, router_replay=router_replay)
    with torch.device("meta"), torch.no_grad():
        try:
            packed(torch.zeros(_ROW_TOKENS, dtype=torch.int64), replay=_no_routes(packed))
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"`model` must take packed sequences, {type(policy).__name__} doesn't: {error}. "
                "Way out: a causal language model such as Qwen3 or Llama."
            ) from error
        except (RuntimeError, NotImplementedError):
            pass  # what depends on values (the routes of some mixtures) shows when there are any


def check_splittable(model: PreTrainedModel, row_ranks: int) -> None:
    """Refuse a model whose rows can't be computed by several ranks together.

    Args:
        model: With values or without.
        row_ranks: How many.

    Raises:
        ConfigError: Its heads don't come out even, or it hands a state from token to token.
    """
    if row_ranks == 1:
        return
    name, alone = type(model).__name__, "1 leaves each sequence to one GPU."
    heads = size_of(model.config.get_text_config(), "num_attention_heads")
    if recurrent_parts(model):
        rule = f"must be 1 for {name}: its recurrent layers hand a state from token to token"
        raise ConfigError("sequence_parallel_size", rule, row_ranks, alone)
    if not isinstance(heads, int) or heads % row_ranks:
        rule = f"must divide the {heads} query heads of {name}, which the ranks share out"
        fitting = [n for n in range(2, row_ranks) if isinstance(heads, int) and heads % n == 0]
        smaller = f"{max(fitting)} works; " if fitting else ""
        raise ConfigError("sequence_parallel_size", rule, row_ranks, smaller + alone)


def _no_routes(packed: PackedPolicy) -> Replay | None:
    """Routes of which none is known, for a policy that can be told some."""
    if packed.router_replay is None:
        return None
    shape = packed.router_replay.shape
    return Replay(torch.full((_ROW_TOKENS, shape.layers, shape.top_k), -1))


def check_reference(
    reference: str, model: str, model_kwargs: dict[str, Any] | None = None, row_ranks: int = 1
) -> None:
    """Refuse a reference of another model that can't score the policy's tokens.

    Args:
        reference: Hub id or folder of the reference.
        model: Hub id or folder of the policy.
        model_kwargs: For `from_pretrained`.
        row_ranks: How many ranks would compute each row together.

    Raises:
        ConfigError: It can't score packed sequences, or its token ids mean something else.
    """
    check_architecture(reference, model_kwargs, row_ranks=row_ranks)
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


@torch.no_grad()
def check_rows_apart(policy: PackedPolicy) -> None:
    """Refuse a model whose rows depend on what they are packed with, as `check_two_passes` does.

    A kernel that doesn't heed where sequences begin would train on logprobs that no server gives.

    Raises:
        ConfigError: By how much.
    """
    embedding = policy.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    device = next(policy.parameters()).device
    ids = (torch.arange(3 * _ROW_TOKENS, device=device) * 41 + 7) % embedding.num_embeddings
    before, other, row = ids.split(_ROW_TOKENS)
    bounds = torch.tensor([0, _ROW_TOKENS, 2 * _ROW_TOKENS], device=device)
    found = [policy(torch.cat([each, row]), bounds)[0][_ROW_TOKENS:] for each in (before, other)]
    difference = (found[0] - found[1]).abs().mean().item()
    if difference > (_CPU_ROUNDING if device.type == "cpu" else _GPU_ROUNDING):
        raise ConfigError(
            "`model` must give a sequence the same logprobs whatever it is packed with, and those "
            f"of {type(policy.model).__name__} differ by {difference:.2g} on average. Way out: "
            "`lightning-grpo certify` says where; another version of the kernels for its layers."
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
