"""A listening socket that can be closed at any moment without leaving a half-accepted connection.

asyncio accepts a connection in one turn of the loop and gives it a transport in a later one. A
server that was closed in between drops the socket unclosed, which Python warns of (3.11).
"""

from __future__ import annotations

import asyncio
import socket

TURNS = 4


def listen(port: int = 0) -> socket.socket:
    """On loopback; port 0 is any free one."""
    listener = socket.create_server(("127.0.0.1", port))
    listener.setblocking(False)
    return listener


async def stop_accepting(listener: socket.socket) -> None:
    """No new connection from here on, and those that were accepted have their transports."""
    asyncio.get_running_loop().remove_reader(listener)
    for _ in range(TURNS):
        await asyncio.sleep(0)
