"""Checks of what leaves the trainer: published weights, the engine, exports, adapters."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.certify.parts import (
    LOGPROB_LIMIT,
    CheckLine,
    Parts,
    difference,
    measured,
    stepped,
)
from lightning_grpo.certify.rows import plain_logprobs, policy_logprobs, random_ids, rows_of
from lightning_grpo.certify.tiny import tiny_model
from lightning_grpo.engine.model import ModelRunner, SlotCache, check_servable
from lightning_grpo.engine.requests import UnservableError
from lightning_grpo.engine.updates import ModelWeights
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import without_bars
from lightning_grpo.policy.lora import LoRA

_PROMPTS, _SAMPLED = (3, 9, 20, 20), 12
_INTERRUPTED = 9
"""Tokens of the last prompt that are read as such; the others are read as sampled before."""
_RANK, _ALPHA = 4, 6


def names(config: Any, parts: Parts) -> CheckLine:
    """What is published after a step: under the checkpoint's names, and the same model."""
    trained = _trained(config)
    published = dict(parts.publish(parts.policy(_trained(config))))
    with tempfile.TemporaryDirectory() as scratch:
        kept = _checkpoint(trained, Path(scratch) / "own")
        served, problem = _served(config, published, Path(scratch) / "served")
    if served is None:
        return CheckLine("names", "WRONG", problem)
    figure = _apart(served, trained, config)
    missing, more = kept.keys() - published.keys(), published.keys() - kept.keys()
    if missing or more:
        had = f"the checkpoint has {_some(missing)}, servers get {_some(more)}"
        return CheckLine("names", "WRONG", had, figure, LOGPROB_LIMIT)
    if other := [name for name in kept if not torch.equal(kept[name], published[name])]:
        had = f"servers get other values than the checkpoint has of {_some(other)}"
        return CheckLine("names", "WRONG", had, figure, LOGPROB_LIMIT)
    found = f"logprobs of a model loaded from the {len(published)} tensors that servers get"
    return measured("names", figure, LOGPROB_LIMIT, found)


def export(config: Any, parts: Parts) -> CheckLine:
    """The folder that a checkpoint is exported to, as transformers loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        parts.export(parts.policy(_trained(config)), Path(scratch) / "out")
        model, problem = _loaded(Path(scratch) / "out")
    if model is None:
        return CheckLine("export", "WRONG", problem)
    return measured(
        "export", _apart(model, _trained(config), config), LOGPROB_LIMIT,
        "logprobs of the exported folder, loaded by transformers",
    )  # fmt: skip


def engine(config: Any, parts: Parts) -> CheckLine:
    """Tokens that the embedded engine samples once it has new weights, against one pass."""
    with tempfile.TemporaryDirectory() as folder, without_bars():
        tiny_model(config).save_pretrained(folder)
        try:
            check_servable(folder)
        except ConfigError as error:
            return CheckLine("engine", "skipped", f"not served here: {_reason(error)}")
        try:
            runner = parts.engine(folder)
        except UnservableError as error:
            return CheckLine("engine", "skipped", f"not served here: {error}")
    published = dict(parts.publish(parts.policy(_trained(config))))
    weights = ModelWeights(runner.model)
    weights.check(published, complete=True)
    with torch.no_grad():
        for name, tensor in reversed(published.items()):  # in any order, and each alone
            weights.writer({name: tensor})()
        try:
            rows, given = sampled(runner)
        except UnservableError as error:  # behind experts, which have values only
            return CheckLine("engine", "skipped", f"not served here: {error}")
        every = plain_logprobs(_trained(config), rows).split([len(row) for row in rows])
    expected = torch.stack([row[-_SAMPLED:] for row in every])
    return measured(
        "engine", difference(given, expected), LOGPROB_LIMIT,
        f"logprobs of {given.numel()} tokens that the embedded engine sampled, against one pass",
    )  # fmt: skip


def adapter(config: Any, parts: Parts) -> CheckLine:
    """A trained adapter: merged for the servers, against the policy that has it."""
    if importlib.util.find_spec("peft") is None:
        return CheckLine("adapter", "skipped", "PEFT is not installed (the extra `lora`)")
    try:
        model, which = _adapted(config)
    except ConfigError as error:
        return CheckLine("adapter", "skipped", f"no adapter: {error.sentence}")
    policy, rows = parts.policy(model), rows_of(config)
    with tempfile.TemporaryDirectory() as scratch:
        served, problem = _served(config, parts.publish(policy), Path(scratch) / "served")
    if served is None:
        return CheckLine("adapter", "WRONG", problem)
    with torch.no_grad():
        figure = difference(plain_logprobs(served, rows), policy_logprobs(policy, rows))
    found = f"logprobs with an adapter of {which}, merged, against beside the weights"
    return measured("adapter", figure, LOGPROB_LIMIT, found)


# ---- models, and the folders that they go through -----------------------------------------------


def _trained(config: Any) -> PreTrainedModel:
    """The model a step after its start."""
    model = tiny_model(config)
    stepped(model)
    return model


@torch.no_grad()
def _apart(left: PreTrainedModel, right: PreTrainedModel, config: Any) -> float:
    rows = rows_of(config)
    return difference(plain_logprobs(left, rows), plain_logprobs(right, rows))


def _adapted(config: Any) -> tuple[PreTrainedModel, str]:
    """With an adapter that isn't where it began, of all layers or else of the attention's."""
    model, which = tiny_model(config), "all layers"
    try:
        LoRA(_RANK, _ALPHA).add_to(model)
    except ConfigError:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = sorted({n.rpartition(".")[2] for n in linear if "attn" in n or "attention" in n})
        if not targets:
            raise
        model, which = tiny_model(config), ", ".join(targets)
        LoRA(_RANK, _ALPHA, tuple(targets)).add_to(model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, which


def _checkpoint(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What transformers writes of a model."""
    with without_bars():
        model.save_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _served(
    config: Any, published: Mapping[str, Tensor], folder: Path
) -> tuple[PreTrainedModel | None, str]:
    """What transformers makes of published tensors, or what is wrong with them."""
    start = tiny_model(config)
    folder.mkdir()
    start.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().clone() for name, tensor in published.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return _loaded(folder)


def _loaded(folder: Path) -> tuple[PreTrainedModel | None, str]:
    """A folder's model, or what it lacks and has too much of."""
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    info = loaded[1]
    problems = {
        "missing, so that the old stays:": info["missing_keys"],
        "known to no model:": info["unexpected_keys"],
        "of another shape:": [each[0] for each in info["mismatched_keys"]],
    }
    said = [f"{what} {_some(sorted(found))}" for what, found in problems.items() if found]
    return (None, "; ".join(said)) if said else (loaded[0].eval(), "")


def _some(found: Sequence[str] | Collection[str]) -> str:
    """The first of some names, and how many there are."""
    first, *more = sorted(found) or ["none else"]
    return f"{first} and {len(more)} more" if more else first


def _reason(error: ConfigError) -> str:
    """What comes after the name of the model, which is a folder that was there for a moment."""
    return error.sentence.partition("): ")[2] or error.sentence


def sampled(runner: ModelRunner) -> tuple[list[Tensor], Tensor]:
    """Have prompts answered side by side: the first greedily, the others by chance.

    They lie on both sides of a tiny model's windows, and some answers cross to the other one. The
    last goes on after an interruption.

    Returns:
        Prompts with their answers, and the logprobs of the answers' tokens `[prompts, tokens]`.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [random_ids(n, generator) for n in _PROMPTS]
    begun, tail = prompts[-1][:_INTERRUPTED], prompts[-1][_INTERRUPTED:]
    states = runner.prefill([prompt.tolist() for prompt in (*prompts[:-1], begun)])
    slots = SlotCache(len(prompts), max(_PROMPTS) + _SAMPLED)
    slots.reserve(len(prompts), max(_PROMPTS) + 1, states[0].kv)
    for slot, state in enumerate(states):
        slots.place(slot, 1, state.kv, state.states)
    lengths = torch.tensor(_PROMPTS)
    resumed = runner.extend(slots, [tail.tolist()], torch.tensor([len(begun)]), len(prompts) - 1)
    logits = torch.cat([*(state.logits[None] for state in states[:-1]), resumed])
    tokens, logprobs = [], []
    for step in range(_SAMPLED):
        chosen = logits.softmax(-1).multinomial(1, generator=generator)
        chosen[0] = logits[0].argmax()
        tokens.append(chosen)
        logprobs.append(logits.log_softmax(-1).gather(1, chosen))
        if step < _SAMPLED - 1:
            logits = runner.decode(slots, chosen.squeeze(1), lengths + step)
    answers = torch.cat(tokens, 1)
    rows = [torch.cat([prompt, row]) for prompt, row in zip(prompts, answers, strict=True)]
    return rows, torch.cat(logprobs, 1)
