"""Stands for a fork of `rank_forkserver.py`: `python fork_client.py NAME -m MODULE ...`.

The fork has its standard streams, its environment and its folder, gets its signals, and ends where
it is killed; how the fork ended is how it ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

NUMBER = struct.Struct("=i")


def ask_for_fork(
    name: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    streams: tuple[int, int, int],
) -> socket.socket:
    """Where its process id is told, and then its exit status. Whoever closes it kills the fork.

    Args:
        name: Of the socket where that is asked for; no file, so that none is left.
        argv: A script, or `-m` and a module, and its arguments.
        environment: All of its variables.
        folder: Where it runs.
        streams: Its standard input, output and error.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{name}")
    order = {"argv": [*argv], "environment": {**environment}, "folder": folder}
    socket.send_fds(connection, [json.dumps(order).encode()], streams)
    return connection


def told(connection: socket.socket) -> int:
    """The next number."""
    return NUMBER.unpack(connection.recv(NUMBER.size))[0]


def main(name: str, *argv: str) -> None:
    """Be that process until it ends."""
    connection = ask_for_fork(name, argv, os.environ, os.getcwd(), (0, 1, 2))
    for stream in (0, 1):  # else a pipe would have two readers, or two writers
        os.close(stream)
    pid = told(connection)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    if (status := told(connection)) < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
