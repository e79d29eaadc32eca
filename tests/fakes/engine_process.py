"""A real embedded engine in its own process, and a blocking client for it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil

from tests.fakes.rank_forkserver import python_with_imports

START_TIMEOUT_S = 240.0  # beside other work an import of torch has taken a minute


class EngineProcess:
    """Starts `python -m lightning_grpo.engine` and talks to it.

    Args:
        model: The model's folder.
        log: Where its standard error goes.
        flags: Further arguments of the command line.
        api_key: Sent with every request if given.
        forked: Whether it begins with its imports done, which saves seconds.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        api_key: str | None = None,
        *,
        forked: bool = True,
    ) -> None:
        self.model = model
        self.log = log
        self.api_key = api_key
        command = python_with_imports("-m") if forked else [sys.executable, "-m"]
        # The last flag: nothing is left of tests that are broken off.
        command += ["lightning_grpo.engine", "--model", str(model), *flags, "--exit-with-stdin"]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        timer = threading.Timer(START_TIMEOUT_S, self.process.kill)
        timer.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        timer.cancel()
        if not line.startswith("READY "):
            self.close()
            raise RuntimeError(f"the engine did not start: {log.read_text()[-2000:]}")
        self.url = line.split()[1]

    @property
    def pid(self) -> int:
        """The engine's own, behind a process that stands for a fork."""
        port = int(self.url.rpartition(":")[2])
        (found,) = {
            process.pid
            for process in psutil.Process().children(recursive=True)
            for each in process.net_connections()
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port
        }
        return found

    def close(self) -> int:
        """End it and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def request(
        self, path: str, body: Any = None, method: str = "POST", raw: bytes | None = None
    ) -> tuple[int, Any]:
        """Status and parsed body (text where it is no JSON) of one request."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = raw if raw is not None else json.dumps(body or {}).encode()
        call = urllib.request.Request(
            self.url + path, data if method == "POST" else None, headers, method=method
        )
        try:
            with urllib.request.urlopen(call, timeout=45) as reply:
                return reply.status, _parse(reply.read())
        except http.client.RemoteDisconnected as error:
            raise AssertionError(f"the engine died: {self.log.read_text()[-4000:]}") from error
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parse(error.read())

    def get(self, path: str) -> Any:
        """The body of a GET that must succeed."""
        status, body = self.request(path, method="GET")
        assert status == 200, (status, body)
        return body

    def post(self, path: str, **body: Any) -> Any:
        """The body of a POST that must succeed."""
        status, reply = self.request(path, body)
        assert status == 200, (status, reply)
        return reply

    def generate(self, input_ids: Any, *, sampling: dict[str, Any], **more: Any) -> Any:
        """`/generate` with logprobs."""
        return self.post(
            "/generate", input_ids=input_ids, sampling_params=sampling, return_logprob=True, **more
        )

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a blocking call on a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - recorded for the caller
                future.set_exception(error)

        threading.Thread(target=run).start()
        return future

    def stream(self, **body: Any) -> Iterator[dict[str, Any]]:
        """The messages of a streaming `/generate`; asserts that it ends with `[DONE]`."""
        call = urllib.request.Request(
            self.url + "/generate",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(call, timeout=45) as reply:
            last = b""
            for line in reply:
                if not line.strip():
                    continue
                assert line.startswith(b"data: "), line
                last = line.removeprefix(b"data: ").strip()
                if last != b"[DONE]":
                    yield json.loads(last)
            assert last == b"[DONE]"

    def state(self) -> dict[str, Any]:
        """The scheduler's counters."""
        return dict(self.get("/server_info")["internal_states"][0])

    def wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Poll the counters until a condition holds (20 s at most)."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            state = self.state()
            if condition(state):
                return state
            time.sleep(0.002)
        raise AssertionError(f"the engine never got there: {self.state()}")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()
