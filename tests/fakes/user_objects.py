"""What a user writes in a module of theirs: a loss, an optimizer, a subclass."""

from __future__ import annotations

import torch

from lightning_grpo.algorithm.advantages import group_mean
from lightning_grpo.module import GRPOModule


class ScaledLoss:
    """Any callable with the signature is a loss."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, policy_logprobs, batch):
        return -self.scale * batch.advantages * policy_logprobs, {}


def own_loss(policy_logprobs, batch):
    return -batch.advantages * policy_logprobs, {}


def make_adam(params, lr=1e-3):
    return torch.optim.Adam(params, lr=lr)


class MaxRL(GRPOModule):
    def advantages(self, rewards, group_ids):
        mean = group_mean(rewards, group_ids)
        return (rewards - mean) / mean.clamp_min(1e-6)


class OwnTokenLoss(GRPOModule):
    def token_loss(self, policy_logprobs, batch):
        return own_loss(policy_logprobs, batch)
