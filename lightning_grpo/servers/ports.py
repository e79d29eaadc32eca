"""Free ports of this machine."""

from __future__ import annotations

import random
import socket

from lightning_grpo.errors import ConfigError


def free_ports(count: int, port_range: tuple[int, int], seed: int | None = None) -> list[int]:
    """Ports in `[first, last)` that nothing listens on, tried in random order.

    Two runs that start at the same moment on one machine so rarely pick the same.

    Raises:
        ConfigError: There are not enough.
    """
    candidates = list(range(*port_range))
    random.Random(seed).shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if is_free(port):
            found.append(port)
    if len(found) < count:
        raise ConfigError(
            f"`port_range` must hold {count} free ports, {port_range[0]} to {port_range[1]} has"
            f" {len(found)}. Give another range."
        )
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen on the port, on every address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
