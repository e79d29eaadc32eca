"""Servers that speak SGLang's HTTP API and compute nothing: what is measured is the client.

Many ports in one process. Every completion is the same ids and logprobs, ready before they are
asked for; `/hold` keeps replies back, so that as many requests as wanted are in flight.

    python -m benchmarks.null_server --servers 16 --new-tokens 128      # prints a URL a line, READY
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from lightning_grpo.rollout.ledger import raise_file_limit

VERSION = "0.5.19"
LIMITS = {"version": VERSION, "max_running_requests": 1 << 20, "disable_radix_cache": True}


class Canned:
    """The replies, and those that are held back.

    Args:
        new_tokens: Of each completion.
        delay_s: Between a request and its reply.
        spread: Whether replies come at any time up to then.
    """

    def __init__(self, new_tokens: int, delay_s: float = 0.0, spread: bool = False) -> None:
        self.label = "default"
        self.holding = False
        self.num_requests = 0
        self.delay_s = delay_s
        self._spread = spread
        self._held: dict[str, Callable[[], None]] = {}
        self._ids = [3 + i % 11 for i in range(new_tokens)]
        self._logprobs = [[-0.5 - i % 7 / 8, token, None] for i, token in enumerate(self._ids)]
        self._version = ""
        self._before = self._after = b""

    def reply(self, body: dict[str, Any]) -> bytes:
        """The body of `/generate`'s answer, to one request or to a list."""
        if self._version != self.label:
            self._version = self.label
            self._make()
        rids = body["rid"]
        self.num_requests += 1 if isinstance(rids, str) else len(rids)
        if isinstance(rids, str):
            return self._before + rids.encode() + self._after
        return b"[" + b",".join(self._before + r.encode() + self._after for r in rids) + b"]"

    def answer(self, rid: str, send: Callable[[], None]) -> None:
        """Have a reply sent: now, later, or when it is released."""
        if self.holding:
            self._held[rid] = send
        elif self.delay_s:
            delay_s = self.delay_s * (random.random() if self._spread else 1.0)
            asyncio.get_running_loop().call_later(delay_s, send)
        else:
            send()

    def hold(self, holding: bool) -> None:
        """Keep replies back from here on, or let all go."""
        self.holding = holding
        if not holding:
            for rid in list(self._held):
                self.abort(rid)

    def abort(self, rid: str) -> None:
        """Give a request back that is held, whole."""
        self._held.pop(rid, lambda: None)()

    def _make(self) -> None:
        num = len(self._ids)
        meta = {
            "finish_reason": {"type": "length", "length": num},
            "weight_version": self.label,
            "weight_versions": [{"version": self.label, "start": 0, "end": num}],
            "output_token_logprobs": self._logprobs,
        }
        whole = msgspec.json.encode({"output_ids": self._ids, "meta_info": meta})
        before, _, after = whole.partition(b'"meta_info":{')
        self._before, self._after = before + b'"meta_info":{"id":"', b'",' + after


class NullServer(asyncio.Protocol):
    """One connection: HTTP/1.1 with lengths, kept alive."""

    def __init__(self, canned: Canned) -> None:
        self._canned = canned
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is whole."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).split(b"\r\n")
            length = next(
                (int(h[15:]) for h in head[1:] if h[:15].lower() == b"content-length:"), 0
            )
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            method, path, *_ = head[0].decode().split(" ")
            self._answer(method, path, body)

    def _answer(self, method: str, path: str, body: bytes) -> None:
        if method == "OPTIONS":  # only asks whether there is such a path
            self._send(b"")
            return
        if path == "/generate":
            asked = msgspec.json.decode(body)
            reply, rid = self._canned.reply(asked), asked["rid"]
            self._canned.answer(rid if isinstance(rid, str) else rid[0], lambda: self._send(reply))
            return
        self._send(msgspec.json.encode(self._control(path, body)))

    def _control(self, path: str, body: bytes) -> Any:
        canned = self._canned
        if path == "/hold":
            canned.hold(msgspec.json.decode(body))
        elif path == "/abort_request":
            asked = msgspec.json.decode(body)
            canned.hold(False) if asked.get("abort_all") else canned.abort(asked["rid"])
        elif path == "/update_weight_version":
            canned.label = msgspec.json.decode(body)["new_version"]
        elif path == "/model_info":
            return {"model_path": "null", "weight_version": canned.label}
        elif path == "/server_info":
            return LIMITS | {"num_requests": canned.num_requests}
        return {"success": True, "message": ""}

    def _send(self, content: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(head % len(content) + content)


async def serve(num_servers: int, canned: Canned) -> None:
    """Listen on free ports until standard input closes."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(num_servers):
            server = await loop.create_server(
                lambda: NullServer(canned), "127.0.0.1", 0, backlog=4096
            )
            await stack.enter_async_context(server)
            print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        print("READY", flush=True)
        await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    """Serve as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--spread", action="store_true", help="replies come one after another")
    args = parser.parse_args()
    raise_file_limit()
    asyncio.run(serve(args.servers, Canned(args.new_tokens, args.delay_s, args.spread)))


if __name__ == "__main__":
    main()
