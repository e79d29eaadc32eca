"""Calls between two processes over a pipe, both ways; groups, tensors and errors as they are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import logging
import os
import pickle
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from multiprocessing.connection import Connection
from typing import Any

import anyio
import cloudpickle
import torch
from torch import Tensor

from lightning_grpo.errors import RolloutError
from lightning_grpo.rollout.scoring import told
from lightning_grpo.serving.event_loop import seen

logger = logging.getLogger(__name__)

# -- what travels ----------------------------------------------------------------------------------


class _Pickler(cloudpickle.Pickler):
    """Cloudpickle's, which takes what a script or a notebook defines, with two rules of its own.

    Tensors travel without torch's archive around each, and errors without their constructors, which
    want other arguments than those that the error kept.
    """

    def reducer_override(self, obj: Any) -> Any:
        """How an object travels."""
        if type(obj) is Tensor and obj.device.type == "cpu" and _is_plain(obj):
            return torch.from_numpy, (obj.numpy(),)
        if isinstance(obj, BaseException) and not isinstance(obj, BaseExceptionGroup):
            # Of an `OSError` `args` lack the file's name.
            given = obj.__reduce__()[1] if isinstance(obj, OSError) else obj.args
            return _error, (type(obj), given, _portable(vars(obj)))
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """A value as bytes for `loads`, in another process of the same code."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


loads = pickle.loads


def _is_plain(tensor: Tensor) -> bool:
    """Whether NumPy has its like."""
    strided = tensor.layout is torch.strided and not tensor.is_neg()
    return strided and not tensor.requires_grad and tensor.dtype in _OF_NUMPY


_OF_NUMPY = {
    *(torch.float16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def _error(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)  # which keeps them
    # Python's own constructors also keep what is in no `args`, as that of a `UnicodeError` does.
    own: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    with contextlib.suppress(TypeError):
        own.__init__(error, *args)
    vars(error).update(state)
    return error


def _portable(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of an error's attributes can travel."""
    found = {}
    for name, value in state.items():
        try:
            dumps(value)
        except Exception:  # noqa: BLE001 - whatever a stranger's object raises
            logger.debug("`%s` of an error stays behind", name)
        else:
            found[name] = value
    return found


class RemoteTraceback(Exception):
    """Where an error of another process was raised; the cause of that error here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        """As Python prints it."""
        return f"\n{self.text}"


def _told_error(error: BaseException) -> bytes:
    """An error with its traceback; one that can't travel as what it says."""
    text = "".join(traceback.format_exception(error))
    try:
        data = dumps((error, text))
        loads(data)
    except Exception:  # noqa: BLE001 - whatever a stranger's error raises
        return dumps((RolloutError(told(error)), text))
    return data


# -- calls -----------------------------------------------------------------------------------------

Handler = Callable[..., Any]
"""What answers a call: a value, or a future of one."""

UNWIND_S = 10.0
"""What was called back may take so long to end before whoever waits goes on."""


class Peer:
    """One end of a pipe: calls the other end's handlers and answers its calls, in their order.

    One thread reads and runs handlers, which must be quick or give a future. Another one writes, so
    that no signal cuts a message in two.

    Args:
        pipe: To the other end; closed with this.
        why_lost: Makes the error for whoever waits when the other end is gone.

    Attributes:
        handlers: What the other end may call, by name.
        on_lost: Called when it is gone.
    """

    def __init__(self, pipe: socket.socket, why_lost: Callable[[], Exception]) -> None:
        self.handlers: dict[str, Handler] = {}
        self.on_lost: Callable[[], None] | None = None
        self._pipe = pipe
        self._connection = Connection(os.dup(pipe.fileno()))
        self._why_lost = why_lost
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._answering: dict[int, Future[Any]] = {}
        self._lost: Exception | None = None
        self._outgoing: queue.SimpleQueue[Callable[[], bytes] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=function, name=f"rollouts pipe {name}", daemon=True)
            for name, function in (("reader", self._read), ("writer", self._write))
        ]

    def start(self) -> None:
        """Begin to read; handlers must be there."""
        for thread in self._threads:
            thread.start()

    def call(self, name: str, *arguments: Any) -> Future[Any]:
        """Have the other end's handler called; the future raises what that raises."""
        future, _ = self._call(name, arguments)
        return future

    def tell(self, name: str, *arguments: Any) -> None:
        """As `call`, without an answer."""
        self._send("tell", 0, name, arguments)

    async def ask(self, name: str, *arguments: Any) -> Any:
        """As `call`, from an event loop; cancelling it cancels what the handler began."""
        future, number = self._call(name, arguments)
        answer = asyncio.wrap_future(future)
        answer.add_done_callback(seen)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            self._send("cancel", number)
            with anyio.CancelScope(shield=True):
                await asyncio.wait([answer], timeout=UNWIND_S)
            raise

    def flush(self) -> None:
        """Write what is to be written; nothing is written any more."""
        self._outgoing.put(None)
        if self._threads[1].ident is not None:
            self._threads[1].join(UNWIND_S)

    def close(self) -> None:
        """Write what is to be written, hang up, and end the threads."""
        self.flush()
        with contextlib.suppress(OSError):  # the other end has done so
            self._pipe.shutdown(socket.SHUT_RDWR)
        if self._threads[0].ident is not None:
            self._threads[0].join(UNWIND_S)
        self._connection.close()
        self._pipe.close()

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[Future[Any], int]:
        data = dumps((name, arguments))
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # so that an answer always finds it
        with self._lock:
            number, lost = next(self._ids), self._lost
            if lost is None:
                self._asked[number] = future
        if lost is not None:
            future.set_exception(lost)
        else:
            self._outgoing.put(lambda: _frame("call", number) + data)
        return future, number

    def _send(self, kind: str, number: int, *content: Any) -> None:
        data = _frame(kind, number) + (dumps(content) if content else b"")
        self._outgoing.put(lambda: data)

    # ---- in the threads --------------------------------------------------------------------

    def _write(self) -> None:
        while (encode := self._outgoing.get()) is not None:
            try:
                self._connection.send_bytes(encode())
            except OSError:  # the reader sees it, too
                return

    def _read(self) -> None:
        try:
            while True:
                self._take(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            logger.debug("the pipe of the rollouts has ended: %r", error)
        lost = self._why_lost()
        with self._lock:
            self._lost = lost
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.set_exception(lost)
        if self.on_lost is not None:
            self.on_lost()

    def _take(self, data: bytes) -> None:
        kind, number, content = _unframed(data)
        if kind == "cancel":
            if (running := self._answering.get(number)) is not None:
                running.cancel()
        elif kind in ("call", "tell"):
            self._answer(number, content, reply=kind == "call")
        else:
            with self._lock:
                future = self._asked.pop(number, None)
            if future is not None:
                _settle(future, kind, content)

    def _answer(self, number: int, content: bytes, *, reply: bool) -> None:
        try:
            name, arguments = loads(content)
            result = self.handlers[name](*arguments)
        except BaseException as error:
            result = Future()
            result.set_exception(error)
            if not reply:
                logger.exception("a message of the rollouts could not be taken")
        if not reply:
            return
        if not isinstance(result, Future):
            done: Future[Any] = Future()
            done.set_result(result)
            result = done
        self._answering[number] = result
        # Encoded by the thread that writes: millions of tokens would hold the event loop.
        result.add_done_callback(lambda done: self._outgoing.put(lambda: self._reply(number, done)))

    def _reply(self, number: int, future: Future[Any]) -> bytes:
        self._answering.pop(number, None)
        try:
            return _frame("done", number) + dumps(future.result())
        except CancelledError:
            return _frame("failed", number) + _told_error(RolloutError("it was called back"))
        except BaseException as error:  # noqa: BLE001 - also of what can't travel
            return _frame("failed", number) + _told_error(error)


_KINDS = ("call", "tell", "cancel", "done", "failed")
_NUMBER_BYTES = 8


def _frame(kind: str, number: int) -> bytes:
    return bytes([_KINDS.index(kind)]) + number.to_bytes(_NUMBER_BYTES, "little")


def _unframed(data: bytes) -> tuple[str, int, bytes]:
    end = 1 + _NUMBER_BYTES
    return _KINDS[data[0]], int.from_bytes(data[1:end], "little"), data[end:]


def _settle(future: Future[Any], kind: str, content: bytes) -> None:
    """Give an answer to whoever waits for it."""
    try:
        value = loads(content)
    except Exception as error:  # noqa: BLE001 - a stranger's class that is not here
        future.set_exception(RolloutError(f"an answer of the rollouts can't be read: {error!r}"))
        return
    if kind == "done":
        future.set_result(value)
        return
    raised, text = value
    raised.__cause__ = RemoteTraceback(text)
    future.set_exception(raised)
