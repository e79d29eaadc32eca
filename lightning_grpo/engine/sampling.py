"""From logits to tokens and logprobs, for a whole batch at once, with noise that has no state.

The noise of a token is a hash of (seed of the request, position in prompt and completion, token
id). So a completion depends on neither the batch it ran in nor the requests before it, and goes on
unchanged when it is aborted and submitted again with what it had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def as_int64(value: int) -> int:
    """The number with the low 64 bits of `value` in two's complement."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def mix(value: int) -> int:
    """Hash 64 bits (splitmix64's finalizer) to a signed number, as `mix_` does on tensors."""
    value &= _MASK_64
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK_64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK_64
    return as_int64(value ^ (value >> 31))


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request; the first sample's is the request's own."""
    return as_int64(seed) if index == 0 else mix(seed + index * _GOLDEN)


def mix_(values: Tensor) -> Tensor:
    """Hash 64-bit numbers in place (splitmix64's finalizer)."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        # A logical shift: int64's own would draw in copies of the sign.
        values ^= (values >> shift) & ((1 << (64 - shift)) - 1)
        values *= as_int64(factor)
    values ^= (values >> 31) & ((1 << 33) - 1)
    return values


def mix_32_(values: Tensor) -> Tensor:
    """Hash 32-bit numbers in place (two rounds of lowbias32); different ones stay different."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        # A logical shift, as in `mix_`.
        values ^= (values >> shift) & ((1 << (32 - shift)) - 1)
        values *= factor
    return values


class Noise:
    """Exponential noise for every token of the vocabulary.

    One row of a batch is hashed in 64 bits, its tokens in 32: in 64 they took 8 % of the quickstart
    model's decode step, now half of that. The 31 bits that are left resolve probabilities down to
    1e-9.

    Args:
        vocab_size: Number of token ids.
    """

    def __init__(self, vocab_size: int) -> None:
        # No two tokens share a key, and with it their noise for ever.
        self._token_keys = mix_32_(torch.arange(1, vocab_size + 1, dtype=torch.int32))

    def exponential(self, seeds: Tensor, positions: Tensor) -> Tensor:
        """Standard exponential noise; `argmin(noise / p)` is a sample of `p`.

        Args:
            seeds: Seed of each request, int64 `[batch]`.
            positions: Position of the token to sample in prompt and completion, int64 `[batch]`.

        Returns:
            fp32 `[batch, vocab]`, positive.
        """
        keys = mix_(mix_(seeds.clone()) + positions).int()
        bits = mix_32_(keys[:, None] ^ self._token_keys)
        # The upper bits are the best ones; the factor keeps the largest below 1, where log1p ends.
        uniform = ((bits >> 1) & 0x7FFFFFFF).to(torch.float32).add_(0.5)
        return uniform.mul_(-(2.0**-31) * (1 - 2.0**-23)).log1p_().neg_()


@dataclass(frozen=True)
class SamplingPlan:
    """What a batch asks of the sampler; all tensors `[batch]`.

    Attributes:
        temperatures: What logits are divided by (1 for greedy requests), fp32.
        greedy: Take the likeliest token, bool.
        top_p: Nucleus mass kept; 1 keeps all, fp32.
        top_k: Number of tokens kept; the vocabulary's size keeps all, int64.
        min_p: Tokens below this fraction of the likeliest one's probability are dropped, fp32.
        seeds: Seed of each request, int64.
        positions: Position of the token to sample, int64.
        any_scaled: Whether a temperature differs from 1.
        any_greedy: Whether some request is greedy.
        all_greedy: Whether all are.
        any_filtered: Whether some request has a top_p, top_k or min_p.
    """

    temperatures: Tensor
    greedy: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    any_scaled: bool
    any_greedy: bool
    all_greedy: bool
    any_filtered: bool


def sample(
    logits: Tensor, plan: SamplingPlan, noise: Noise, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token of each row.

    The logprob is that of the temperature-scaled distribution before `top_p`, `top_k`, `min_p` and
    `banned`, which is what a trainer can compute again.

    Args:
        logits: fp32 `[batch, vocab]`.
        plan: What each row asks for.
        noise: Where randomness comes from.
        banned: Tokens that can't be sampled now, bool `[batch, vocab]`.

    Returns:
        Tokens int64 and logprobs fp32, `[batch]` each.
    """
    if plan.any_scaled:
        logits = logits / plan.temperatures[:, None]
    logprobs = logits.log_softmax(-1)
    scores = logprobs
    # Before the filters, which could leave nothing but banned tokens.
    if banned is not None:
        scores = scores.masked_fill(banned, float("-inf"))
    if plan.any_filtered:
        scores = filter_logprobs(scores, plan)
    if not plan.all_greedy:
        noisy = scores - noise.exponential(plan.seeds, plan.positions).log_()
        scores = torch.where(plan.greedy[:, None], scores, noisy) if plan.any_greedy else noisy
    tokens = scores.argmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def filter_logprobs(logprobs: Tensor, plan: SamplingPlan) -> Tensor:
    """Drop the tokens that `top_k`, `top_p` or `min_p` exclude (each judged on all tokens).

    Args:
        logprobs: `[batch, vocab]`; `-inf` for banned tokens, the mass of the others counts as 1.
        plan: What each row asks for.

    Returns:
        The logprobs with `-inf` where dropped; the likeliest token always stays.
    """
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass = ranked.exp()
    total = mass.cumsum(-1)
    # Rounding brings the mass to 1 before the last token: a row without top_p keeps all the same.
    top_p = torch.where(plan.top_p < 1, plan.top_p, float("inf"))
    rank = torch.arange(logprobs.shape[-1])
    drop = total - mass >= top_p[:, None] * total[:, -1:]
    drop |= rank >= plan.top_k[:, None]
    drop |= mass < mass[:, :1] * plan.min_p[:, None]
    drop[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
