"""Which requests come in: their bodies bounded in size, time and number, read off the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from aiohttp import web

from lightning_grpo.engine.intake import Intake
from lightning_grpo.engine.requests import GenerateBody, Generation, decode

T = TypeVar("T")

_BODY_S = 60.0
"""How long a body may take to come."""
_SMALL = 64 << 10
"""Bodies up to here are read on the event loop, longer ones on a thread, a few at a time."""
_LARGE_AT_ONCE = 4
_MOST_COMPLETIONS = 1 << 16
"""In flight, of all requests together; more are sent away for a moment."""


class Admission:
    """Reads and checks the requests of all routes."""

    def __init__(self) -> None:
        self._num_open = 0
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        # One thread: tokenizers don't like two.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="intake")

    async def read(self, request: web.Request, kind: type[T]) -> T:
        """A request's body.

        Raises:
            BadRequestError: It is not one of this kind.
            HTTPRequestTimeout: It does not come.
        """
        if not request.can_read_body or _is_small(request):
            return decode(await _body(request), kind)
        async with self._large:
            body = await _body(request)
            return await self.off_loop(lambda: decode(body, kind))

    async def checked(
        self, request: web.Request, intake: Intake, body: GenerateBody
    ) -> tuple[list[Generation], bool]:
        """What `Intake.generations` says of a request's body; texts are tokenized off the loop."""
        if body.text is None and _is_small(request):
            return intake.generations(body)
        return await self.off_loop(lambda: intake.generations(body))

    async def off_loop(self, function: Callable[[], T]) -> T:
        """The result of something that takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    @contextmanager
    def room(self, num_completions: int) -> Iterator[None]:
        """Place for completions among those in flight.

        Raises:
            HTTPServiceUnavailable: There is none now.
        """
        if self._num_open + num_completions > _MOST_COMPLETIONS:
            raise web.HTTPServiceUnavailable(
                text=f"{self._num_open} completions are in flight, of at most {_MOST_COMPLETIONS}"
            )
        self._num_open += num_completions
        try:
            yield
        finally:
            self._num_open -= num_completions


def _is_small(request: web.Request) -> bool:
    return request.content_length is not None and request.content_length <= _SMALL


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {_BODY_S:g} s") from None
