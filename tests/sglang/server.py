"""One server behind SGLang's HTTP API, embedded or real, and a blocking client for it."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lightning_grpo.servers.process import OwnedServers

TIMEOUT_S = 60.0


class Server:
    """A server that the tests of a session share.

    Args:
        kind: `embedded` or `sglang`.
        servers: What starts it, the way that runs do.
        model: The folder that it loads.
        run_dir: For its log.
    """

    def __init__(self, kind: str, servers: OwnedServers, model: Path, run_dir: Path) -> None:
        self.kind = kind
        self.model = model
        self.servers = servers
        servers.api_key = ""  # requests of all kinds are sent without one here
        (self.handle,) = servers.start(str(model), run_dir)

    @property
    def url(self) -> str:
        return self.handle.url

    def close(self) -> None:
        self.servers.stop()

    def request(
        self, path: str, body: Any = None, method: str = "POST", raw: bytes | None = None
    ) -> tuple[int, Any]:
        """Status and parsed body (text where it is no JSON) of one request."""
        data = raw if raw is not None else json.dumps(body or {}).encode()
        call = urllib.request.Request(
            self.url + path,
            data if method == "POST" else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(call, timeout=TIMEOUT_S) as reply:
                return reply.status, _parse(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parse(error.read())
        except http.client.RemoteDisconnected as error:
            raise AssertionError(f"{path} killed the server: {self.handle.log_tail()}") from error

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

    def generate(self, input_ids: Any, *, sampling: Any, **more: Any) -> Any:
        """`/generate` with logprobs."""
        return self.post(
            "/generate", input_ids=input_ids, sampling_params=sampling, return_logprob=True, **more
        )

    def launch(self, input_ids: list[int], *, sampling: Any, **more: Any) -> InFlight:
        """`/generate` as a stream, read on a thread: what it has so far is seen."""
        body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True}
        return InFlight(self.url, body | more)

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a blocking call on a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised where the result is read
                future.set_exception(error)

        threading.Thread(target=run).start()
        return future

    def loads(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        (load,) = self.get("/v1/loads")["loads"]
        return load["num_running_reqs"], load["num_waiting_reqs"]

    def wait_until(self, condition: Callable[[int, int], bool]) -> None:
        """Poll the loads until a condition on (running, waiting) holds."""
        deadline = time.monotonic() + 20
        while not condition(*self.loads()):
            assert time.monotonic() < deadline, f"the server never got there: {self.loads()}"
            time.sleep(0.02)

    def reset(self) -> None:
        """Nothing in flight, not paused, the first weights under their first name."""
        self.post("/abort_request", abort_all=True)
        self.post("/continue_generation")
        self.wait_until(lambda running, waiting: running == waiting == 0)
        self.flush()
        self.post(
            "/update_weights_from_disk",
            model_path=str(self.model),
            weight_version="default",
            flush_cache=False,
        )

    def flush(self) -> None:
        """Empty the cache once nothing is in flight; SGLang 0.5.19 dies of an update that can't.

        Its scheduler may hold a request for a moment after the last token was answered.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while self.request("/flush_cache")[0] != 200:
            assert time.monotonic() < deadline, "the cache is never flushed"
            time.sleep(0.02)


class InFlight:
    """A request whose stream is being read.

    Attributes:
        messages: What came so far; each holds all tokens up to it.
        ended: Whether `[DONE]` came.
    """

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._call = urllib.request.Request(
            url + "/generate",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        self._reply: Any = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far."""
        return len(self.messages[-1]["output_ids"]) if self.messages else 0

    def wait_for(self, num_tokens: int) -> InFlight:
        """Until so many tokens came."""
        with self._changed:
            reached = self._changed.wait_for(
                lambda: self.num_tokens >= num_tokens or self.ended or self._error is not None,
                TIMEOUT_S,
            )
        assert reached, "no tokens came"
        assert self.num_tokens >= num_tokens, f"it ended after {self.num_tokens} tokens"
        return self

    def result(self) -> dict[str, Any]:
        """The last message: the whole reply."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the request hangs"
        if self._error is not None:
            raise self._error
        assert self.ended
        return self.messages[-1]

    def leave(self) -> None:
        """Goes away before the end."""
        self._reply.fp.raw._sock.shutdown(2)
        self._thread.join(TIMEOUT_S)

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._call, timeout=TIMEOUT_S) as self._reply:
                for line in self._reply:
                    if line.strip():
                        self._take(line.removeprefix(b"data: ").strip())
        except BaseException as error:  # noqa: BLE001 - raised where the result is read
            self._error = error
        with self._changed:
            self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        with self._changed:
            if data == b"[DONE]":
                self.ended = True
            else:
                self.messages.append(json.loads(data))
            self._changed.notify_all()


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()
