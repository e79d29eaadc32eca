"""Rewards: bound to their arguments, and computed in processes of their own.

A stuck or crashed one costs its own call, no other.

A function may live in the user's script, a notebook cell or be a lambda: cloudpickle ships it by
value. The functions known at the start travel once per process, not with each call.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import itertools
import math
import os
import pickle
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import anyio
import anyio.to_thread
import cloudpickle
from loky.backend.context import LokyContext
from pebble import ProcessExpired, ProcessPool

from lightning_grpo.errors import ConfigError, RewardError
from lightning_grpo.serving.event_loop import SameTurn, seen
from lightning_grpo.types import Prompt

_T = TypeVar("_T")

# -- what a reward is called with ------------------------------------------------------------------

Reward = Callable[..., Any]
"""`reward(prompt, completion, **columns) -> float | dict[str, float]`; sync or async."""

RewardValue = float | dict[str, float]
"""What a reward comes to: one number, or several under their names."""

RESERVED = (
    "prompt",
    "messages",
    "completion",
    "completions",
    "prompt_ids",
    "completion_ids",
)
"""Arguments that are no column. `completions` is AReaL's name of `completion`."""

TEXT_ASKED = "_text_asked"
"""Offered besides: what `from_trl` decides by; None for a conversation."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class BoundReward:
    """A reward function and the names that it asks for.

    Args:
        reward: Any callable; its parameters are reserved names or columns, each by its name.
            `**kwargs` receives all columns.
        name: What it is logged under; empty: its own name.
    """

    def __init__(self, reward: Reward, name: str = "") -> None:
        if not callable(reward):
            raise ConfigError(f"a reward must be callable, got {reward!r}.")
        self.reward = reward
        self.name = name or legal_name(reward_name(reward))
        self._required: list[str] = []
        self._names: set[str] = set()
        self._takes_all = False
        for parameter in self._signature().parameters.values():
            self._add(parameter)

    def _add(self, parameter: inspect.Parameter) -> None:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            self._takes_all = True
        elif parameter.kind in _NAMED:
            self._names.add(parameter.name)
            if parameter.default is inspect.Parameter.empty:
                self._required.append(parameter.name)
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward {self.name!r} has a positional-only argument {parameter.name!r}: "
                "rewards are called by name. Remove the `/`."
            )

    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.reward)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"reward {self.name!r} has no readable signature ({error}). "
                "Wrap it in a function that names its arguments."
            ) from error

    def validate(self, columns: Collection[str]) -> None:
        """Refuse an argument that nothing provides, and a column that hides a reserved name."""
        hidden = sorted(set(columns) & set(RESERVED))
        if hidden:
            raise ConfigError(
                f"column {hidden[0]!r} hides an argument of that name which rewards receive. "
                "Rename it with `transform`."
            )
        missing = [name for name in self._required if name not in {*columns, *RESERVED}]
        if missing:
            raise ConfigError(
                f"reward {self.name!r} asks for {missing[0]!r}, which is no column. "
                f"Columns: {sorted(columns)}; always there: {sorted(RESERVED)}."
            )

    def arguments(
        self, prompt: Prompt, completion: str, completion_ids: Sequence[int]
    ) -> dict[str, Any]:
        """The arguments to call the reward with."""
        offered: Mapping[str, Any] = {
            **prompt.columns,
            "prompt": prompt.text,
            "messages": [dict(message) for message in prompt.messages],
            "completion": completion,
            "completions": completion,
            "prompt_ids": list(prompt.input_ids),
            "completion_ids": list(completion_ids),
            TEXT_ASKED: prompt.asked,
        }
        wanted = set(self._names)
        if self._takes_all:
            wanted |= set(prompt.columns)
        return {name: offered[name] for name in offered if name in wanted}


Rewards = list[Callable[..., Any]] | Callable[..., Any] | dict[str, Callable[..., Any]]
"""A reward, several, or several by the names that they are logged under."""


def bind_rewards(reward: Rewards) -> list[BoundReward]:
    """Each function with a name of its own that every logger takes.

    Raises:
        ConfigError: There is none, or one that can't be called by name.
    """
    if isinstance(reward, Mapping):
        named = [(str(name), function) for name, function in reward.items()]
    else:
        functions = reward if isinstance(reward, list | tuple) else [reward]
        named = [("", function) for function in functions]
    if not named:
        kind = "dictionary" if isinstance(reward, Mapping) else "list"
        raise ConfigError(f"`reward` must name at least one function, got an empty {kind}.")
    bound = [BoundReward(function, legal_name(name) if name else "") for name, function in named]
    taken: set[str] = set()
    for each in bound:
        each.name = free_name(each.name, taken)
        taken.add(each.name)
    return bound


def legal_name(name: str) -> str:
    """A name without what a logger refuses (MLflow takes letters, digits and `_ - .` only)."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "reward"


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or with the first number that makes it another."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def reward_name(reward: Reward) -> str:
    """The name that a reward is logged under: the function's, or the class's of an object."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    named = inspect.isroutine(reward) or inspect.isclass(reward)
    return str(reward.__name__ if named else type(reward).__name__)


# -- in the processes ------------------------------------------------------------------------------

Answer = tuple[Literal["value", "error", "misuse"], Any]
"""A reward's value; or the text of why there is none; or of why there never will be one."""

Called = tuple[list[Answer], float]
"""The answers of several calls, and how long the slowest took."""

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


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Python's, other packages' and this one's lines are not where a user looks first.
_NOT_THEIRS = (
    *{sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")},
    *(os.path.join(_PACKAGE, part) for part in ("agents", "rollout", "datamodule.py")),
    "<frozen",
)

_CACHE_SIZE = 32
_QUICK_S = 0.002
"""To take such a call to a process and back costs more than the call."""
_TOGETHER_S = 1.0
"""For all calls that go together; each has its own time if that is not enough."""
_LOADING_S = 120.0
"""To import what a reward's module needs (torch takes seconds), once in each process."""
_loaded: dict[int | bytes, Any] = {}
_shipped: list[bytes] = []


def start_worker(shipped: list[bytes], parent: int, use_gpu: bool) -> None:
    """Prepare a worker; user code is imported when it is asked for, where an error can be told."""
    die_with(parent)
    # At once, also inside code that never comes back to the interpreter's own handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    variables = os.environ  # noqa: TID251 - of this process, before the user's code reads them
    variables.update(_ONE_THREAD)
    if not use_gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    _shipped.extend(shipped)


def load_reward(reward: int) -> Answer | None:
    """Import a shipped reward's code; an answer is why that failed."""
    try:
        if reward not in _loaded:
            _loaded[reward] = cloudpickle.loads(_shipped[reward])
    except BaseException as error:  # noqa: BLE001 - told as text; also sys.exit() of a module
        return "error", told(error)
    return None


def call_reward(reward: int | bytes, calls: Sequence[bytes]) -> Called | None:
    """Call a reward with each of some arguments, in turn.

    None: it is a shipped one that this process has not loaded yet.
    """
    if isinstance(reward, int) and reward not in _loaded:
        return None
    answers, slowest_s = [], 0.0
    for arguments in calls:
        began = time.perf_counter()
        answers.append(_answer(reward, arguments))
        slowest_s = max(slowest_s, time.perf_counter() - began)
    return answers, slowest_s


def _answer(reward: int | bytes, arguments: bytes) -> Answer:
    """A failure is an answer too, so that nothing but plain data travels."""
    try:
        function = _loaded[reward] if isinstance(reward, int) else _load_travelled(reward)
        return answer_of(function(**cloudpickle.loads(arguments)))
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
            return "value", {_reward_name(name): _number(number) for name, number in value.items()}
        return "value", _number(value)
    except (TypeError, ValueError, OverflowError) as error:
        return "error", f"{error}"


def _reward_name(name: Any) -> str:
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


def _load_travelled(blob: bytes) -> Any:
    if blob not in _loaded:
        travelled = [each for each in _loaded if isinstance(each, bytes)]
        for each in travelled if len(travelled) >= _CACHE_SIZE else ():
            del _loaded[each]
        _loaded[blob] = cloudpickle.loads(blob)
    return _loaded[blob]


def die_with(parent: int, *, by_signal: bool = True) -> None:
    """End this process when its parent is gone, however that ended.

    Args:
        parent: Its process.
        by_signal: Whether the kernel sees to it, too, at the end of the thread that started this
            process.
    """
    if by_signal and sys.platform == "linux":
        # Also ends code that never lets go of the interpreter, such as a runaway regex.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


# -- the scorer ------------------------------------------------------------------------------------


@dataclass
class ScoringCounts:
    """Calls of rewards since the start.

    Attributes:
        scored: Calls that gave a value.
        failed: Calls that raised or gave no finite number.
        timed_out: Calls whose process was killed.
        crashed: Calls whose process ended by itself.
        seconds: Time of all calls, waiting for a free process included.
    """

    scored: int = 0
    failed: int = 0
    timed_out: int = 0
    crashed: int = 0
    seconds: float = 0.0


# Of the function's own, and not of a service that an async one asks.
_FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
           TypeError, ValueError)  # fmt: skip


class RewardFailedError(RewardError):
    """The function itself raised, or gave no number."""


class _LostProcessError(RewardError):
    """The process of a call ended."""


class RewardScorer:
    """Calls rewards under a time limit; an async context manager.

    Consumes a reward and its arguments. Waits for a free process, then for the call, or its limit.
    Produces a finite number, or several by name; never one for a call that failed. The workflow
    goes on.

    Args:
        rewards: Functions that are shipped when a process starts; others travel with each call.
        processes: How many; 0 calls in-line, without a limit, for a debugger.
        timeout_s: Of one call, from when a process takes it up; what the function's module imports
            has a limit of its own.
        use_gpu: Whether the processes see the GPUs.
    """

    def __init__(
        self,
        rewards: Sequence[Reward] = (),
        processes: int = 2,
        timeout_s: float = 15.0,
        use_gpu: bool = False,
    ) -> None:
        self.processes = processes
        self.timeout_s = timeout_s
        self.counts = ScoringCounts()
        self._rewards = list(rewards)
        self._use_gpu = use_gpu
        self._shipped = {id(reward): index for index, reward in enumerate(self._rewards)}
        self._pool: _OwnedPool | None = None
        self._starting = anyio.Lock()
        self._quick: set[int | bytes] = set()  # rewards whose last call was
        self._same_turn = SameTurn(self._call_several)

    def forget_counts(self) -> None:
        """Count from here on."""
        self.counts = ScoringCounts()

    async def __aenter__(self) -> Self:
        """Start the processes, ahead of the first call."""
        if self.processes and not all(is_async(reward) for reward in self._rewards):
            self._pool = await anyio.to_thread.run_sync(self._start_pool)
        return self

    async def __aexit__(self, *error: object) -> None:
        """End every process, whatever it is doing."""
        await self._close(self._pool)

    async def score(
        self, reward: Reward, arguments: Mapping[str, Any], timeout_s: float | None = None
    ) -> RewardValue:
        """Call `reward(**arguments)`.

        Args:
            reward: What to call.
            arguments: By name.
            timeout_s: A time limit of its own; None: the scorer's.

        Raises:
            RewardError: It raised (told with the line that did), timed out, crashed, or gave no
                finite number. There is no score then: never a silent 0.
            ConfigError: It returned a list or a coroutine, which no further attempt can cure.
        """
        began = time.perf_counter()
        try:
            if is_async(reward) or self.processes == 0:
                kind, value = await self._call_here(reward, arguments, timeout_s or self.timeout_s)
            else:
                kind, value = await self._call_in_process(
                    reward, arguments, timeout_s or self.timeout_s
                )
        finally:
            self.counts.seconds += time.perf_counter() - began
        if kind == "misuse":
            raise ConfigError(f"reward {reward_name(reward)!r}: {value}")
        if kind == "error":
            self.counts.failed += 1
            raise RewardFailedError(f"reward {reward_name(reward)!r} failed: {value}")
        self.counts.scored += 1
        return value

    async def _call_here(
        self, reward: Reward, arguments: Mapping[str, Any], timeout_s: float
    ) -> Answer:
        try:
            with anyio.move_on_after(timeout_s):
                value = reward(**arguments)
                return answer_of(await value if is_async(reward) else value)
        except Exception as error:
            self.counts.failed += 1
            kind = RewardFailedError if isinstance(error, _FAULTS) else RewardError
            raise kind(f"reward {reward_name(reward)!r} failed: {told(error)}") from error
        raise self._timed_out(reward, timeout_s)

    async def _call_in_process(
        self, reward: Reward, arguments: Mapping[str, Any], timeout_s: float
    ) -> Answer:
        shipped = self._shipped.get(id(reward))
        named = shipped if shipped is not None else cloudpickle.dumps(reward)
        pickled = _pickle(dict(arguments))
        if named in self._quick:
            answer = await self._same_turn.ask(named, pickled)
            if answer is not None:
                return answer
        try:
            return await self._call_pool(reward, named, pickled, timeout_s)
        except _LostProcessError:  # whoever ended it: what ends it again is the call itself
            return await self._call_pool(reward, named, pickled, timeout_s)

    async def _call_several(
        self, named: int | bytes, calls: Sequence[bytes]
    ) -> Sequence[Answer] | None:
        """Have one process make quick calls; None: each is to be made alone, or fails as one."""
        pool, called = self._pool, None
        if pool is not None and len(calls) > 1:
            with suppress(TimeoutError, ProcessExpired, RuntimeError):
                called = await pool.call(
                    call_reward, (named, calls), min(self.timeout_s, _TOGETHER_S)
                )
            self._note(named, called)
        return None if called is None else called[0]

    def _note(self, named: int | bytes, called: Called | None) -> None:
        """Remember whether a reward is quick."""
        if called is not None and called[1] <= _QUICK_S:
            self._quick.add(named)
        else:
            self._quick.discard(named)

    async def _call_pool(
        self, reward: Reward, named: int | bytes, arguments: bytes, timeout_s: float
    ) -> Answer:
        async with self._starting:
            if self._pool is None:
                self._pool = await anyio.to_thread.run_sync(self._start_pool)
        pool = self._pool
        try:
            given = (named, [arguments])
            while (called := await pool.call(call_reward, given, timeout_s)) is None:
                failed = await self._load(pool, reward)
                if failed is not None:
                    return failed
            self._note(named, called)
            return called[0][0]
        except TimeoutError:
            raise self._timed_out(reward, timeout_s) from None
        except ProcessExpired as error:
            self.counts.crashed += 1
            code = 0 if error.exitcode == _LEFT else error.exitcode
            raise _LostProcessError(
                f"the process of reward {reward_name(reward)!r} ended by itself "
                f"(exit code {code}; -9 is often the kernel, out of memory)"
            ) from None
        except RuntimeError as error:  # pebble's: the pool is broken
            await self._close(pool)
            self.counts.crashed += 1
            raise _LostProcessError(
                f"the processes that run rewards were lost and start anew ({error})"
            ) from error

    async def _load(self, pool: _OwnedPool, reward: Reward) -> Answer | None:
        """Have a process load a shipped reward, outside of any call's time."""
        try:
            return await pool.call(load_reward, (self._shipped[id(reward)],), _LOADING_S)
        except TimeoutError:
            raise self._timed_out(reward, _LOADING_S, "is allowed to import its module") from None

    def _timed_out(
        self, reward: Reward, timeout_s: float, limit: str = "`reward_timeout_s`"
    ) -> RewardError:
        self.counts.timed_out += 1
        return RewardError(
            f"reward {reward_name(reward)!r} took longer than {limit} ({timeout_s:g} s) and was "
            "ended"
        )

    async def _close(self, pool: _OwnedPool | None) -> None:
        if pool is not None and self._pool is pool:
            self._pool = None
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(pool.close)

    def _start_pool(self) -> _OwnedPool:
        blobs = [_shippable(reward) for reward in self._rewards]
        return _OwnedPool(self.processes, (blobs, os.getpid(), self._use_gpu))


def _shippable(reward: Reward) -> bytes:
    try:
        return cloudpickle.dumps(reward)
    except Exception as error:
        raise ConfigError(
            f"reward {reward_name(reward)!r}",
            f"must be one that other processes can be given, which failed: {told(error)}",
            way_out="Make locks, connections and the like inside the function, or in its module; "
            "or set `limits.reward_processes` to 0, so that it is called in the run's own process.",
        ) from error


class TokenLock:
    """A lock between processes: whoever holds it has read the only byte of a pipe; recursive.

    multiprocessing's and loky's are semaphores with names, which stay in /dev/shm for ever when
    their process is killed together with the one that would remove them.

    Args:
        context: Makes pipes that processes of its kind can be given.
    """

    def __init__(self, context: LokyContext) -> None:
        token, back = context.Pipe(duplex=False)
        os.set_blocking(token.fileno(), False)
        os.write(back.fileno(), b".")
        self.__setstate__((token, back))

    def __getstate__(self) -> tuple[Any, Any]:
        return self._token, self._back

    def __setstate__(self, state: tuple[Any, Any]) -> None:
        self._token, self._back = state
        self._here, self._depth = threading.RLock(), 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take it, or wait so many seconds for it; whether it was taken."""
        end = None if block and timeout is None else time.monotonic() + (timeout or 0) * block
        if not self._here.acquire(timeout=-1 if end is None else max(0, end - time.monotonic())):
            return False
        if not self._depth and not self._take(end):
            self._here.release()
            return False
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back, as often as it was taken."""
        self._depth -= 1
        if not self._depth:
            os.write(self._back.fileno(), b".")
        self._here.release()

    def _take(self, end: float | None) -> bool:
        while True:
            try:
                return bool(os.read(self._token.fileno(), 1))
            except BlockingIOError:  # somebody has it, or was faster
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._token.poll(left)


_LEFT = 256
"""No exit code: pebble takes 0 for an end that it asked for, and a lost call for a slow one."""


class _Process(LokyContext.Process):
    @property
    def exitcode(self) -> int | None:
        """Of 0, which is a reward's own `os._exit(0)`, something else."""
        code: int | None = super().exitcode
        return _LEFT if code == 0 else code


class _Context(LokyContext):
    """loky's processes, which need no guarded main module, with locks that leave nothing behind."""

    Process = _Process

    def RLock(self) -> TokenLock:
        return TokenLock(self)


class _OwnedPool:
    """A pool whose processes are started by a thread that lives as long as it does.

    Linux ends a process that asked for it when the *thread* that started it ends, so that must be
    none of the short-lived ones.
    """

    def __init__(self, processes: int, arguments: tuple[Any, ...]) -> None:
        self._pool = ProcessPool(
            max_workers=processes,
            context=_Context(),
            initializer=start_worker,
            initargs=arguments,
        )
        self._started = threading.Event()
        self._closing = threading.Event()
        self._owner = threading.Thread(target=self._own, name="reward-processes", daemon=True)
        self._owner.start()
        self._started.wait()

    async def call(
        self, function: Callable[..., _T], arguments: tuple[Any, ...], timeout_s: float
    ) -> _T:
        future = self._pool.schedule(function, args=arguments, timeout=timeout_s)
        waiting: asyncio.Future[_T] = asyncio.wrap_future(future)
        waiting.add_done_callback(seen)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # A call that runs is left to end: to kill it costs a new process.
            if not future.running():
                future.cancel()
            raise

    def close(self) -> None:
        self._closing.set()
        self._owner.join()

    def _own(self) -> None:
        try:
            _ = self._pool.active  # starts the processes
        finally:
            self._started.set()
        self._closing.wait()
        self._pool.stop()
        self._pool.join()


def is_async(reward: Reward) -> bool:
    """Whether a reward runs on the event loop."""
    target = reward if inspect.isroutine(reward) else type(reward).__call__
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(reward)


def _pickle(arguments: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        return cloudpickle.dumps(arguments)  # slower, and knows more kinds of objects
