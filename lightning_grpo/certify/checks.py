"""What is certified of a model, and the checks: each compares two ways to compute the same.

The policy that trains: its logprobs, packed, and their gradient. What leaves the trainer: published
weights, the engine, exports, adapters.
"""

from __future__ import annotations

import importlib.util
import io
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.certify.ranks import differences, strategy_of
from lightning_grpo.certify.tiny import (
    AllInFp64,
    difference,
    gradients_apart,
    pack,
    plain_logprobs,
    policy_logprobs,
    random_ids,
    rows_of,
    rows_with_prompts,
    tiny_model,
)
from lightning_grpo.engine.cache import SlotCache
from lightning_grpo.engine.model import (
    ModelRunner,
    check_servable,
    load_model,
    require_goes_on,
)
from lightning_grpo.engine.requests import UnservableError
from lightning_grpo.engine.updates import ModelWeights
from lightning_grpo.errors import ConfigError
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.policy.load import export_policy, without_bars
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.weights.gather import gather_weights, make_buckets, unpack

LOGPROB_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-6
"""Of fp32 logprobs, absolute; of fp64 gradients, relative to each parameter's own."""
APART_LIMIT = 1e-5
"""Of fp32 logprobs: what the order of sums makes of them where experts get other tokens."""
_BUCKET_BYTES = 50_000
"""So few that a tiny model's weights travel in several."""

Verdict = Literal["ok", "refused", "WRONG", "skipped", "untried"]


@dataclass(frozen=True)
class CheckLine:
    """What one check found.

    Attributes:
        check: Its name.
        verdict: `skipped` where the model has no such part, which is no failure; `untried` where
            nothing is known of it.
        found: In words.
        figure: The largest difference, where one was measured.
        limit: What it may be.
    """

    check: str
    verdict: Verdict
    found: str
    figure: float | None = None
    limit: float | None = None


def measured(check: str, figure: float, limit: float, found: str) -> CheckLine:
    """A line whose verdict is its figure's; what is not finite is wrong."""
    verdict: Verdict = "ok" if math.isfinite(figure) and figure <= limit else "WRONG"
    return CheckLine(check, verdict, found, figure, limit)


def _serve(folder: str) -> ModelRunner:
    runner = ModelRunner(load_model(folder))
    require_goes_on(runner)
    return runner


def _export(policy: nn.Module, folder: Path) -> None:
    model: Any = policy.model
    export_policy(model, None, folder)


def _publish(policy: nn.Module) -> dict[str, Tensor]:
    """What servers get, unpacked from the buckets in which it travels."""
    model: Any = policy.model
    sent = CheckpointNames(model).of(gather_weights(policy))
    return {n: t for bucket in make_buckets(sent, _BUCKET_BYTES) for n, t in unpack(bucket).items()}


@dataclass(frozen=True)
class Parts:
    """What is certified; the package's own by default, a test hands in others.

    Attributes:
        policy: A model of transformers to the policy that trains; takes `share_prefixes`.
        publish: A policy to the tensors that servers get, by name.
        engine: A folder to what serves it.
        export: Writes a policy to a folder.
        strategy: `ddp` or `fsdp2` to what the Trainer is given as its strategy on several ranks.
    """

    policy: Callable[..., nn.Module] = PackedPolicy
    publish: Callable[[nn.Module], Mapping[str, Tensor]] = _publish
    engine: Callable[[str], ModelRunner] = _serve
    export: Callable[[nn.Module, Path], None] = _export
    strategy: Callable[[str], Any] = strategy_of


@torch.no_grad()
def stepped(model: nn.Module, size: float = 0.05) -> None:
    """Move every parameter, as a step of training does; always in the same way."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


# -- the policy that trains ------------------------------------------------------------------------

_MICRO_BATCHES = 3


def packed(config: Any, parts: Parts) -> CheckLine:
    """Rows packed together, against each row alone by transformers' own forward."""
    rows = rows_of(config)
    with torch.no_grad():
        expected = plain_logprobs(tiny_model(config), rows)
    found = policy_logprobs(parts.policy(tiny_model(config)), rows)
    lengths = ", ".join(str(len(row)) for row in rows)
    return measured(
        "packed", difference(found, expected), LOGPROB_LIMIT,
        f"logprobs of rows of {lengths} tokens, packed, against each alone in transformers",
    )  # fmt: skip


def apart(config: Any, parts: Parts) -> CheckLine:
    """Rows whose neighbors in the pack have other tokens: nothing of one reaches another."""
    rows, others = rows_of(config), rows_of(config, 1)
    policy, figure = parts.policy(tiny_model(config)), 0.0
    for kept in (slice(0, None, 2), slice(1, None, 2)):
        beside = list(others)
        beside[kept] = rows[kept]
        lengths = [len(row) for row in rows]
        pair = (policy_logprobs(policy, each).split(lengths)[kept] for each in (rows, beside))
        figure = max(figure, difference(*map(torch.cat, pair)))
    return measured(
        "apart", figure, APART_LIMIT,
        "logprobs of rows, packed beside other ones of the same lengths",
    )  # fmt: skip


def prefixes(config: Any, parts: Parts) -> CheckLine:
    """Rows that share prompts: each prompt computed once, against once for each row."""
    rows = rows_with_prompts()
    shared, alone = (
        policy_logprobs(parts.policy(tiny_model(config), share_prefixes=share), rows)
        for share in (True, False)
    )
    return measured(
        "prefixes", difference(shared, alone), LOGPROB_LIMIT,
        "logprobs where prompts are computed once, against once for each row",
    )  # fmt: skip


def passes(config: Any, parts: Parts) -> CheckLine:
    """Two passes over the same tokens, in training mode."""
    policy, rows = parts.policy(tiny_model(config)).train(), rows_of(config)
    first, second = (policy_logprobs(policy, rows) for _ in range(2))
    return measured("passes", difference(first, second), 0.0, "two passes, alike bit for bit")


def gradient(config: Any, parts: Parts) -> CheckLine:
    """Of a weighted sum of logprobs, against autograd through transformers' own forward."""
    rows = rows_with_prompts(1) + rows_of(config, 1)
    plain, model = (tiny_model(config, dtype=torch.float64) for _ in range(2))
    with AllInFp64():
        _backward(plain_logprobs(plain, rows))
        _backward(parts.policy(model)(*pack(rows))[0])
    figure, worst = _gradient_difference(model, plain)
    return measured(
        "gradient", figure, GRADIENT_LIMIT,
        f"gradient in fp64, relative, against transformers' own; most in {worst}",
    )  # fmt: skip


def cuts(config: Any, parts: Parts) -> CheckLine:
    """The gradient of all rows at once, against that of several micro-batches."""
    rows = rows_of(config, 2)
    weights = _weights(sum(map(len, rows))).split([len(row) for row in rows])
    whole, parted = (tiny_model(config, dtype=torch.float64) for _ in range(2))
    policy = parts.policy(parted)
    with AllInFp64():
        _backward(parts.policy(whole)(*pack(rows))[0], torch.cat(weights))
        for start in range(_MICRO_BATCHES):
            part = slice(start, None, _MICRO_BATCHES)
            _backward(policy(*pack(rows[part]))[0], torch.cat(weights[part]))
    figure, worst = _gradient_difference(parted, whole)
    return measured(
        "cuts", figure, GRADIENT_LIMIT,
        f"gradient in {_MICRO_BATCHES} micro-batches, relative, against one; most in {worst}",
    )  # fmt: skip


def ranks(config: Any, parts: Parts) -> CheckLine:
    """A step of the Trainer on two ranks, in several micro-batches, against one rank's in one."""
    figure, worst = max(differences(config, parts), key=_size)
    return measured(
        "ranks", figure, GRADIENT_LIMIT,
        "loss, gradient (relative), logprobs and weights of a step in fp64 on two ranks, ddp and "
        f"fsdp2, against one rank's; most in {worst}",
    )  # fmt: skip


def _size(found: tuple[float, str]) -> float:
    return math.inf if math.isnan(found[0]) else found[0]


def checkpoint(config: Any, parts: Parts) -> CheckLine:
    """Two steps, against two with a checkpoint between them."""
    rows, written = rows_of(config, 3), io.BytesIO()
    straight, first, second = (parts.policy(tiny_model(config, seed)) for seed in (0, 0, 1))
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (straight, first, second)]
    for policy, optimizer in zip((straight, straight, first), (0, 0, 1), strict=True):
        _step(policy, optimizers[optimizer], rows)
    torch.save([first.state_dict(), optimizers[1].state_dict()], written)
    written.seek(0)
    weights, moments = torch.load(written, weights_only=True)
    second.load_state_dict(weights)
    optimizers[2].load_state_dict(moments)
    _step(second, optimizers[2], rows)
    return measured(
        "checkpoint", difference(*(policy_logprobs(p, rows) for p in (straight, second))), 0.0,
        "logprobs after two steps, and with a checkpoint between them, alike bit for bit",
    )  # fmt: skip


def _step(policy: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Tensor]) -> None:
    optimizer.zero_grad()
    _backward(policy(*pack(rows))[0])
    optimizer.step()


def flops(config: Any, parts: Parts) -> CheckLine:
    """Whether a step's operations can be counted, as they are for its metrics."""
    lengths = [len(row) for row in rows_of(config)]
    policy: Any = parts.policy(tiny_model(config))
    count = policy.flops(lengths, sum(lengths) - len(lengths))
    verdict: Verdict = "ok" if 0 < count < math.inf else "WRONG"
    return CheckLine("flops", verdict, f"{count:,.0f} operations of these rows, for metrics")


def _weights(count: int) -> Tensor:
    """Each token's own, as advantages are."""
    return 1.0 + torch.arange(count, dtype=torch.float64).sin() / 2


def _backward(logprobs: Tensor, weights: Tensor | None = None) -> None:
    weights = _weights(len(logprobs)) if weights is None else weights
    torch.autograd.backward([(logprobs * weights).sum()])


def _gradient_difference(left: nn.Module, right: nn.Module) -> tuple[float, str]:
    return gradients_apart(_gradients(left), _gradients(right))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


# -- what leaves the trainer -----------------------------------------------------------------------

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


CHECKS: tuple[Callable[[Any, Parts], CheckLine], ...] = (
    *(packed, apart, prefixes, passes, gradient, cuts, ranks, checkpoint, flops),
    *(names, engine, adapter, export),
)
"""In the order in which training would meet what they look at.

Each makes its models from a tiny config, and leaves nothing behind.
"""
