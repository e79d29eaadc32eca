"""What tokenizers add of their own: chat templates, and marks around a text.

A chat template comes with a model's folder, and is a program: one is tried out before it is used.
Jinja's sandbox keeps a template from files and Python, not from memory and time. So the first
conversation, also with longer texts and more turns, is rendered in a process of its own that has
little of both. What waits for a text that only one row has is not found.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.errors import ConfigError

_CPU_S = 2
_MEMORY_BYTES = 1 << 29
_TOO_MUCH = 7
_LONGER, _MORE_TURNS = 20_000, 16
_WAIT_S = 60.0
"""Of the clock, on a machine that is busy with other things."""

_sound: set[str] = set()
"""Templates that were tried."""

_TRIAL = f"""
import json, resource, sys
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = lambda value, **_: json.dumps(value)
def raise_exception(message):
    raise ValueError(message)
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = lambda form: "1 Jan 2026"
used = resource.getrusage(resource.RUSAGE_SELF)
limit = int(used.ru_utime + used.ru_stime) + {_CPU_S}
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY_BYTES}, {_MEMORY_BYTES}))
template, conversations = given.pop("template"), given.pop("conversations")
for messages in conversations:
    try:
        length = len(environment.from_string(template).render(messages=messages, **given))
    except (MemoryError, OverflowError):
        sys.exit({_TOO_MUCH})
    except Exception:
        continue  # whatever else it raises it raises where it is used, too
    if length > {_MEMORY_BYTES >> 4}:
        sys.exit({_TOO_MUCH})
"""


def num_marks_behind(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts behind a text: what goes on from it lacks them."""
    whole = list(tokenizer.encode("a"))
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    starts = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
    return len(whole) - starts[-1] - len(plain) if starts else 0


def check_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a tokenizer's chat template that takes all memory or time; tried once a process.

    Args:
        tokenizer: Whose template it is.
        messages: A conversation to try it with.

    Raises:
        ConfigError: It does.
    """
    found = getattr(tokenizer, "chat_template", None)
    templates = found.values() if isinstance(found, Mapping) else [found]
    untried = [each for each in templates if isinstance(each, str) and each not in _sound]
    if not untried:  # as for all prompts but the first
        return
    special = getattr(tokenizer, "special_tokens_map", None) or {}
    given = {
        "conversations": _conversations(messages),
        "add_generation_prompt": True,
        "tools": None,
        "documents": None,
        **{name: str(token) for name, token in special.items() if isinstance(name, str)},
    }
    for template in untried:
        _try(template, json.dumps(given, default=str))


def _conversations(messages: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """A conversation as it is, with longer texts, and with more turns, as later ones may be."""
    longer = [
        {**m, "content": m["content"] + " " + "x" * _LONGER}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    ]
    turns = [{"role": role, "content": "text"} for role in ("assistant", "user")]
    return [list(messages), longer, [*messages, *turns * _MORE_TURNS]]


def _try(template: str, given: str) -> None:
    wrong = _run(template, given)
    if wrong:
        raise ConfigError(
            f"`model` must come with a chat template that can be rendered, and its own {wrong}. "
            "Way out: the model's original tokenizer (a template is a program)."
        )
    _sound.add(template)


def _run(template: str, given: str) -> str:
    """What is wrong with it; empty if nothing is."""
    order = json.dumps({"template": template} | json.loads(given))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=order,
            text=True,
            capture_output=True,
            timeout=_WAIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"takes longer than {_WAIT_S:g} s for one conversation"
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {_CPU_S} s for one conversation"
    if done.returncode == _TOO_MUCH:
        return "makes a text without end of one conversation"
    return ""
