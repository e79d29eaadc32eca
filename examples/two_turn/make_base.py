"""Makes the two-turn game's data and base model from the quickstart's, in a few CPU minutes.

python examples/two_turn/make_base.py --out build/two_turn
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fine_tune
import game

from lightning_grpo.agents.turns import first_ids, next_ids
from lightning_grpo.types import Completion

NUM_TRAIN, NUM_TEST = 640, 120
HASTY_SHARE = 0.65
END = "<|im_end|>"


def second_answer(rng: random.Random, start: int, number: int, *, mixed: bool) -> str:
    """What the assistant makes of the feedback."""
    off = number - start
    habit = rng.random() if mixed and rng.random() < HASTY_SHARE else 1.0
    if habit < 0.6:
        return f"#### {max(1, start + rng.randint(-9, 9))}"
    if habit < 0.85:  # not what was said
        off += rng.choice((-1, 1))
    sign = "+" if off > 0 else "-"
    result = start + off
    step = f"{start} {sign} {abs(off)} = <<{start}{sign}{abs(off)}={result}>>{result}"
    return step if 0.85 <= habit < 1.0 else f"{step}\n#### {result}"


def main() -> None:
    """Reads the command line."""
    arguments = fine_tune.parse(__doc__, clean_steps=260, mixed_steps=90)
    model, tokenizer = fine_tune.load_quickstart()
    splits = {"train": (False, NUM_TRAIN), "test": (True, NUM_TEST)}
    rows = {}
    for name, (held_out, count) in splits.items():
        stream = game.games(random.Random(f"games-{arguments.seed}"), held_out=held_out)
        asked = ({"question": game.question(s), "answer": str(n)} for s, n in stream)
        rows[name] = fine_tune.take(asked, count)
    fine_tune.write_rows(arguments.out / "data", rows)
    stream = game.games(random.Random(f"taught-{arguments.seed}"), held_out=False)

    def dialogue(rng: random.Random, mixed: bool) -> list[fine_tune.Segment]:
        start, number = next(stream)
        first = start if rng.random() < 0.9 or not mixed else start + rng.randint(-3, 3)
        said = f"#### {first}"
        ids = tokenizer.encode(said + END)
        sampled = Completion(tuple(ids), (), (), said, "stop")
        told = {"role": "user", "content": game.feedback(said, str(number))}
        asked = first_ids(tokenizer, [{"role": "user", "content": game.question(start)}])
        answer = second_answer(rng, first, number, mixed=mixed)
        return [
            (asked, False),
            (ids, True),
            (next_ids(tokenizer, sampled, [told]), False),
            (tokenizer.encode(answer + END), True),
        ]

    fine_tune.teach(model, dialogue, tokenizer.pad_token_id, arguments)
    fine_tune.quickstart.save(model, tokenizer, arguments.out / "model")


if __name__ == "__main__":
    main()
