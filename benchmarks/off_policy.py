"""A run that fails without a correction: the servers sample a good token too rarely.

python benchmarks/off_policy.py --seeds 5 --out benchmarks/results/off_policy.json

A policy over four tokens, as small as can be, trained by the package's own advantages, loss and
corrections. The servers compute something else than the trainer (another precision, another kernel,
old weights): they sample the best token, which is right 8 times in 10, seven times too rarely; the
others are right 4 times in 10.

Without a correction the clip is anchored at the behavior policy, where the best token's ratio is 7.
With a positive advantage it is above 1 + clip_high: no gradient. With a negative one, from the 2 in
10, nothing bounds it: seven times the gradient. So all that the policy ever hears of the best token
is when it was wrong, and it unlearns it. A correction anchors the clip at the trainer's own policy
and bounds the weight in both directions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from lightning_grpo import (
    GeometricMask,
    GroupAdvantage,
    GRPOLoss,
    IcePop,
    MicroBatch,
    SequenceTIS,
    TokenTIS,
    minibatch_loss,
)
from lightning_grpo.algorithm.batch import Denominators
from lightning_grpo.algorithm.corrections import Correction

REWARDS = torch.tensor([0.8, 0.4, 0.4, 0.4])
"""How often each token is right."""

CORRECTIONS: dict[str, Correction | None] = {
    "none": None,
    "TokenTIS(2)": TokenTIS(),
    "SequenceTIS(5)": SequenceTIS(),
    "IcePop(0.5, 10)": IcePop(0.5, 10.0),
    "GeometricMask(0.99, 1.01)": GeometricMask(),
}


def sampled_batch(
    logits: torch.Tensor, bias: float, generator: torch.Generator, groups: int, size: int
) -> tuple[MicroBatch, torch.Tensor]:
    """Groups of completions of one token after a prompt of one, and the tokens."""
    policy = logits.detach().log_softmax(-1)
    behavior = (policy + torch.tensor([-bias, 0.0, 0.0, 0.0])).log_softmax(-1)
    count = groups * size
    tokens = torch.multinomial(behavior.exp(), count, replacement=True, generator=generator)
    rewards = torch.bernoulli(REWARDS[tokens], generator=generator)
    advantages = GroupAdvantage()(rewards, torch.arange(count) // size)
    mask = torch.tensor([False, True]).repeat(count)
    both = torch.zeros(2 * count)
    batch = MicroBatch(
        input_ids=torch.stack([torch.zeros_like(tokens), tokens], 1).flatten(),
        cu_seqlens=torch.arange(0, 2 * count + 1, 2),
        response_mask=mask,
        loss_mask=mask,
        behavior_logprobs=both.masked_scatter(mask, behavior[tokens]),
        weight_versions=torch.zeros(2 * count, dtype=torch.int64),
        advantages=advantages.repeat_interleave(2),
        temperature=torch.ones(2 * count),
        trajectory_index=torch.arange(count),
        denominators=Denominators(count, count, groups),
    )
    return batch, tokens


def train(
    correction: Correction | None, seed: int, steps: int = 400, bias: float = 2.0, lr: float = 0.1
) -> float:
    """The probability of a right answer after training, from 0.5 at the start."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(4, requires_grad=True)
    loss_of, optimizer = GRPOLoss(), torch.optim.SGD([logits], lr=lr)
    for _ in range(steps):
        batch, tokens = sampled_batch(logits, bias, generator, groups=16, size=8)
        chosen = logits.log_softmax(-1)[tokens]
        logprobs = torch.stack([torch.zeros_like(chosen), chosen], 1).flatten()
        if correction is None:  # the clip's anchor then, as in `Objective.anchor`
            batch = replace(batch, proximal_logprobs=batch.behavior_logprobs)
        loss, _ = minibatch_loss(
            logprobs, batch, loss_of, aggregation=loss_of.aggregation, correction=correction
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((logits.detach().softmax(-1) * REWARDS).sum())


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: dict[str, dict[str, list[float]]] = {}
    for bias, name in ((0.0, "servers that agree"), (2.0, "servers that do not")):
        table[name] = {
            correction: [round(train(each, seed, bias=bias), 3) for seed in range(args.seeds)]
            for correction, each in CORRECTIONS.items()
        }
        print(f"\n{name}: probability of a right answer, 0.5 at the start")
        for correction, scores in table[name].items():
            print(f"  {correction:26s}", "  ".join(f"{score:.3f}" for score in scores))
    if args.out:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
