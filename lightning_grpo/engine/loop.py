"""The engine's thread: commands, a decode step, answers, and again.

All of the scheduler runs on this thread, so that nothing in it needs a lock: whatever the server
wants done is a command that runs between two decode steps.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from lightning_grpo.engine.request import Output, Request
from lightning_grpo.engine.scheduler import Scheduler
from lightning_grpo.errors import GRPOError

T = TypeVar("T")


class EngineThread:
    """Runs a scheduler until the process ends.

    A failure of a step ends the process with its traceback: an engine that can't decode must not
    leave its clients waiting.

    Args:
        scheduler: What it runs.
        loop: Where listeners are called.
    """

    def __init__(self, scheduler: Scheduler, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduler = scheduler
        self._loop = loop
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step and wait for it."""

        def end() -> None:
            self._stopping = True

        self._commands.put(end)
        self._thread.join()

    async def call(self, function: Callable[[Scheduler], T]) -> T:
        """Run `function` on the engine's thread between two steps.

        What it refuses is raised here; any other error of it ends the process. A caller who is
        cancelled can't know whether it ran.
        """
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._scheduler))
            except GRPOError as error:
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    def post(self, function: Callable[[Scheduler], None]) -> None:
        """Run `function` on the engine's thread and don't wait; it must not raise."""
        self._commands.put(lambda: function(self._scheduler))

    def _run(self) -> None:
        try:
            # OpenMP counts threads for each thread anew; a second one only costs at this size.
            torch.set_num_threads(1)
            # Around everything: tensors made in this mode can only be written to in it.
            with torch.inference_mode():
                while not self._stopping:
                    self._run_commands()
                    self._scheduler.step()
                    self._deliver()
        except BaseException:  # noqa: BLE001 - nobody is left to hear of it
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _run_commands(self) -> None:
        """Run what has come; wait for something if there is nothing else to do."""
        if not self._scheduler.has_work:
            # What the last command said must go out before the wait.
            self._deliver()
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _deliver(self) -> None:
        outbox = self._scheduler.outbox
        if outbox:
            self._scheduler.outbox = []
            self._loop.call_soon_threadsafe(_tell_listeners, outbox)


def _tell_listeners(outbox: list[tuple[Request, Output]]) -> None:
    for request, output in outbox:
        request.listener(output)
