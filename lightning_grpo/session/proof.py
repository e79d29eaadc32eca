"""The trainer's side of a proof: what the sent weights score, and what the policy itself does.

The tensors that travel are scored as they are: a model whose parameters are their memory does it,
which also measures how much of a difference is rounding.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_grpo._compat import no_split_modules
from lightning_grpo.errors import ConfigError, WeightSyncError
from lightning_grpo.policy.attention import PackedLayout, predicted_positions
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import reshard, unshard
from lightning_grpo.weights.gather import ADAPTED_PART
from lightning_grpo.weights.proof import (
    Probe,
    Rounding,
    Scores,
    SentScores,
    check_policy,
    kind_of,
    mean_difference,
    require_finite,
)

logger = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]

FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max
ROWS = 256
"""Tokens whose logits are held at once where rounding is measured."""
WARM_UP_PASSES = 2
"""Before a capture: kernels are chosen and workspaces allocated in the first passes."""


@dataclass(frozen=True)
class _Prepared:
    """Sequences laid out once, so that a pass over them never waits for the device."""

    input_ids: Tensor
    layout: PackedLayout
    predicted: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> _Prepared:
        lengths = tuple(len(ids) for ids in sequences)
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        layout = PackedLayout(torch.tensor(bounds, device=device), bounds=bounds)
        if device.type != "cuda":
            layout.padded()
        flat = torch.tensor([i for ids in sequences for i in ids], device=device)
        return cls(flat, layout, predicted_positions(layout), lengths)


class SnapshotScorer:
    """A model whose parameters and kept buffers are the memory that travels to the servers.

    What it scores is what a server must score once it holds the same tensors, up to rounding. On
    GPUs one pass is captured as a CUDA graph, so that it costs no launches; that needs snapshots
    to be in the same memory each time (`memory`).

    Args:
        model: The model that is trained, sharded, adapted or not; only its class, its config and
            its buffers are used.
        keep_memory: Whether the first snapshot's memory is offered for all later ones.

    Raises:
        WeightSyncError: The model's class can't be built from its config.
    """

    def __init__(self, model: PreTrainedModel, *, keep_memory: bool = False) -> None:
        self._policy = PackedPolicy(_twin(model), share_prefixes=False).eval()
        self._slots = [(n, *_slot(self._policy.model, n)) for n in _sent(self._policy.model)]
        self._keep_memory = keep_memory
        self._held: Mapping[str, Tensor] | None = None
        self._prepared: dict[tuple[tuple[int, ...], ...], _Prepared] = {}
        self._graphs: dict[tuple[tuple[int, ...], ...], tuple[Any, Tensor]] = {}
        self._can_capture = keep_memory and torch.cuda.is_available()

    @property
    def memory(self) -> Mapping[str, Tensor] | None:
        """Where the next snapshot should go; None: anywhere."""
        return self._held if self._keep_memory else None

    def hold(self, snapshot: Mapping[str, Tensor]) -> None:
        """Make a snapshot's tensors the model's parameters.

        Raises:
            WeightSyncError: It lacks a weight of the model, or has one more.
        """
        if self._held is snapshot:
            return
        names = {name for name, _, _ in self._slots}
        if unknown := sorted(names ^ snapshot.keys()):
            raise WeightSyncError(
                f"the weights to publish are not those of {type(self._policy.model).__name__}: "
                f"{', '.join(unknown[:3])} {'differs' if len(unknown) == 1 else 'differ'}. "
                "`build_policy` must return a model that servers can load, under its own names."
            )
        for name, module, leaf in self._slots:
            if leaf in module._buffers:
                module._buffers[leaf] = snapshot[name]
            else:
                module._parameters[leaf] = nn.Parameter(snapshot[name], requires_grad=False)
        self._policy.model.tie_weights()
        self._held = snapshot
        self._graphs.clear()

    @torch.no_grad()
    def scores(
        self, sequences: Sequence[Sequence[int]], *, once: bool = False
    ) -> list[list[float]]:
        """Score sequences with the snapshot that is held, in its own dtype.

        Args:
            sequences: Token ids.
            once: They will not be scored again: nothing is captured for them.

        Returns:
            Logprobs `[sequences][tokens]`; entry 0 of a sequence says nothing.
        """
        key = tuple(map(tuple, sequences))
        if key in self._graphs:
            graph, output = self._graphs[key]
            graph.replay()
            return self._split(output, key)
        if self._can_capture and not once:
            self._capture(key)
        if key in self._graphs:
            return self.scores(sequences)
        return self._split(self._run(key), key)

    @torch.no_grad()
    def rounding(self, sequences: Sequence[Sequence[int]], kind: str) -> float:
        """Measure how far scores move by computing in a precision, with the weights as they are.

        Args:
            sequences: Token ids.
            kind: `float32` (against float64), or `float16`, `bfloat16` or `fp8` (against float32).

        Returns:
            Mean |difference of logprobs| over all tokens but the first of each sequence.
        """
        reference = torch.float64 if kind == "float32" else torch.float32
        with _in_any_precision(self._policy.model):
            exact = self._changed(sequences, lambda weight: weight.to(reference))
        if kind == "fp8":
            with _rounded_inputs(self._policy.model):
                return _distance(exact, self._changed(sequences, _as_fp8, torch.bfloat16))
        dtype: torch.dtype = getattr(torch, kind)
        return _distance(exact, self._changed(sequences, lambda weight: weight.to(dtype), dtype))

    @torch.no_grad()
    def weight_rounding(self, sequences: Sequence[Sequence[int]], steps: float = 0.5) -> float:
        """Measure how far scores move when every weight is off by up to `steps` units.

        A unit is the distance to the next number of the snapshot's dtype: rounding to the nearest
        is off by up to 0.5, rounding by chance by up to 1.

        Returns:
            Mean |difference of logprobs|, as `rounding`.
        """
        exact = self._changed(sequences, lambda weight: weight.float())
        generator = torch.Generator(self._device).manual_seed(0)

        def off(weight: Tensor) -> Tensor:
            draw = torch.rand(weight.shape, generator=generator, device=weight.device)
            return weight.float() + _unit(weight) * (2 * draw - 1) * steps

        return _distance(exact, self._changed(sequences, off))

    @property
    def _device(self) -> torch.device:
        return next(self._policy.parameters()).device

    def _layout(self, key: tuple[tuple[int, ...], ...]) -> _Prepared:
        if key not in self._prepared:
            self._prepared[key] = _Prepared.of(key, self._device)
        return self._prepared[key]

    def _run(self, key: tuple[tuple[int, ...], ...]) -> Tensor:
        prepared = self._layout(key)
        logprobs, _ = self._policy.score(prepared.input_ids, prepared.layout, prepared.predicted)
        return logprobs

    def _split(self, logprobs: Tensor, key: tuple[tuple[int, ...], ...]) -> list[list[float]]:
        rows = logprobs.double().cpu().split([len(ids) for ids in key])
        return [row.tolist() for row in rows]

    def _changed(
        self, sequences: Sequence[Sequence[int]], change: Change, logits: torch.dtype | None = None
    ) -> Tensor:
        """Scores with changed weights, fp64 `[predicted tokens]`; servers round their logits."""
        model, prepared = self._policy.model, self._layout(tuple(map(tuple, sequences)))
        layout, predicted = prepared.layout, prepared.predicted
        with _computing_with(model, change):
            hidden = self._policy.hidden_states(prepared.input_ids, layout)
            hidden = hidden[layout.unique_of[predicted - 1]]
            weight = model.get_output_embeddings().weight.t()
            scores = []
            for rows, targets in zip(
                hidden.split(ROWS), prepared.input_ids[predicted].split(ROWS), strict=True
            ):
                found = rows @ weight
                found = found.double() if logits is None else found.to(logits).double()
                found = self._policy.logit_form(found)
                scores.append(found.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1))
        return torch.cat(scores)

    def _capture(self, key: tuple[tuple[int, ...], ...]) -> None:
        """Capture a pass; a model that waits for the device in its pass is run as it is."""
        try:
            self._layout(key)
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_PASSES):
                    self._run(key)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Threads of collectives go on meanwhile: what they do is none of this graph's business.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self._run(key)
            self._graphs[key] = (graph, output)
        except RuntimeError as error:
            logger.info("the proof's pass is not captured as a CUDA graph: %s", error)
            self._can_capture = False


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without weights; its buffers are copies."""
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightSyncError(
            f"{type(model).__name__} can't be built from its config ({error}), so what is sent to "
            "servers can't be scored. Build it as transformers' own models are, or set "
            "`WeightSync(verify=False)`."
        ) from error
    buffers = dict(twin.named_buffers())
    for (name, _), (_, value) in zip(buffers.items(), model.named_buffers(), strict=True):
        module, leaf = _slot(twin, name)
        module._buffers[leaf] = value.detach().clone()
    return twin


def _sent(model: PreTrainedModel) -> list[str]:
    """Names of what `gather_weights` gives of a model."""
    kept = model.state_dict().keys()
    buffers = (n for n, value in model.named_buffers() if n in kept and value.is_floating_point())
    return [*(name for name, _ in model.named_parameters()), *buffers]


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter or buffer, and its name there."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().mean())


@contextmanager
def _in_any_precision(model: PreTrainedModel) -> Iterator[None]:
    """Compute experts one by one: grouped products of them know no float64."""
    grouped = getattr(model.config, "_experts_implementation", None)
    if grouped is not None:
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        if grouped is not None:
            model.set_experts_implementation(grouped)


@contextmanager
def _computing_with(model: PreTrainedModel, change: Change) -> Iterator[None]:
    """Compute with changed copies of the parameters, those of one block at a time.

    The head and the embedding are changed all the while: the head's weight is used without a call.
    """
    blocks = [m for m in model.modules() if type(m).__name__ in no_split_modules(model)]
    within = {id(m) for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if id(m) not in within]
    hooks = []
    for block in blocks:
        swapped = _Swapped(list(block.modules()), change)
        hooks.append(block.register_forward_pre_hook(lambda *_, s=swapped: s.swap()))
        hooks.append(block.register_forward_hook(lambda *_, s=swapped: s.restore()))
    rest = _Swapped(outside, change)
    rest.swap()
    try:
        yield
    finally:
        rest.restore()
        for hook in hooks:
            hook.remove()


class _Swapped:
    """Modules whose parameters are replaced for a while; shared ones stay shared."""

    def __init__(self, modules: list[nn.Module], change: Change) -> None:
        self._modules = modules
        self._change = change
        self._own: list[tuple[nn.Module, str, nn.Parameter]] = []

    def swap(self) -> None:
        changed: dict[int, Tensor] = {}
        for module in self._modules:
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                self._own.append((module, name, parameter))
                if id(parameter) not in changed:
                    changed[id(parameter)] = self._change(parameter.detach())
        for module, name, parameter in self._own:
            module._parameters[name] = changed[id(parameter)]  # type: ignore[assignment]

    def restore(self) -> None:
        for module, name, parameter in self._own:
            module._parameters[name] = parameter
        self._own.clear()


def _unit(weight: Tensor) -> Tensor:
    """The distance from each weight to the next number of its dtype; fp32."""
    _, exponent = torch.frexp(weight.float())
    epsilon = torch.finfo(weight.dtype).eps
    return torch.ldexp(torch.full_like(exponent, epsilon, dtype=torch.float32), exponent - 1)


def _as_fp8(weight: Tensor) -> Tensor:
    """A matrix as e4m3 with a scale for each row, which fp8 servers compute with; bf16."""
    weight = weight.to(torch.bfloat16)
    return _round_rows(weight) if weight.ndim > 1 else weight


def _round_rows(rows: Tensor) -> Tensor:
    scale = (rows.abs().amax(-1, keepdim=True) / FP8_LARGEST).clamp_min(1e-12)
    return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale


@contextmanager
def _rounded_inputs(model: nn.Module) -> Iterator[None]:
    """Round what goes into linear layers to e4m3, a scale for each token."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (_round_rows(inputs[0]), *inputs[1:]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- the trainer's side of a proof -----------------------------------------------------------------

DRIFT = 0.25
"""After so large a mean change of the scores a proof measures their rounding again before anything
else; after half of it once servers work again, so that the next proof needn't."""
KEPT_FRACTION = 0.05
"""Weights of at most this part of a GPU keep a place there, which lets a CUDA graph score them."""


class TrainerProof:
    """Rank 0's scores of what is sent to the servers, and its comparison with the policy.

    Args:
        probe: What is scored.
        server_kinds: Precisions that servers compute in, by their own names.
    """

    def __init__(self, probe: Probe, server_kinds: Collection[str]) -> None:
        self.probe = probe
        self._server_kinds = {kind_of(kind) for kind in server_kinds}
        self._scorer: SnapshotScorer | None = None
        self._measured: Scores | None = None
        self._rounding = Rounding()

    @property
    def memory(self) -> Mapping[str, Tensor] | None:
        """Where the next snapshot should be gathered; None: anywhere."""
        return self._scorer.memory if self._scorer is not None else None

    def score(self, policy: nn.Module, snapshot: Mapping[str, Tensor]) -> SentScores:
        """Score a snapshot; the first time thoroughly, and how it rounds is measured, too.

        Raises:
            WeightSyncError: The weights are broken, or not those of the policy's model.
        """
        first = self._scorer is None
        if self._scorer is None:
            keep = _fits_beside(snapshot)
            self._scorer = SnapshotScorer(packed(policy).model, keep_memory=keep)
        self._scorer.hold(snapshot)
        scores = self._scorer.scores(self.probe.sequences)
        require_finite(scores)
        kind = _kind(snapshot)
        if self._measured is None or mean_difference(self._measured, scores) > DRIFT:
            self._measure_again(scores)
        self._measure({kind, *self._server_kinds})
        if first and self.probe.thorough:
            scores = scores + self._scorer.scores(self.probe.thorough, once=True)
        return SentScores(scores, kind, self._rounding)

    def check_policy(
        self, version: int, sent: SentScores, scores: Scores, kind: str, merged: bool
    ) -> float:
        """Compare what was sent with the policy; see `weights.proof.check_policy`."""
        assert self._measured is not None
        self._measure({kind})
        scored = sent.scores[: len(self._measured)]
        sent = SentScores(sent.scores, sent.kind, self._rounding)
        diff = check_policy(version, sent, scores, kind, merged=merged)
        if mean_difference(self._measured, scored) > DRIFT / 2:
            self._measure_again(scored)
        return diff

    def _measure_again(self, scores: Scores) -> None:
        assert self._scorer is not None
        known = set(self._rounding.compute)
        self._measured = scores
        self._rounding = Rounding(weights=self._scorer.weight_rounding(self.probe.sequences))
        self._measure(known)

    def _measure(self, kinds: set[str]) -> None:
        assert self._scorer is not None
        known = self._rounding.compute
        new = {k: self._scorer.rounding(self.probe.sequences, k) for k in kinds - known.keys()}
        if new:
            self._rounding = Rounding({**known, **new}, self._rounding.weights)


@torch.no_grad()
def policy_scores(
    policy: nn.Module, sequences: Sequence[Sequence[int]]
) -> tuple[list[list[float]], str]:
    """Score sequences by the pass that trains; on every rank, since shards need all.

    Args:
        policy: A `PackedPolicy`, sharded or not, or what Fabric made of it: its pass is taken.
        sequences: Token ids.

    Returns:
        Logprobs `[sequences][tokens]`, of which entry 0 of a sequence says nothing, and the
        precision in which the policy computed.
    """
    device = next(policy.parameters()).device
    computed: list[torch.dtype] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        computed.append(output.last_hidden_state.dtype)

    hook = packed(policy).model.get_decoder().register_forward_hook(look)
    unshard(policy)
    try:
        scores = [
            policy(torch.tensor(ids).to(device, non_blocking=True))[0].float().tolist()
            for ids in sequences
        ]
    finally:
        hook.remove()
        reshard(policy)  # the optimizer and callbacks look at the shards
    return scores, str(computed[0]).removeprefix("torch.")


def packed(policy: nn.Module) -> PackedPolicy:
    """The policy inside of what Fabric or DDP put around it.

    Raises:
        ConfigError: There is none.
    """
    inner: Any = policy
    while not isinstance(inner, PackedPolicy):
        if not isinstance(inner, nn.Module) or not hasattr(inner, "module"):
            raise ConfigError(
                "`policy` must be a PackedPolicy, or what Fabric made of one, got a "
                f"{type(policy).__name__}."
            )
        inner = inner.module
    return inner


def is_adapted(policy: nn.Module) -> bool:
    """Whether adapters are merged into what is sent."""
    return any(ADAPTED_PART in name.split(".") for name, _ in policy.named_parameters())


def _kind(snapshot: Mapping[str, Tensor]) -> str:
    """The dtype in which most of a snapshot travels."""
    largest = max(snapshot.values(), key=lambda tensor: tensor.numel())
    return str(largest.dtype).removeprefix("torch.")


def _fits_beside(snapshot: Mapping[str, Tensor]) -> bool:
    """Whether the weights may keep their place on the GPU between two publishes."""
    some = next(iter(snapshot.values()))
    if not some.is_cuda:
        return False
    total = torch.cuda.get_device_properties(some.device).total_memory
    return sum(tensor.nbytes for tensor in snapshot.values()) <= KEPT_FRACTION * total
