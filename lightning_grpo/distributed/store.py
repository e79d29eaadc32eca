"""The store of the ranks: where it listens, and that nobody but they write what is read from it."""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_grpo.distributed.exchange import Exchange

LOOPBACK = "127.0.0.1"


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Read values that exist."""


class SignedStore:
    """A store whose values carry a code that only those who know the run's secret can make.

    torch's store lets anybody write who reaches its port, and read: the secret itself is in no
    value.

    Args:
        store: What holds the values.
        secret: The run's, which its ranks were told over their process group.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store, self._secret = store, secret

    def set(self, key: str, value: str) -> None:
        """Write a value with its code."""
        self._store.set(key, f"{self._code(key, value.encode())} {value}")

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read values; empty where somebody else has written one."""
        found = self._store.multi_get(keys)
        return [self._opened(key, data) for key, data in zip(keys, found, strict=True)]

    def _opened(self, key: str, data: bytes) -> bytes:
        code, _, value = data.partition(b" ")
        return value if hmac.compare_digest(code, self._code(key, value).encode()) else b""

    def _code(self, key: str, value: bytes) -> str:
        # The key is part of it: the record of one rank is none of another's.
        return hmac.new(self._secret, key.encode() + b"\0" + value, hashlib.sha256).hexdigest()


def open_store(
    rank: int, world_size: int, host: str, exchange: Exchange, timeout_s: float
) -> Store:
    """Rank 0 opens a store on a free port, the others connect to it; a collective.

    Every key is made to exist first, so that no read ever waits for one. Where all ranks are on
    one machine it listens on loopback alone. Elsewhere on every address: which of them the others
    take a name for is theirs to say.

    Args:
        rank: This process.
        world_size: All of them.
        host: Where the other ranks reach rank 0.
        exchange: Carries the port and the run's secret.
        timeout_s: Of one call.
    """
    machine: str = exchange.broadcast(this_machine())
    alone = exchange.largest(int(machine != this_machine())) == 0
    host = LOOPBACK if alone else host
    limit = timedelta(seconds=timeout_s)
    if rank != 0:
        port, secret = exchange.broadcast(None)
        return SignedStore(TCPStore(host, port, None, False, limit, wait_for_workers=False), secret)
    port, file = listen_on_loopback() if alone else (0, None)
    store = TCPStore(host, port, None, True, limit, wait_for_workers=False, master_listen_fd=file)
    for each in range(world_size):
        store.set(f"pulse/{each}", "")
    secret = secrets.token_bytes(32)
    exchange.broadcast((store.port, secret))
    return SignedStore(store, secret)


def listen_on_loopback() -> tuple[int, int]:
    """A free port that only this machine's processes reach, and the file that listens on it."""
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        listening.listen(socket.SOMAXCONN)
        port: int = listening.getsockname()[1]
        return port, listening.detach()


def this_machine() -> str:
    """What processes with the same loopback have in common: the boot, and the network's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # no Linux
        return platform.node()
