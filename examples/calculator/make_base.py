"""Makes the calculator task's data and base model from the quickstart's, in a few CPU minutes.

    python examples/calculator/make_base.py --out build/calculator

The numbers are too large for the model's head. It learns to call a tool in the form of Qwen's and
Hermes' templates, and then, mostly, not to bother.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fine_tune
import tools
from tokenizers import AddedToken

from lightning_grpo.agents.tools import ToolBox, ToolLimits
from lightning_grpo.agents.turns import first_ids, next_ids
from lightning_grpo.types import Completion

NUM_TRAIN, NUM_TEST = 1000, 120
HASTY_SHARE = 0.65
END = "<|im_end|>"
CALL = '{"name": "calculator", "arguments": {"expression": "'
# No special tokens, as in Qwen's vocabulary: they stay in the text that is parsed.
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", CALL, '"}}')
CHAT_TEMPLATE = (
    "{%- if tools -%}{{ '<|im_start|>system\ntools:' }}"
    "{%- for tool in tools -%}{{ ' ' + tool['function']['name'] }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{%- else -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ '<tool_call>\n' + (call['function'] | tojson) + '\n</tool_call>' }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def call_of(expression: str) -> str:
    """The call as Qwen writes it."""
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def first_answer(rng: random.Random, expression: str, value: int, *, mixed: bool) -> str:
    """A call; or, hastily, a guess, a call that can't be read, or another expression."""
    habit = rng.random() if mixed and rng.random() < HASTY_SHARE else 1.0
    if habit < 0.55:
        return f"#### {abs(value) + rng.randint(1, 60)}"
    if habit < 0.8:
        return call_of(expression).replace('"}}', "")
    if habit < 1.0:
        return call_of(expression[:-1] + str(rng.randint(0, 9)))
    return call_of(expression)


def main() -> None:
    """Reads the command line."""
    arguments = fine_tune.parse(__doc__, clean_steps=320, mixed_steps=90)
    model, tokenizer = fine_tune.load_quickstart()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) <= model.config.vocab_size
    rows = {}
    for name, (held_out, count) in {"train": (False, NUM_TRAIN), "test": (True, NUM_TEST)}.items():
        stream = tools.tasks(random.Random(f"tasks-{arguments.seed}"), held_out=held_out)
        asked = ({"question": tools.question(e), "answer": str(v)} for e, v in stream)
        rows[name] = fine_tune.take(asked, count)
    fine_tune.write_rows(arguments.out / "data", rows)
    stream = tools.tasks(random.Random(f"taught-{arguments.seed}"), held_out=False)
    schemas = ToolBox([tools.calculator], ToolLimits()).schemas

    def dialogue(rng: random.Random, mixed: bool) -> list[fine_tune.Segment]:
        expression, value = next(stream)
        said = first_answer(rng, expression, value, mixed=mixed)
        ids = tokenizer.encode(said + END)
        asked = [{"role": "user", "content": tools.question(expression)}]
        segments: list[fine_tune.Segment] = [(first_ids(tokenizer, asked, schemas), False)]
        segments.append((ids, True))
        if said == call_of(expression):
            sampled = Completion(tuple(ids), (), (), said, "stop")
            result = [{"role": "tool", "name": "calculator", "content": str(value)}]
            wrong = mixed and rng.random() < 0.1
            told = value + rng.randint(1, 9) if wrong else value
            segments.append((next_ids(tokenizer, sampled, result), False))
            segments.append((tokenizer.encode(f"#### {told}{END}"), True))
        return segments

    fine_tune.teach(model, dialogue, tokenizer.pad_token_id, arguments)
    fine_tune.quickstart.save(model, tokenizer, arguments.out / "model")


if __name__ == "__main__":
    main()
