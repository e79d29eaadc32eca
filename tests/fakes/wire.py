"""A wire between a client and a server that can be cut: bytes go through, or nothing does."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Wire:
    """Forwards connections to the server at `target`, on a thread of its own.

    Attributes:
        num_cuts: How often it was cut.
    """

    def __init__(self, target: str) -> None:
        address = urlsplit(target)
        self._target = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._whole = threading.Event()
        self._whole.set()
        self._ended = False
        self._ends: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.num_cuts = 0
        self._start(self._accept, self._listener)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def cut(self, *, quietly: bool = False) -> None:
        """Connections break and none is accepted; or, quietly, no byte comes through."""
        with self._lock:
            self._whole.clear()
            self.num_cuts += 1
            if not quietly:
                self._shut(self._listener)
                for end in self._ends:
                    self._shut(end)

    def mend(self) -> None:
        """All is as before."""
        with self._lock:
            if self._listener.fileno() == -1:
                self._listener = socket.create_server(("127.0.0.1", self._port))
                self._start(self._accept, self._listener)
            self._whole.set()

    def close(self) -> None:
        with self._lock:
            self._ended = True
            for end in (self._listener, *self._ends):
                self._shut(end)
            self._whole.set()
        for thread in self._threads:
            thread.join()

    def _start(self, function, *arguments) -> None:
        thread = threading.Thread(target=function, args=arguments, name="wire")
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _shut(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                here, _ = listener.accept()
                there = socket.create_connection(self._target)
            except OSError:
                return
            with self._lock:
                self._ends |= {here, there}
            self._start(self._forward, here, there)

    def _forward(self, here: socket.socket, there: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            selector.register(here, selectors.EVENT_READ, there)
            selector.register(there, selectors.EVENT_READ, here)
            while not self._ended:
                for key, _ in selector.select(0.1):
                    self._whole.wait()
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        return self._drop(here, there)
                    key.data.sendall(data)
        return self._drop(here, there)

    def _drop(self, *ends: socket.socket) -> None:
        with self._lock:
            self._ends -= set(ends)
            for end in ends:
                self._shut(end)


@contextlib.contextmanager
def wire_to(target: str) -> Iterator[Wire]:
    wire = Wire(target)
    try:
        yield wire
    finally:
        wire.close()
