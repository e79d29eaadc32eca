"""A process group of the trainer and one server, made the way SGLang makes it.

SGLang joins through `rendezvous("tcp://...")` and torch's private helper for groups. This side
needs neither: the same store, the same prefixes and the backend itself, which leaves torch's global
state alone, so that a broken group is dropped by dropping the object.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

POLL_S = 0.002
DEVICES = {"gloo": "cpu", "nccl": "cuda"}
"""The device whose name SGLang's helper puts into the keys of each backend."""


class WeightGroup:
    """The trainer as rank 0, the server's ranks after it.

    Args:
        name: Unique at the server.
        backend: `gloo` or `nccl`.
        world_size: 1 + the server's ranks.
        host: This machine's address as the server sees it.
        timeout_s: Of joining, and of each broadcast.
    """

    def __init__(
        self, name: str, backend: str, world_size: int, host: str, timeout_s: float
    ) -> None:
        self.name = name
        self.backend = backend
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(
            host, 0, None, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self._host = host
        self._quiet_keys = self._store.num_keys()
        self._backend: Any = None

    def invitation(self) -> dict[str, object]:
        """The body of `/init_weights_update_group`."""
        return {
            "master_address": self._host,
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": self.world_size,
            "group_name": self.name,
            "backend": self.backend,
        }

    def join(self, stopped: list[bool]) -> None:
        """Blocks until the server has joined, too.

        The server's first key in the store is awaited before: joining can't be interrupted, and a
        server that refuses the invitation never comes.

        Args:
            stopped: Not empty once joining is pointless.
        """
        deadline = time.monotonic() + self._timeout.total_seconds()
        while self._store.num_keys() <= self._quiet_keys:
            if stopped:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not join {self.name}")
            time.sleep(POLL_S)
        prefix = PrefixStore(self.name, self._store)
        prefix = PrefixStore(f"{self.name}/", prefix)
        prefix = PrefixStore(f"{DEVICES[self.backend]}/", prefix)
        if self.backend == "gloo":
            self._backend = dist.ProcessGroupGloo(prefix, 0, self.world_size, self._timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._backend = dist.ProcessGroupNCCL(prefix, 0, self.world_size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Sends a tensor to every rank of the server; blocks until it is there."""
        backend = self._backend
        assert backend is not None, "the group was not joined, or left"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        try:
            if tensor.is_cuda:
                # On a stream of its own: the policy's next pass must not wait for the server.
                stream = torch.cuda.Stream(tensor.device)
                stream.wait_stream(torch.cuda.current_stream(tensor.device))
                with torch.cuda.stream(stream):
                    backend.broadcast([tensor], options).wait()
                    stream.synchronize()
            else:
                backend.broadcast([tensor], options).wait()
        finally:
            del backend  # an error's traceback would keep the connection open

    def abort(self) -> None:
        """Breaks the group, as far as the backend can; NCCL's kernels are ended."""
        if self._backend is not None and self.backend == "nccl":
            self._backend.abort()

    def leave(self) -> None:
        """Closes this side's connection, once no broadcast is under way."""
        self.abort()
        self._backend = None


def address_towards(url: str) -> str:
    """The address of this machine that a server at `url` can reach.

    It is the one that packets to the server would carry; nothing is sent to find out.
    """
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
