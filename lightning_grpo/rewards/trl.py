"""Reward functions written for TRL, which take and return lists."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning_grpo.errors import ConfigError

_RESERVED = ("prompt", "messages", "completion", "completion_ids", "prompt_ids")
_TEXT_ASKED = "_text_asked"
_LISTS = ("prompts", "completions", "completion_ids", "prompt_ids")
_NOT_OURS = ("trainer_state", "log_extra", "log_metric", "environments")
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def from_trl(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward out of a function with TRL's signature: `(prompts, completions, **columns) -> list`.

    The function is called with lists of one. Prompts and completions come by TRL's rule: as text
    where the row's prompt was text, and as conversations (lists of messages) where it was one.
    Text stays text where a chat template was put around it.

    Args:
        function: Sync or async; its other arguments are columns. TRL's `trainer_state` and
            `environments` are None, and what is given to its `log_*` functions is dropped.

    Raises:
        ConfigError: It takes one completion, as this package's own rewards do.
    """
    parameters = inspect.signature(function).parameters
    ours = [name for name in parameters if name in ("prompt", "messages", "completion")]
    if ours:
        raise ConfigError(
            "`from_trl` must be given a function of TRL's lists (`prompts`, `completions`, "
            f"columns), got one of `{ours[0]}`. A function of one completion is a reward as it is."
        )
    wanted = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=parameter.default)
        for name, parameter in parameters.items()
        if name not in {*_LISTS, *_NOT_OURS} and parameter.kind not in _VARIABLE
    ]
    always = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _RESERVED]
    always.append(inspect.Parameter(_TEXT_ASKED, inspect.Parameter.KEYWORD_ONLY, default=None))
    rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    def lists(arguments: dict[str, Any]) -> dict[str, Any]:
        special = _as_trl(arguments)
        columns = {k: [v] for k, v in arguments.items() if k not in {*_RESERVED, _TEXT_ASKED}}
        asked = special if rest else {k: v for k, v in special.items() if k in parameters}
        return {**asked, **columns}

    @functools.wraps(function)
    def reward(**arguments: Any) -> Any:
        return _only(function(**lists(arguments)))

    @functools.wraps(function)
    async def async_reward(**arguments: Any) -> Any:
        return _only(await function(**lists(arguments)))

    called = getattr(type(function), "__call__", None)  # noqa: B004 - of an object
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
    wrapped: Any = async_reward if is_async else reward
    wrapped.__name__ = _name(function)
    wrapped.__signature__ = inspect.Signature([*always, *wanted, *rest])
    return wrapped


def _name(function: Callable[..., Any]) -> str:
    """The function's, or the class's of an object: what a reward is logged under."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _as_trl(arguments: Mapping[str, Any]) -> dict[str, Any]:
    messages, completion = arguments["messages"], arguments["completion"]
    text = arguments.get(_TEXT_ASKED)
    text = arguments["prompt"] if text is None and not messages else text
    as_chat = [{"role": "assistant", "content": completion}]
    return {
        "prompts": [messages if text is None else text],
        "completions": [as_chat if text is None else completion],
        "completion_ids": [arguments["completion_ids"]],
        "prompt_ids": [arguments["prompt_ids"]],
        **dict.fromkeys(_NOT_OURS),
        **dict.fromkeys(("log_extra", "log_metric"), lambda *_, **__: None),
    }


def _only(values: Any) -> Any:
    values = list(values)
    if len(values) != 1:
        raise ValueError(f"a TRL reward of one completion must give one value, got {len(values)}.")
    return values[0]
