"""The side of a reward that runs in a process of its own; imports nothing heavy."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping
from typing import Any, Literal

import cloudpickle

Answer = tuple[Literal["value", "error", "misuse"], Any]
"""A reward's value; or the text of why there is none; or of why there never will be one."""

_MISUSES: dict[tuple[type, ...], str] = {
    (list, tuple): (
        "it must return one number, got a list: a reward is called once per completion. "
        "Wrap a function of lists as `lightning_grpo.rewards.from_trl(function)`."
    ),
    (Awaitable,): "it returned a coroutine. Declare the function `async def`.",
}
LARGEST = (2 - 2**-23) * 2.0**127
"""The largest number of fp32."""

_PR_SET_PDEATHSIG = 1
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Python's, other packages' and this one's lines are not where a user looks first.
_NOT_THEIRS = (
    *{sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")},
    os.path.dirname(os.path.abspath(__file__)),
    "<frozen",
)
_CACHE_SIZE = 32
_loaded: dict[bytes, Any] = {}
_shipped: list[bytes] = []


def start(shipped: list[bytes], parent: int, use_gpu: bool) -> None:
    """Prepare a worker; user code is imported at its first call, where an error can be told."""
    _die_with(parent)
    # At once, also inside code that never comes back to the interpreter's own handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    variables = os.environ  # noqa: TID251 - of this process, before the user's code reads them
    variables.update(_ONE_THREAD)
    if not use_gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    _shipped.extend(shipped)


def call(reward: int | bytes, arguments: bytes) -> Answer:
    """Call a reward; its failure is an answer too, so that nothing but plain data travels."""
    try:
        blob = _shipped[reward] if isinstance(reward, int) else reward
        return answer_of(_load(blob)(**cloudpickle.loads(arguments)))
    except BaseException as error:  # noqa: BLE001 - told as text; also sys.exit() of a reward
        return "error", told(error)


def told(error: BaseException) -> str:
    """What was raised and the line of the user's that did it, in one line."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    if not theirs:
        return text
    frame = theirs[-1]
    line = f": {frame.line}" if frame.line else ""
    return f"{text} ({frame.filename}:{frame.lineno}, in {frame.name}{line})"


def answer_of(value: Any) -> Answer:
    """A returned value as a number or named numbers, or why it is neither."""
    for kinds, message in _MISUSES.items():
        if isinstance(value, kinds):
            return "misuse", message
    try:
        if isinstance(value, Mapping):
            if not value:
                raise ValueError("a reward's dictionary must hold a number, got an empty one.")
            return "value", {_name(name): _number(number) for name, number in value.items()}
        return "value", _number(value)
    except (TypeError, ValueError, OverflowError) as error:
        return "error", f"{error}"


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a reward's dictionary must have names as keys, got {name!r}.")
    return name


def _number(value: Any) -> float:
    if value is None or isinstance(value, str | bytes):
        raise TypeError(f"a reward must return a number, got {value!r}.")
    number = float(value)
    if not is_trainable(number):
        where = ", also in fp32" if math.isfinite(number) else ""
        raise ValueError(f"a reward must be finite{where}, got {number}.")
    return number


def is_trainable(reward: float) -> bool:
    """Whether a reward is a number, also in fp32."""
    return math.isfinite(reward) and abs(reward) <= LARGEST


def _load(blob: bytes) -> Any:
    if blob not in _loaded:
        if len(_loaded) >= _CACHE_SIZE:
            _loaded.clear()
        _loaded[blob] = cloudpickle.loads(blob)
    return _loaded[blob]


def _die_with(parent: int) -> None:
    """End this process when its parent is gone, however that ended."""
    if sys.platform == "linux":
        # Also ends code that never lets go of the interpreter, such as a runaway regex.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
