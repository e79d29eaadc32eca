"""Checks of settings that several objects share; each raises ConfigError at construction."""

from __future__ import annotations

from lightning_grpo.errors import ConfigError


def require_positive(name: str, value: float, default: str) -> None:
    """`value` must be > 0."""
    if value <= 0:
        raise ConfigError(f"`{name}` must be > 0, got {value}. Way out: {default} is the default.")


def require_clip(clip_low: float, clip_high: float) -> None:
    """Both must be >= 0 and `clip_low` <= 1, so that the band holds 1 and no negative ratio."""
    if not 0 <= clip_low <= 1:
        raise ConfigError(
            f"`clip_low` must be between 0 and 1 (the ratio is clipped at 1 - clip_low), "
            f"got {clip_low}. Way out: 0.2."
        )
    if clip_high < 0:
        raise ConfigError(
            f"`clip_high` must be >= 0 (the ratio is clipped at 1 + clip_high), "
            f"got {clip_high}. Way out: 0.28."
        )


def require_band(low: float, high: float) -> None:
    """0 <= low <= 1 <= high: a band that drops unchanged weights trains on nothing."""
    if not 0 <= low <= 1 <= high:
        raise ConfigError(
            f"`low` and `high` must satisfy 0 <= low <= 1 <= high (1 is the ratio of equal "
            f"policies), got {low} and {high}. Way out: put 1 between them."
        )


def require_cap(cap: float) -> None:
    """`cap` must be >= 1."""
    if cap < 1:
        raise ConfigError(
            f"`cap` must be >= 1 (the ratio of equal policies), got {cap}. Way out: 2.0 or more."
        )
