"""Made-up rollout batches, as a run would have recorded them."""

from __future__ import annotations

import random
from pathlib import Path

from lightning_grpo.rollout.records import read_batch, trajectory_files, write_groups
from lightning_grpo.types import NO_VERSION, Group, Prompt, Trajectory


def read_groups(path: Path) -> list[list[Group]]:
    """The groups of each file (one rollout batch each), as they were consumed."""
    return [read_batch(file).groups for file in trajectory_files(path)]


def random_group(
    draw: random.Random, row: int, size: int, version: int, vocab: int, temperature: float
) -> Group:
    """Answers of several turns, some truncated, some of an older version; rewards may be equal."""
    ids = tuple(draw.randrange(vocab) for _ in range(draw.randint(2, 6)))
    prompt = Prompt(ids, f"prompt {row}", columns={"answer": str(row)}, row=row)
    same = draw.random() < 0.25
    trajectories = []
    for _ in range(size):
        mask = [False] * len(ids)
        for _ in range(draw.randint(1, 3)):
            mask += [True] * draw.randint(1, 12) + [False] * draw.randint(0, 3)
        reward = 1.0 if same else round(draw.random(), 3)
        oldest = max(0, version - draw.randint(0, 2))
        trajectories.append(
            Trajectory(
                input_ids=ids + tuple(draw.randrange(vocab) for _ in mask[len(ids) :]),
                response_mask=tuple(mask),
                # Near the uniform distribution, which an untrained model is near to.
                logprobs=tuple(draw.gauss(-4.1, 0.2) if m else 0.0 for m in mask),
                versions=tuple(oldest if m else NO_VERSION for m in mask),
                reward=reward,
                rewards={"score": reward},
                text="...",
                truncated=draw.random() < 0.2,
                temperature=temperature,
            )
        )
    return Group(prompt, tuple(trajectories), admitted_version=max(0, version - 2))


def write_recording(
    folder: Path, seed: int, *, batches: int, groups: int, vocab: int, temperature: float = 1.0
) -> list[list[Group]]:
    """`batches` files of `groups` groups each, sizes drawn; returns what was written."""
    draw = random.Random(seed)
    written = []
    for version in range(batches):
        made = [
            random_group(draw, row, draw.randint(2, 4), version, vocab, temperature)
            for row in range(groups)
        ]
        write_groups(folder / f"step_{version:06d}.parquet", made, step=version, version=version)
        written.append(made)
    return written
