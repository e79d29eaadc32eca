"""A real tokenizer with a template for tools, and a context that answers what a test wrote."""

from __future__ import annotations

import anyio

from lightning_grpo.types import Completion, Prompt
from tests.fakes.tiny_model import make_tiny_tokenizer

TOOL_TEMPLATE = (
    "{%- if tools -%}{{ '<|im_start|>system\n<tool_call>' }}"
    "{%- for tool in tools -%}{{ ' ' + tool['function']['name'] }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{{ '<|im_start|>user\n<tool_response>' + message['content'] + '</tool_response>' }}"
    "{%- else -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def make_chat_tokenizer(template=TOOL_TEMPLATE):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def make_prompt(tokenizer, question="What is 2 + 3?", **columns):
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    return Prompt(tuple(ids), text, tuple(messages), columns)


def call_text(name, arguments):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


class ScriptedContext:
    """Answers with the given texts in order; `None` never answers.

    Attributes:
        asked: The ids of each request.
        samplings: How each was to be sampled.
    """

    def __init__(self, tokenizer, replies, *, truncated=(), fail=None):
        self.tokenizer = tokenizer
        self.asked = []
        self.samplings = []
        self.cancelled = 0
        self._replies = list(replies)
        self._truncated = set(truncated)
        self._fail = fail

    async def generate(self, input_ids, sampling=None):
        number = len(self.asked)
        self.asked.append(tuple(input_ids))
        self.samplings.append(sampling)
        await anyio.lowlevel.checkpoint()
        if self._fail is not None:
            raise self._fail
        text = self._replies[number]
        if text is None:
            try:
                await anyio.sleep_forever()
            finally:
                self.cancelled += 1
        cut = number in self._truncated
        ids = self.tokenizer.encode(text) + ([] if cut else [self.tokenizer.eos_token_id])
        return Completion(
            token_ids=tuple(ids),
            logprobs=tuple(-0.5 - number for _ in ids),
            versions=tuple(number for _ in ids),
            text=text,
            finish_reason="length" if cut else "stop",
        )

    async def score(self, reward, /, **arguments):
        return reward(**arguments)
