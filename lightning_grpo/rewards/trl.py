"""Reward functions written for TRL, which take and return lists."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

_RESERVED = ("prompt", "messages", "completion", "completion_ids", "prompt_ids")
_LISTS = ("prompts", "completions", "completion_ids", "prompt_ids")
_NOT_OURS = ("trainer_state", "log_extra", "log_metric")
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def from_trl(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward out of a function with TRL's signature: `(prompts, completions, **columns) -> list`.

    The function is called with lists of one. Prompts and completions come as TRL gives them for
    conversations (lists of messages) where the prompt was made of messages, else as text.

    Args:
        function: Sync or async; its other arguments are columns. TRL's `trainer_state` and
            `log_*` arguments are given as None.
    """
    parameters = inspect.signature(function).parameters
    wanted = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=parameter.default)
        for name, parameter in parameters.items()
        if name not in {*_LISTS, *_NOT_OURS} and parameter.kind not in _VARIABLE
    ]
    always = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _RESERVED]
    rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    def lists(arguments: dict[str, Any]) -> dict[str, Any]:
        special = _as_trl(arguments)
        columns = {k: [v] for k, v in arguments.items() if k not in _RESERVED}
        asked = special if rest else {k: v for k, v in special.items() if k in parameters}
        return {**asked, **columns}

    @functools.wraps(function)
    def reward(**arguments: Any) -> Any:
        return _only(function(**lists(arguments)))

    @functools.wraps(function)
    async def async_reward(**arguments: Any) -> Any:
        return _only(await function(**lists(arguments)))

    wrapped: Any = async_reward if inspect.iscoroutinefunction(function) else reward
    wrapped.__signature__ = inspect.Signature([*always, *wanted, *rest])
    return wrapped


def _as_trl(arguments: Mapping[str, Any]) -> dict[str, Any]:
    messages, completion = arguments["messages"], arguments["completion"]
    return {
        "prompts": [messages or arguments["prompt"]],
        "completions": [[{"role": "assistant", "content": completion}] if messages else completion],
        "completion_ids": [arguments["completion_ids"]],
        "prompt_ids": [arguments["prompt_ids"]],
        **dict.fromkeys(_NOT_OURS),
    }


def _only(values: Any) -> Any:
    values = list(values)
    if len(values) != 1:
        raise ValueError(f"a TRL reward of one completion must give one value, got {len(values)}.")
    return values[0]
