"""What the examples' base models share: dialogues taught to the quickstart's shipped model.

A dialogue is a list of segments of token ids; only those that the assistant says are learnt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import make_base as quickstart  # noqa: E402 - the quickstart's recipe, by path

Segment = tuple[list[int], bool]
"""Token ids, and whether the assistant says them."""
Dialogue = Callable[[random.Random, bool], list[Segment]]
"""Makes one dialogue: clean, or (True) with the habits that training has to choose against."""

LEARNING_RATE, MIXED_LEARNING_RATE = 2e-3, 1e-3


def load_quickstart() -> tuple[torch.nn.Module, object]:
    """The quickstart's base model and its tokenizer."""
    folder = QUICKSTART / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def batches(
    dialogue: Dialogue, pad: int, seed: int, *, mixed: bool, size: int = 48
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input ids, labels) `[batch, longest]`."""
    rng = random.Random(f"dialogues-{seed}-{mixed}")
    while True:
        rows = [dialogue(rng, mixed) for _ in range(size)]
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        input_ids = torch.full((size, longest), pad)
        labels = torch.full((size, longest), quickstart.IGNORED)
        for index, row in enumerate(rows):
            place = 0
            for ids, learnt in row:
                end = place + len(ids)
                input_ids[index, place:end] = torch.tensor(ids)
                if learnt:
                    labels[index, place:end] = torch.tensor(ids)
                place = end
        yield input_ids, labels


def teach(
    model: torch.nn.Module, dialogue: Dialogue, pad: int, arguments: argparse.Namespace
) -> None:
    """Clean dialogues until the model can do the task, then mixed ones until it rarely bothers."""
    for mixed, steps, rate in (
        (False, arguments.clean_steps, LEARNING_RATE),
        (True, arguments.mixed_steps, MIXED_LEARNING_RATE),
    ):
        start = time.process_time()
        stream = batches(dialogue, pad, arguments.seed, mixed=mixed)
        quickstart.train(model, stream, steps, rate, "mixed" if mixed else "clean")
        print(f"{time.process_time() - start:.0f} CPU-s", flush=True)


def write_rows(folder: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    """One JSONL file for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(content)} rows")


def take(stream: Iterator[dict[str, str]], count: int) -> list[dict[str, str]]:
    """So many rows, none twice."""
    seen: dict[str, dict[str, str]] = {}
    for row in stream:
        seen.setdefault(json.dumps(row), row)
        if len(seen) == count:
            break
    return list(itertools.islice(seen.values(), count))


def parse(description: str | None, clean_steps: int, mixed_steps: int) -> argparse.Namespace:
    """The command line of a recipe; also sets one thread, so that the weights can be made again."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean-steps", type=int, default=clean_steps)
    parser.add_argument("--mixed-steps", type=int, default=mixed_steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    return arguments
