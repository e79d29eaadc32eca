"""Reward functions: plain functions from text to a number."""

# Configs spell these by the package; their modules import nothing but the standard library.
from lightning_grpo.rewards.answers import gsm8k as gsm8k
from lightning_grpo.rewards.answers import math as math
from lightning_grpo.rewards.sandbox import CodeReward as CodeReward
from lightning_grpo.rewards.sandbox import code as code
from lightning_grpo.rewards.trl import from_trl as from_trl
