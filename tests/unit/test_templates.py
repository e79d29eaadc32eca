"""Chat templates that take all memory or time are refused before they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.chat import fitting
from lightning_grpo.shipped import resolve_path
from lightning_grpo.templates import check_template

MESSAGES = [{"role": "user", "content": "hello"}]
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@dataclass
class WithTemplate:
    """A tokenizer of which only the template is looked at."""

    chat_template: Any

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise AssertionError("rendered")


BOMBS = {
    "a product": "{{ 'x' * 10**9 }}",
    "a larger product": "{{ 'x' * 10**12 }}",
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "a filter": "{{ 'x'|center(10**9) }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "recursion": "{% macro f(n) %}{{ f(n-1) if n else '' }}{{ f(n-1) if n else '' }}{% endmacro %}"
    "{{ f(60) }}",
}


@pytest.mark.parametrize(
    "condition",
    [
        "messages[-1].content|length > 1000",
        "messages|length > 9",
        "messages[-2].role == 'assistant'",
    ],
)
def test_a_template_that_waits_for_a_longer_conversation_is_refused(condition):
    template = LOOP + "{% if " + condition + " %}{{ 'x' * 10**9 }}{% endif %}"
    with pytest.raises(ConfigError, match="a text without end"):
        fitting(WithTemplate(template), MESSAGES, {})


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_without_end_is_refused_and_not_rendered(bomb):
    with pytest.raises(ConfigError, match=r"`model` must come with a chat template that can be"):
        fitting(WithTemplate(LOOP + BOMBS[bomb]), MESSAGES, {})


def test_one_of_several_templates_is_enough():
    with pytest.raises(ConfigError, match="a text without end"):
        check_template(WithTemplate({"default": LOOP, "tool_use": BOMBS["a product"]}), MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        None,
        LOOP,
        LOOP + "{% generation %}{{ bos_token }}{% endgeneration %}{% break %}",
        "{{ raise_exception('no') }}",
        "{% if",
        "{{ messages|tojson(indent=2) }}{{ strftime_now('%d %b %Y') }}",
    ],
)
def test_what_is_only_wrong_in_other_ways_is_left_to_whoever_renders_it(template):
    check_template(WithTemplate(template), MESSAGES)


def test_the_template_that_ships_is_sound():
    from transformers import AutoTokenizer

    check_template(AutoTokenizer.from_pretrained(resolve_path("shipped:quickstart")), MESSAGES)
