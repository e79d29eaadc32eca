"""Layers of transformers as trainers and servers compute them: routers, bent scores, norms.

Routers: where those of a mixture of experts are, and a choice in the place of theirs. Rollout
routing replay (R3, arXiv 2510.11370). In half precision a trainer and a server choose other
experts for a few tokens, and the logprobs of these tokens then differ by far more than rounding.
With the experts that the server chose the trainer computes what the server did.

Routers of transformers work alike: they score the experts, take the best by `topk`, and weigh
these by what they scored. Only the outcome of `topk` is replaced. Groups, biases, normalization and
scaling stay the architecture's own, and so does the gradient, which flows through the weights of
the experts that are taken. A router that works otherwise is found out by trying it, and refused.

Attention whose scores are bent, in plain operations: soft caps (Gemma 2), sinks (gpt-oss). No
kernel of torch knows caps or sinks, so that all scores of a row exist at once: slower, and memory
of length squared.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from torch.overrides import TorchFunctionMode

from lightning_grpo.algorithm.metrics import Mean, Metrics
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import RouterShape

_ROUTER = re.compile(r"(Router|Gate)$")
"""How transformers calls the classes of what chooses experts."""
_TRIED = 7
"""Tokens on which a router is tried."""
_WAY_OUT = "Leave `router_replay` out, or train a mixture such as Qwen3-MoE."


class _TopK(TorchFunctionMode):
    """Hands each choice of experts that a router makes to a function, and takes its result.

    Args:
        choose: Scores `[tokens, experts]` and the experts that are best by them, `[tokens, top_k]`,
            to the experts that are taken.
    """

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        scores = args[0]
        chosen = self._choose(scores, result.indices)
        if chosen is result.indices:
            return result
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))


@dataclass
class Replay:
    """The experts that tokens of one pass went through elsewhere, and what the pass found of them.

    Attributes:
        experts: `[tokens, layers, top_k]`, of any integer dtype; what is no expert's number (all
            bits set) leaves the choice to the router.
        computed: Filled by the pass: those of the tokens that it computes, `[unique, layers,
            top_k]`.
        counts: Filled by the pass: choices (of a token in a layer) that were replaced, and those
            where the router alone would have taken other experts; int64 `[2]`.
        num_choices: Filled by the pass: all of them.
        num_told: Routers that the experts came to, where nothing is compiled.
    """

    experts: Tensor
    computed: Tensor | None = None
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    num_choices: int = 0
    num_told: int = 0

    def begin(self, experts: Tensor, routers: RouterReplay, num_tokens: int) -> None:
        """Bring the experts of the tokens that a pass computes, on its device; counts anew.

        Args:
            experts: `[tokens, layers, top_k]`.
            routers: Of the model.
            num_tokens: The first so many count; what follows fills up.
        """
        if experts.shape[1:] != (routers.shape.layers, routers.shape.top_k):
            raise ValueError(
                f"`experts` must be [tokens, {routers.shape.layers}, {routers.shape.top_k}], got "
                f"{list(experts.shape)}."
            )
        self.computed = experts
        self.counts = torch.zeros(2, dtype=torch.int64, device=experts.device)
        self.num_choices = num_tokens * routers.num_routers

    def metrics(self, nothing: bool = False) -> Metrics:
        """`moe/...`, over the choices of one pass; to be read before its backward.

        Args:
            nothing: Whether the pass was over nothing that is trained on.
        """
        replayed, rerouted = self.counts.clone().unbind()  # the backward may count again
        return {
            "moe/replayed": Mean(replayed, 0 if nothing else self.num_choices),
            "moe/rerouted": Mean(rerouted, replayed),
        }


@dataclass(frozen=True)
class RoutersOf:
    """The routers of a model.

    Attributes:
        by_layer: Decoder layers that have one, by their number, each with its router.
        shape: Of what all of them choose.
    """

    by_layer: dict[int, tuple[nn.Module, nn.Module]]
    shape: RouterShape


class RouterReplay:
    """Has the routers of a model choose what `routes=Replay(...)` says, of each pass by itself.

    The routes come to each layer's attention as an argument, as all that belongs to a pass does,
    and from there to the router behind it. So a layer that is computed again in the backward pass
    takes the same ones, whether its own hooks are run again or not.

    Args:
        model: Changed in place; parameters and names stay.

    Raises:
        ConfigError: It has no routers, or one that chooses in another way.
    """

    def __init__(self, model: nn.Module) -> None:
        routers = routers_of(model)
        self.shape = routers.shape
        self.num_routers = len(routers.by_layer)
        router: Any
        for index, (layer, router) in routers.by_layer.items():
            router.given = None
            router.forward = MethodType(_forward, router)
            hand_over = partial(_hand_over, router, index, routers.shape.experts)
            for part in layer.children():
                part.register_forward_pre_hook(hand_over, with_kwargs=True)

    def require_told(self, replay: Replay, model: str) -> None:
        """Refuse a model that keeps from its routers what came with a pass.

        Raises:
            ConfigError: With its name.
        """
        if replay.num_told < self.num_routers:
            raise ConfigError(
                "router_replay",
                "needs a model that passes on to its attention what came with a pass",
                model,
                _WAY_OUT,
            )


def _hand_over(
    router: Any,
    index: int,
    num_experts: int,
    part: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
) -> None:
    if "packing" not in kwargs:
        return  # not the attention
    replay: Replay | None = kwargs.get("routes")
    given = None
    if replay is not None and replay.computed is not None:
        given = partial(_replayed, replay.computed[:, index].long(), replay.counts, num_experts)
        if not torch.compiler.is_compiling():
            replay.num_told += 1
    router.given = given


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    given, self.given = self.given, None
    if given is None:
        return type(self).forward(self, *args, **kwargs)
    with _TopK(given):
        return type(self).forward(self, *args, **kwargs)


def _replayed(
    experts: Tensor, counts: Tensor, num_experts: int, scores: Tensor, own: Tensor
) -> Tensor:
    """The experts that are given, the router's own where none are."""
    if scores.shape != (len(experts), num_experts) or own.shape != experts.shape:
        return own  # a choice among groups
    known = ((experts >= 0) & (experts < num_experts)).all(1, keepdim=True)
    chosen = torch.where(known, experts, own)
    differs = (chosen.sort(1).values != own.sort(1).values).any(1)
    counts += torch.stack([known.sum(), differs.sum()])
    return chosen


class RouteRecorder:
    """Listens to what the routers of a model choose.

    Args:
        routers: Of a model, which is changed in place.
    """

    def __init__(self, routers: RoutersOf) -> None:
        self._shape = routers.shape
        self._chosen: dict[int, Tensor] = {}
        for index, (_, router) in routers.by_layer.items():
            router.register_forward_hook(partial(self._hear, index))

    def _hear(self, index: int, router: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        self._chosen[index] = output[2]

    def take(self) -> Tensor:
        """The experts of the last pass, int32 `[tokens, layers, top_k]`; 0 in layers without."""
        tokens = len(next(iter(self._chosen.values())))
        experts = torch.zeros(tokens, self._shape.layers, self._shape.top_k, dtype=torch.int32)
        for index, chosen in self._chosen.items():
            experts[:, index] = chosen
        self._chosen.clear()
        return experts


def routers_of(model: nn.Module) -> RoutersOf:
    """Find and try the routers of a causal language model; it may be one without values.

    Raises:
        ConfigError: It has none, or one whose choice can't be replaced.
    """
    of_model: Any = model
    name, config = type(model).__name__, of_model.config.get_text_config()
    layers = _decoder_layers(model, config.num_hidden_layers)
    found = {i: list(_routers_in(layer)) for i, layer in enumerate(layers)}
    of_layer = {i: routers for i, routers in found.items() if routers}
    if not of_layer:
        raise ConfigError(
            "router_replay",
            "needs a mixture of experts whose decoder layers have a router each",
            name,
            "Leave `router_replay` out.",
        )
    sizes: dict[Any, tuple[int, int]] = {}
    for routers in of_layer.values():
        for router in routers:
            shapes = (p.shape for p in router.parameters())
            kind = (type(router), vars(router).get("top_k"), *shapes)
            if kind not in sizes:
                sizes[kind] = _try(router, config.hidden_size, name)
    if len(set(sizes.values())) > 1 or any(len(routers) > 1 for routers in of_layer.values()):
        raise ConfigError(
            "router_replay",
            "needs one router in a layer, all of the same size",
            name,
            _WAY_OUT,
        )
    ((top_k, experts),) = set(sizes.values())
    by_layer = {i: (layers[i], routers[0]) for i, routers in of_layer.items()}
    return RoutersOf(by_layer, RouterShape(len(layers), top_k, experts))


def _decoder_layers(model: Any, number: int) -> Sequence[nn.Module]:
    """The blocks of the decoder, by the config's number of them; none where it counts otherwise."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    return next((list(each) for each in lists if len(each) == number), [])


def _routers_in(layer: nn.Module) -> Iterator[nn.Module]:
    return (m for m in layer.modules() if _ROUTER.search(type(m).__name__))


@torch.no_grad()
def _try(router: nn.Module, hidden_size: int, model: str) -> tuple[int, int]:
    """How many experts a router takes of how many, found out on random values.

    Raises:
        ConfigError: Other experts than its own can't be put in their place.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        twin = copy.deepcopy(router).to_empty(device="cpu").float().eval()
        for values in (*twin.parameters(), *twin.buffers()):
            values.zero_()
            if not values.is_floating_point():
                continue  # a table of routes that don't follow from scores
            # Scores of about 1, so that no expert's weight is too small for fp32.
            values.normal_(std=hidden_size**-0.5, generator=generator)
        hidden = torch.randn(_TRIED, hidden_size, generator=generator)
        for rows in (hidden, hidden[None]):
            try:
                found = _tried(twin, rows)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                continue
            if found is not None:
                return found
    raise ConfigError(
        "router_replay",
        "needs routers that take the best experts by `topk` and weigh these",
        f"{type(router).__name__} of {model}, which chooses otherwise",
        _WAY_OUT,
    )


def _tried(router: nn.Module, hidden: Tensor) -> tuple[int, int] | None:
    choices: list[tuple[Tensor, Tensor]] = []

    def watch(scores: Tensor, own: Tensor) -> Tensor:
        choices.append((scores, own))
        return own

    def forward(choose: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with _TopK(choose):
            _, weights, experts = router(hidden, *more)
        return weights, experts

    wanted = list(inspect.signature(type(router).forward).parameters)[2:]
    linear = max(router.parameters(), key=Tensor.numel)
    more = [torch.zeros(len(linear))] * len(wanted)  # biases of the choice
    weights, own = forward(watch)
    scores, taken = choices[-1]
    num_experts = scores.shape[-1]
    replay = partial(_replayed, counts=torch.zeros(2, dtype=torch.int64), num_experts=num_experts)
    other = (own + 1) % num_experts
    flipped, given = (
        forward(lambda s, o, e=experts: replay(e, scores=s, own=o))  # type: ignore[misc]
        for experts in (own.flip(1), other)
    )
    works = (
        torch.equal(own, taken)
        and torch.allclose(flipped[0], weights.flip(1))
        and torch.equal(given[1], other)
        and bool((given[0].isfinite() & (given[0] != 0)).all())
    )
    return (own.shape[1], num_experts) if works else None


# -- attention scores that are bent ----------------------------------------------------------------


@dataclass(frozen=True)
class ScoreForm:
    """What is done to scores before they become weights.

    Attributes:
        softcap: They are bent so that none is beyond it; None: they are not.
        sinks: `[heads]`: the score of one more key, to which each query gives a share of its
            attention and which has no value; None: there is none.
    """

    softcap: float | None
    sinks: Tensor | None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self | None:
        """By the names under which transformers hands them to attention; None: neither is there."""
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        return None if softcap is None and sinks is None else cls(softcap, sinks)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool `[length, length]`.

    Args:
        length: Of the sequence.
        window: Tokens that one can see, itself included; None: all before it.
        device: Where.
    """
    steps = torch.arange(length, device=device)
    distance = steps.unsqueeze(1) - steps.unsqueeze(0)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def bent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float | None,
    form: ScoreForm,
) -> Tensor:
    """Attention `[batch, heads, queries, value_dim]`; scores and weights are fp32 or wider.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key heads, keys, head_dim]`; each head serves as many of the query's.
        value: `[batch, key heads, keys, value_dim]`.
        visible: Which keys each query sees, one at least; bool, as `[batch, heads, queries, keys]`.
        scale: Of the scores; None is 1 / sqrt(head_dim).
        form: What is done to them.
    """
    batch, heads, queries, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, key.shape[1], -1, dim)
    products = (grouped @ key.to(wide).transpose(2, 3)).reshape(batch, heads, queries, -1)
    scores = products * (dim**-0.5 if scale is None else scale)
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.to(wide).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    mixed = weights.reshape(batch, key.shape[1], -1, key.shape[2]) @ value.to(wide)
    return mixed.reshape(batch, heads, queries, -1).to(value.dtype)


# -- norms ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """What transformers' norms have in common."""

    weight: Tensor
    variance_epsilon: float


def fuse_norms(model: nn.Module) -> None:
    """Has every plain RMS norm of a model computed in fewer passes over its rows, in place.

    On GPUs by torch's kernel, which rounds once, where transformers rounds before it scales: a
    forward and backward of 24 sequences of Qwen2.5-1.5B's shape took 348 ms instead of 388 on an
    H200. On CPUs the values are transformers' own, and `_Norm` has the gradient.
    """
    plain = {kind for kind in map(type, model.modules()) if is_plain(kind)}
    for module in model.modules():
        if type(module) in plain:
            module.forward = MethodType(_normalize, module)


def is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class scales by weight / rms, found out by trying: some scale by 1 + weight."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    try:
        with torch.device("cpu"):  # the model itself may be made without storage
            norm = cast("RMSNorm", kind(8).requires_grad_(False).float())
            rows = torch.linspace(-2.0, 3.0, 16, dtype=torch.float32).view(2, 8)
            norm.weight.copy_(rows[1])
        expected = rms_norm(rows, (8,), norm.weight, norm.variance_epsilon)
        return torch.allclose(norm(rows), expected, atol=1e-6)
    except (TypeError, AttributeError, RuntimeError):
        return False


def _normalize(self: RMSNorm, hidden: Tensor) -> Tensor:
    if hidden.is_cuda and hidden.dtype == self.weight.dtype:
        return rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)
    is_single = hidden.dtype == self.weight.dtype == torch.float32
    # A compiler fuses what it is given.
    if is_single and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return cast("Tensor", _Norm.apply(hidden, self.weight, self.variance_epsilon))
    own: Tensor = type(self).forward(self, hidden)
    return own


class _Norm(torch.autograd.Function):
    """An RMS norm by transformers' own operations, whose gradient takes three passes, not ten.

    With `n = x / rms(x)`, `y = w n`: `dx = (g - n mean(g n)) / rms(x)` for `g = w dy`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Normalize rows, `[..., size]`."""
        inverse = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
        normal = hidden * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return weight * normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Of the rows and the weight."""
        normal, inverse, weight = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * normal).reshape(-1, normal.shape[-1]).sum(0)
        of_normal = grad * weight
        along = torch.linalg.vecdot(of_normal, normal).div_(normal.shape[-1])[..., None]
        return of_normal.addcmul_(normal, along, value=-1).mul_(inverse), of_weight, None
