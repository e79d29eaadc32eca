"""The model: it reads prompts, and decodes a token for every running request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_grpo._compat import window_in_mask
from lightning_grpo.algorithm.layers import (
    RouteRecorder,
    ScoreForm,
    bent_attention,
    causal_mask,
    routers_of,
)
from lightning_grpo.engine.cache import (
    OTHERWISE,
    DecodeStep,
    PrefillCapture,
    RecurrentCache,
    SlotCache,
    States,
    alike,
    is_recurrent,
    row_of,
    runs,
)
from lightning_grpo.engine.requests import UnservableError
from lightning_grpo.errors import ConfigError


@dataclass(frozen=True)
class PromptState:
    """What is left of a prompt that was read."""

    kv: Tensor  # [layers, 2, kv_heads, tokens, head_dim]
    logits: Tensor  # of the token after the prompt, [vocab]
    routes: Tensor | None = None  # the experts of its tokens, [tokens, layers, top_k]
    states: States = field(default_factory=dict)  # of recurrent layers at its end

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.kv.shape[3]

    @functools.cached_property
    def size(self) -> int:
        """What it takes, in tokens: states count as many as their numbers are."""
        if not self.states:
            return self.num_tokens
        numbers = sum(state.numel() for state in self.states.values())
        per_token = self.kv[:, :, :, 0].numel() if self.num_tokens else 1
        return self.num_tokens + numbers // max(1, per_token)


ATTENTION_NAME = "lightning_grpo_slots"
_EXTENDED_TOGETHER = 32
"""Slots whose tails are read in one pass: of similar length, since they are padded."""


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface: causal over whole prompts, masked over slots.

    Over slots the query heads that share a key-value head are laid out as queries of it, so that
    keys and values are read where they lie and never repeated.
    """
    if kwargs.get("position_bias") is not None:
        raise UnservableError(f"{type(module).__name__} has a `position_bias`")
    window = kwargs.get("sliding_window") or window_in_mask(module)
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    if attention_mask is not None:
        attention_mask = windowed(attention_mask, window)
    if (form := ScoreForm.of(kwargs)) is not None:
        if attention_mask is None:
            visible = causal_mask(queries, window, query.device)
        else:
            visible = attention_mask.eq(0)
        return bent_attention(query, key, value, visible, scaling, form).transpose(1, 2), None
    if attention_mask is not None:
        packed = query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)
        if queries > 1:
            attention_mask = attention_mask.repeat(1, 1, heads // kv_heads, 1)
        mixed = functional.scaled_dot_product_attention(
            packed, key, value, attn_mask=attention_mask, scale=scaling
        )
        return mixed.reshape(batch, heads, queries, -1).transpose(1, 2), None
    if window is not None and queries > window:
        attention_mask = causal_mask(queries, window, query.device)
    mixed = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    return mixed.transpose(1, 2), None


def windowed(mask: Tensor, window: int | None) -> Tensor:
    """A causal mask, without what a sliding window has left behind.

    Windows differ from layer to layer, and transformers hands the same mask to all of them: each
    reads off it where its queries stand, since a token sees as many as come before it, and itself.

    Args:
        mask: `[..., queries, keys]`; 0 for the first keys up to the query's own, then -inf.
        window: Tokens that one can see, itself included; None: all.
    """
    keys = mask.shape[-1]
    if window is None or keys <= window:
        return mask
    seen = (mask == 0).sum(-1, keepdim=True)
    return mask.masked_fill(torch.arange(keys) < seen - window, float("-inf"))


def load_model(path: str) -> PreTrainedModel:
    """Load a causal language model in fp32 for the engine.

    Raises:
        ConfigError: The folder lacks some of its weights.
    """
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation=ATTENTION_NAME,
        output_loading_info=True,
        trust_remote_code=False,
    )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ConfigError(
            f"`model` must hold all weights of its config.json, {path!r} lacks "
            f"{', '.join(missing[:3])}. Way out: a complete checkpoint."
        )
    model.eval()
    return model.requires_grad_(False)


def check_servable(path: str) -> None:
    """Refuse a model that the engine can't run, by reading a prompt without values.

    Raises:
        ConfigError: Why not, and what can serve it.
    """
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError):
        return  # whoever loads the model says what is wrong with it
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=ATTENTION_NAME,
                dtype=torch.bfloat16,  # the only one that experts have without values
            )
            ModelRunner(model.eval()).prefill([[0, 0]])
    except (UnservableError, AttributeError, KeyError, TypeError, ValueError) as error:
        known = isinstance(error, UnservableError)
        reason = str(error) if known else f"its layers ask for a cache of another kind ({error})"
        raise ConfigError(
            f"`model` must be one that the embedded engine runs, it can't run {path!r} "
            f"({config.model_type}): {reason}. Way out: SGLangServers on a GPU, or another model."
        ) from error
    except (RuntimeError, NotImplementedError):
        pass  # what depends on values (the routes of some mixtures) shows when there are any


_GOES_ON = 0.01
"""Of the largest logit: far beyond rounding, far below what a state that is lost makes."""


@torch.no_grad()
def require_goes_on(runner: ModelRunner) -> None:
    """Refuse a model whose recurrent layers lose their states from one call to the next.

    In some versions of transformers some do; nothing else would show it.

    Raises:
        UnservableError: Token by token it computes something else than in one pass.
    """
    ids = [(7 * i + 3) % runner.vocab_size for i in range(8)]
    if not runner.is_recurrent or runner.context_length <= len(ids):
        return
    whole, begun = (runner.prefill([part])[0] for part in (ids, ids[:4]))
    slots = SlotCache(1, runner.context_length)
    slots.reserve(1, len(ids) + 1, begun.kv)
    slots.place(0, 1, begun.kv, begun.states)
    runner.extend(slots, [ids[4:7]], torch.tensor([4]), 0)
    stepped = runner.decode(slots, torch.tensor(ids[7:]), torch.tensor([7]))[0]
    if (stepped - whole.logits).abs().max() > _GOES_ON * whole.logits.abs().max():
        raise UnservableError(OTHERWISE)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside the model; None where the folder has none."""
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, trust_remote_code=False
    )
    return tokenizer


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Every id that ends a completion: the config's, the generation config's, the tokenizer's.

    As SGLang, also `<|eom_id|>`, with which Llama ends a call of a tool.
    """
    sources: list[Any] = [
        getattr(each, "eos_token_id", None)
        for each in (model.config, model.generation_config, tokenizer)
    ]
    if tokenizer is not None:
        sources.append(tokenizer.get_added_vocab().get("<|eom_id|>"))
    lists = [source if isinstance(source, list) else [source] for source in sources]
    return frozenset(each for ids in lists for each in ids if each is not None)


# ---- a plain model's decode step ---------------------------------------------------------------

_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose blocks `PlainDecoder` has, unless a config asks for more."""
_PLAIN_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of RoPE whose factors don't depend on the length."""
_AGREES = 1e-3
"""Of the largest logit: far beyond rounding, far below what another block would give."""


class _Block(NamedTuple):
    """A block's own parameters; products are weight and bias, norms weight and epsilon."""

    before: _Norm
    heads: _Product  # of queries, keys and values
    head_norms: _Norm | None  # of queries and of keys
    out: _Product
    after: _Norm
    gate_up: _Product
    down: _Product
    activation: Callable[[Tensor], Tensor]
    scale: float


_Product = tuple[Tensor, Tensor | None]
_Norm = tuple[Tensor, float]


class PlainDecoder:
    """The decode step of a plain transformer, written out.

    transformers' modules cost a small model more at each token than its matrix products. Parameters
    share the model's memory, so that weights written to it count from the next step on. Those whose
    products have the same factor lie end to end in it, and are multiplied at once.

    Args:
        model: See `is_plain`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder()
        config = model.config
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._head = _product(model.get_output_embeddings())
        self._norm = _norm(decoder.norm)
        self._blocks = [_block(layer) for layer in decoder.layers]
        self._kv_heads: int = config.num_key_value_heads
        self._groups: int = config.num_attention_heads // self._kv_heads
        self._dim: int = decoder.layers[0].self_attn.head_dim
        num_queries: int = config.num_attention_heads
        self._is_key = torch.tensor([0] * num_queries + [1] * self._kv_heads)
        positions = torch.arange(config.max_position_embeddings)
        cos, sin = decoder.rotary_emb(self._embedding[:1], positions[None])
        half = self._dim // 2
        # Signs that transformers gives to halves of the vector are those of the sines here.
        signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], 1)
        self._cos, self._sin = cos[0][:, None], signed[:, None]

    def decode(self, step: DecodeStep, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Append a token to each row; the next logits.

        Args:
            step: Where keys and values go.
            tokens: `[rows]`.
            lengths: Tokens before them, `[rows]`.
            mask: Added to scores, `[rows, 1, 1, keys]`.
        """
        rotation = (self._cos[lengths], self._sin[lengths])
        hidden = functional.embedding(tokens, self._embedding)
        for index, block in enumerate(self._blocks):
            normal = _normalized(hidden, block.before)
            hidden = hidden + self._attention(normal, block, index, step, rotation, mask)
            normal = _normalized(hidden, block.after)
            gate, up = functional.linear(normal, *block.gate_up).chunk(2, -1)
            hidden = hidden + functional.linear(block.activation(gate) * up, *block.down)
        return functional.linear(_normalized(hidden, self._norm), *self._head)

    def _attention(
        self,
        hidden: Tensor,
        block: _Block,
        index: int,
        step: DecodeStep,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        rows, dim = len(hidden), self._dim
        num_queries = self._kv_heads * self._groups
        heads = functional.linear(hidden, *block.heads).view(rows, -1, dim)
        turned = heads[:, : num_queries + self._kv_heads]
        if block.head_norms is not None:
            weights, epsilon = block.head_norms
            turned = functional.rms_norm(turned, (dim,), None, epsilon) * weights[self._is_key]
        turned = _rotated(turned, *rotation)
        key, value = turned[:, num_queries:], heads[:, num_queries + self._kv_heads :]
        keys, values = step.update(key.unsqueeze(2), value.unsqueeze(2), index)
        # Heads that share keys and values are queries of them, as in `slot_attention`.
        mixed = functional.scaled_dot_product_attention(
            turned[:, :num_queries].view(rows, self._kv_heads, self._groups, dim),
            keys,
            values,
            attn_mask=mask,
            scale=block.scale,
        )
        return functional.linear(mixed.reshape(rows, -1), *block.out)


def _product(*modules: Any) -> _Product:
    weight = _joined([module.weight for module in modules])
    has_bias = modules[0].bias is not None
    return weight, _joined([module.bias for module in modules]) if has_bias else None


def _joined(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Lay parameters end to end in memory, whose parts they are from here on; all of it."""
    if len(parameters) == 1:
        return parameters[0]
    whole = torch.cat([parameter.detach() for parameter in parameters])
    parts = whole.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return whole


def _norm(module: Any) -> _Norm:
    return module.weight, module.variance_epsilon


def _block(layer: Any) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return _Block(
        before=_norm(layer.input_layernorm),
        heads=_product(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=_head_norms(norms) if norms else None,
        out=_product(attention.o_proj),
        after=_norm(layer.post_attention_layernorm),
        gate_up=_product(mlp.gate_proj, mlp.up_proj),
        down=_product(mlp.down_proj),
        activation=mlp.act_fn,
        scale=attention.scaling,
    )


def _head_norms(norms: Sequence[Any]) -> _Norm:
    weights = _joined([norm.weight for norm in norms])
    return weights.view(len(norms), -1), norms[0].variance_epsilon


def _normalized(hidden: Tensor, norm: _Norm) -> Tensor:
    weight, epsilon = norm
    return functional.rms_norm(hidden, weight.shape, weight, epsilon)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sin)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether a model's config asks for nothing but plain blocks."""
    if model.config.model_type not in _PLAIN or model.device.type != "cpu":
        return False
    decoder: Any = model.get_decoder()
    windows = (
        getattr(layer.self_attn, "sliding_window", None) or window_in_mask(layer.self_attn)
        for layer in decoder.layers
    )
    return getattr(decoder.rotary_emb, "rope_type", None) in _PLAIN_ROPE and not any(windows)


class ModelRunner:
    """Runs prompts and decode steps.

    Args:
        model: A causal language model from `load_model`.
        row_by_row: Decode each request by itself: slower, and its bits don't depend on who else
            runs (the shape of a batch shows in the last bits of a float).

    Attributes:
        plain: What decodes in the place of transformers' modules; None: they do.
    """

    def __init__(self, model: PreTrainedModel, row_by_row: bool = False) -> None:
        self.model = model
        self.row_by_row = row_by_row
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.context_length = int(model.config.get_text_config().max_position_embeddings)
        self._positions = torch.arange(self.context_length + 1)
        self.is_recurrent = is_recurrent(model.config)
        self._steps = RecurrentCache(model.config) if self.is_recurrent else None
        self._recorder: RouteRecorder | None = None
        self._routes: list[Tensor] = []
        self._pick: tuple[Tensor, Tensor] | None = None
        self.plain: PlainDecoder | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._pick_positions)
        if not row_by_row and is_plain(model):
            self.plain = self._agreeing(PlainDecoder(model))

    @torch.no_grad()
    def _agreeing(self, plain: PlainDecoder) -> PlainDecoder | None:
        """A plain decoder if it computes what transformers does, found out by trying; else none."""
        tried, length = torch.arange(5) * 7 % self.vocab_size, 3
        if self.context_length <= len(tried):
            return None
        logits = []
        for decoder in (plain, None):
            self.plain = decoder
            read = self._prefill([tried[:length].tolist()])[0]
            slots = SlotCache(2, self.context_length)
            slots.reserve(2, len(tried), read.kv)
            slots.place(0, 2, read.kv)
            steps = [torch.stack([tried[t], tried[-t]]) for t in (length, length + 1)]
            logits += [
                self.decode(slots, tokens, torch.full((2,), length + more))
                for more, tokens in enumerate(steps)
            ]
        found, expected = torch.cat(logits[:2]), torch.cat(logits[2:])
        agrees = (found - expected).abs().max() <= _AGREES * expected.abs().max()
        return plain if agrees else None

    @property
    def has_routers(self) -> bool:
        """Whether the model is a mixture whose routers can be listened to."""
        try:
            routers_of(self.model)
        except ConfigError:
            return False
        return True

    @property
    def records(self) -> bool:
        """Whether the experts of each token are kept for `take_routes`."""
        return self._recorder is not None

    def record(self) -> None:
        """Keep the experts from here on."""
        self._recorder = self._recorder or RouteRecorder(routers_of(self.model))

    def take_routes(self) -> list[Tensor]:
        """The experts of what was appended since the last call, in its order.

        One int32 `[tokens, layers, top_k]` for each slot and call; behind a slot's own tokens there
        may be padding.
        """
        taken, self._routes = self._routes, []
        return taken

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[PromptState]:
        """Read prompts, padded on the right to the longest; none is where states would see it."""
        if not self.is_recurrent:
            return self._prefill(prompts)
        found: dict[int, PromptState] = {}
        for rows in alike([len(prompt) for prompt in prompts]):
            states = self._prefill([prompts[row] for row in rows])
            found |= dict(zip(rows, states, strict=True))
        return [found[row] for row in range(len(prompts))]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[PromptState]:
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        # The padding is behind each prompt, where causal attention never looks back from.
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        capture = PrefillCapture()
        cache = self._reading(capture)
        last = (torch.arange(len(prompts)), torch.tensor(lengths) - 1)
        logits = self._forward(ids, cache, last)
        kept = cache.states() if isinstance(cache, RecurrentCache) else {}
        routes: Sequence[Tensor | None] = self.take_routes() or [None] * len(prompts)
        return [
            PromptState(
                capture.prompt(row, length),
                logits[row].clone(),
                None if chosen is None else chosen[:length],
                row_of(kept, row),
            )
            for row, (length, chosen) in enumerate(zip(lengths, routes, strict=True))
        ]

    def score(self, prompt: Sequence[int], start: int) -> tuple[PromptState, Tensor]:
        """Read one prompt; also gives the unscaled logprobs of its tokens after `start`."""
        ids = torch.tensor(prompt)[None]
        wanted = torch.arange(start, len(prompt))
        capture = PrefillCapture()
        cache = self._reading(capture)
        logits = self._forward(ids, cache, (torch.zeros_like(wanted), wanted))
        kept = cache.states() if isinstance(cache, RecurrentCache) else {}
        scores = logits[:-1].log_softmax(-1).gather(-1, ids[0, start + 1 :, None])[:, 0]
        routes = next(iter(self.take_routes()), None)
        read = capture.prompt(0, len(prompt))
        return PromptState(read, logits[-1].clone(), routes, row_of(kept, 0)), scores

    def _reading(self, capture: PrefillCapture) -> PrefillCapture | RecurrentCache:
        """What layers see while they read from the start."""
        return RecurrentCache(self.model.config).begin(capture) if self.is_recurrent else capture

    def decode(self, slots: SlotCache, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Append a token to each of the first slots, which have `lengths`; the next logits.

        Tokens and lengths are `[running]`, logits fp32 `[running, vocab]`.
        """
        max_length = int(lengths.max()) + 1
        slots.grow(max_length)
        if self.plain is not None:
            positions = lengths[:, None]
            step, mask = slots.step(positions, max_length), self._mask(positions, max_length)
            return self.plain.decode(step, tokens, lengths, mask)
        if self.row_by_row:
            return self.extend(slots, tokens[:, None].tolist(), lengths, 0)
        return self._append(slots, tokens[:, None], lengths[:, None], 0)

    def extend(
        self, slots: SlotCache, tails: Sequence[Sequence[int]], lengths: Tensor, first_slot: int
    ) -> Tensor:
        """Append one or more tokens to each of some slots in a row; the next logits, as `decode`.

        There must be room for them.
        """
        group = 1 if self.row_by_row else _EXTENDED_TOGETHER
        if self.is_recurrent:
            slices = runs([len(tail) for tail in tails], group)
        else:
            slices = [slice(start, start + group) for start in range(0, len(tails), group)]
        parts = []
        for rows in slices:
            some = tails[rows]
            longest = max(len(tail) for tail in some)
            # A tail is padded with its own last token, which is then written there once more.
            last = torch.tensor([len(tail) - 1 for tail in some])[:, None]
            ids = torch.tensor([[*tail, *[tail[-1]] * (longest - len(tail))] for tail in some])
            steps = torch.arange(longest).minimum(last)
            positions = lengths[rows, None] + steps
            parts.append(self._append(slots, ids, positions, first_slot + rows.start))
        return torch.cat(parts)

    def _append(self, slots: SlotCache, ids: Tensor, positions: Tensor, first_slot: int) -> Tensor:
        """Tokens and where they go, `[slots, tokens]`; the logits behind the last ones."""
        max_length = int(positions.max()) + 1
        step: Any = slots.step(positions, max_length, first_slot)
        if self._steps is not None:
            states = slots.states.rows(first_slot, first_slot + len(ids))
            step = self._steps.begin(step, states)
        pick = None if ids.shape[1] == 1 else (torch.arange(len(ids)), torch.tensor([-1]))
        return self._forward(ids, step, pick, positions, self._mask(positions, max_length))

    def _mask(self, positions: Tensor, max_length: int) -> Tensor:
        """What keys each of some new tokens can't see yet, `[slots, 1, tokens, keys]`."""
        mask = torch.zeros(*positions.shape, max_length)
        mask.masked_fill_(self._positions[:max_length] > positions[:, :, None], float("-inf"))
        return mask[:, None]

    def _forward(
        self,
        ids: Tensor,
        cache: Any,
        pick: tuple[Tensor, Tensor] | None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The logits behind the (rows, positions) of `pick`; None: behind each row's only token."""
        self._pick = pick
        output = self.model(
            input_ids=ids,
            position_ids=self._positions[None, : ids.shape[1]] if positions is None else positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        if self._recorder is not None:
            self._routes += self._recorder.take().unflatten(0, tuple(ids.shape))
        return output.logits[:, 0].float()

    def _pick_positions(self, _: torch.nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """Give the head only the positions whose logits are wanted: the rest are never made."""
        return None if self._pick is None else args[0][self._pick][:, None]
