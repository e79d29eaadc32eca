"""What servers are to a run, those that run already, and what starting any of them takes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import os
import random
import re
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from lightning_grpo.errors import (
    MOST_PORT,
    ConfigError,
    ServerError,
    ServerStartError,
    require_seconds,
)
from lightning_grpo.keys import API_KEY_VARIABLE, masked, read_key
from lightning_grpo.serving.server import ServerHandle


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """What a run will ask of all its servers together.

    Attributes:
        in_flight: Requests at once, at most.
        batch: Of one rollout batch; 0: not known. Not many more are decoded side by side, so that
            batches don't all end together.
        context_tokens: Longest sequence, prompt and completion together; None: the model's own.
        weight_bytes: Of the model as servers hold it; 0: not known.
        kv_bytes_per_token: Of keys and values, as servers hold them; 0: not known.
        vocab_size: Logits of each token.
        trainer_bytes: What the trainer needs of a GPU that it shares with a server.
    """

    in_flight: int
    batch: int = 0
    context_tokens: int | None = None
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    vocab_size: int = 0
    trainer_bytes: int = 0


class Servers(ABC):
    """Starts or finds inference servers. Calls block; the caller keeps them off its event loop."""

    api_key: str | None = None
    deterministic: bool = False
    """Whether equal requests must get equal bits; set before `start` by a deterministic run."""
    tells_routes: bool = False
    """Whether the experts of each token must be told; set before `start` by a run that replays."""
    fits_load: bool = False
    """Whether servers are started to suit what the run will ask of them."""
    load: ServerLoad | None = None
    """What the run will ask; set before `start` where `fits_load`."""
    listed_in: str = ""
    """Where servers that come and go are listed; empty: they are those of `start`, to the end."""
    look_every_s: float = 5.0
    """Between two calls of `look`, where servers come and go."""

    @abstractmethod
    def start(self, model_path: str, run_dir: Path) -> list[ServerHandle]:
        """Makes the servers answer, with the model of a local folder (or hub id).

        Raises:
            ServerStartError: One did not; none is left running.
            ConfigError: The setting can't work here.
        """

    @property
    @abstractmethod
    def handles(self) -> list[ServerHandle]:
        """The servers that answer now; empty before `start` and after `stop`."""

    @property
    def planned_devices(self) -> tuple[int, ...]:
        """The GPUs, as torch numbers them, that `start` will use; empty if none."""
        return ()

    @property
    def can_restart(self) -> bool:
        """Whether `restart` works."""
        return False

    def restart(self, url: str) -> ServerHandle:
        """Starts the server that had this URL again, with the model of `start`; ends a live one.

        Raises:
            ServerStartError: It does not come up.
        """
        raise ServerError(f"{url} was not started by this run, so it can't be restarted here.")

    def look(self) -> list[ServerHandle]:
        """The servers that there are by now, where they come and go."""
        return self.handles

    def is_gone(self, url: str) -> bool:
        """Whether a silent server has ended, and is not just out of reach; where it can restart."""
        del url
        return True

    @abstractmethod
    def stop(self) -> None:
        """Ends what was started: no process, port or thread is left. May be called twice.

        Also from another thread than `start`, which then fails as soon as it can.
        """

    def describe(self) -> str:
        """One line a server: address, process, GPUs, log."""
        return "\n".join(handle.describe() for handle in self.handles)


# -- what is inherited, and what is here -----------------------------------------------------------

ADDRESSES_VARIABLE = "AREAL_LLM_SERVER_ADDRS"


def server_addresses() -> list[str]:
    """Addresses that a launcher left for the trainer: `host:port,host:port`."""
    return [a.strip() for a in os.environ.get(ADDRESSES_VARIABLE, "").split(",") if a.strip()]


def main_address() -> str:
    """Where rank 0 of a process group that somebody else started listens."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top."""
    return {**os.environ, **extra}


def own_package_first() -> dict[str, str]:
    """`PYTHONPATH` that makes a child import the same copy of this package."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != root]
    return {"PYTHONPATH": os.pathsep.join([root, *paths])}


def config_folder() -> Path:
    """Where this user's settings of the package lie."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "lightning_grpo"


def data_folder() -> Path:
    """Where what this package installs for this user lies."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "lightning_grpo"


def device_names() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: numbers or ids.

    Entry `i` is what torch, and every setting of this package, calls GPU `i`.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return [str(device) for device in machine_devices()]
    names = [name.strip() for name in value.split(",")]
    # The driver, too, reads up to the first name that is none: `-1` hides all.
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def present_devices() -> list[int]:
    """The GPUs that this process may use, numbered as torch numbers them."""
    return list(range(len(device_names())))


def machine_devices() -> list[int]:
    """All GPUs of the machine, by their numbers there.

    Asked of the driver's own tool, since torch is not needed to serve.
    """
    return [int(index) for index in _ask_driver("--query-gpu=index")]


def device_bytes(name: str) -> int:
    """Memory of a GPU, by its number on the machine or its id; 0 where nobody tells."""
    mebibytes = _ask_driver("--query-gpu=memory.total", f"--id={name}")
    return int(mebibytes[0]) << 20 if mebibytes and mebibytes[0].isdecimal() else 0


def device_model(name: str) -> str:
    """What a GPU is called by its driver (`NVIDIA H200`); empty where nobody tells."""
    return " ".join(_ask_driver("--query-gpu=name", f"--id={name}"))


def _ask_driver(*options: str) -> list[str]:
    """The words of its answer; none where there is no driver."""
    command = ["nvidia-smi", "--format=csv,noheader,nounits", *options]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return said.stdout.split()


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, numbered as torch numbers them, and the cores beside them.

    Attributes:
        gpus: How many there are.
        gpu_bytes: Memory of each; 0 where nobody tells.
        cores: CPU cores.
    """

    gpus: int
    gpu_bytes: int
    cores: int

    @property
    def present(self) -> list[int]:
        """The GPUs by their numbers."""
        return list(range(self.gpus))


def local_machine(cores: int) -> Machine:
    """What this process may use; of GPUs that differ the smallest counts."""
    names = device_names()
    return Machine(len(names), min(map(device_bytes, names), default=0), cores)


def serving_devices(present: list[int]) -> list[int]:
    """Half of the GPUs, rounded up, serve, the last ones; one GPU is shared with the trainer."""
    return present[len(present) // 2 :] if len(present) > 1 else present


def training_devices(present: list[int], serving: list[int]) -> list[int]:
    """The GPUs that are left to train; one GPU is shared."""
    if len(present) == 1:
        return present
    return [device for device in present if device not in serving]


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


# -- waiting for a server --------------------------------------------------------------------------

POLL_S = 0.1
KEYS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)

HEALTH = "/health"
"""Wants a token of the server: once it comes, the server is warm."""

LISTENS = "/model_info"
"""Wants nothing: answered also by a server that a run which crashed left paused."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What a server said.

    Attributes:
        status: Of HTTP.
        wait_s: How long it asks to be left alone; 0 where it does not.
    """

    status: int
    wait_s: float = 0.0


def answer(
    url: str, timeout_s: float = 5.0, api_key: str | None = None, path: str = HEALTH
) -> HttpAnswer | None:
    """What the server answers to a request for `path`; None: nothing in time, or no HTTP."""
    return asyncio.run(_ask(url + path, timeout_s, api_key))


async def _ask(url: str, timeout_s: float, api_key: str | None) -> HttpAnswer | None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Of the whole exchange: one that drips would outlast any limit between two bytes.
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            asked = response.headers.get("Retry-After", "")
            return HttpAnswer(response.status, float(asked) if asked.isdecimal() else 0.0)
    except (aiohttp.ClientError, OSError, ValueError):  # a time-out is an OSError
        return None


def wait_until_healthy(
    url: str,
    timeout_s: float,
    api_key: str | None = None,
    check: Callable[[], None] = lambda: None,
    path: str = HEALTH,
) -> None:
    """Waits until the server answers.

    Args:
        url: `http://host:port`.
        timeout_s: How long.
        api_key: Sent as a bearer token.
        check: Raises when waiting is pointless (the process has ended).
        path: What is asked for.

    Raises:
        ServerStartError: It does not answer in time.
        ConfigError: It wants another API key.
    """
    deadline = time.monotonic() + timeout_s
    said: HttpAnswer | None = None
    while True:
        left_s = deadline - time.monotonic()
        said = answer(url, min(5.0, max(left_s, POLL_S)), api_key, path) or said
        if said is not None and said.status == HTTPStatus.OK:
            return
        check()
        if said is not None and said.status in KEYS:
            raise _key_error(url, said.status, api_key)
        if left_s <= 0:
            last = "" if said is None else f" It answered {said.status}."
            raise ServerStartError(
                f"Nothing healthy answers at {url} after {timeout_s:g} s.{last}"
                " Start a server there, or correct `urls`."
            )
        time.sleep(max(POLL_S, min(left_s, 0.0 if said is None else said.wait_s)))


def _key_error(url: str, status: int, api_key: str | None) -> ConfigError:
    wants = "another API key than the one given" if api_key else "an API key"
    return ConfigError(
        f"{url} wants {wants} (it answered {status}). "
        f"Set {API_KEY_VARIABLE} to it, or `api_key` to `env:NAME` or `file:PATH`."
    )


# -- servers that run already ----------------------------------------------------------------------

_ADDRESS = re.compile(r"[A-Za-z]+://|[\w.-]+:\d+/?$")


if TYPE_CHECKING:
    Address = str
else:

    class Address(str):
        """The URL of a server, so that a config tells it from the import path of a class."""

        __slots__ = ()

        def __new__(cls, text: str) -> str:
            """Refuse what may be anything."""
            if not _ADDRESS.match(text):
                raise ValueError("not the URL of a server")
            return text


class RunningServers(Servers):
    """Uses servers that run already; they are neither started, restarted nor stopped.

    Args:
        urls: `http://host:port` (or `host:port`) of each; None: what the environment variable
            `AREAL_LLM_SERVER_ADDRS` lists.
        connect_timeout_s: How long a server may take to answer.
        api_key: Of the servers, if they want one: `env:NAME` or `file:PATH`, which others must not
            be able to read; None: the environment variable `LIGHTNING_GRPO_API_KEY`, if it is set.
            A key itself is taken, too, and left out of whatever the run writes.
    """

    def __init__(
        self,
        urls: list[str] | None = None,
        connect_timeout_s: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        if urls is not None and not urls:
            raise ConfigError("`urls` must name at least one server, got an empty list.")
        require_seconds("connect_timeout_s", connect_timeout_s)
        self.urls = urls
        self.connect_timeout_s = connect_timeout_s
        self.api_key = read_key(api_key)
        self._handles: list[ServerHandle] = []

    @property
    def handles(self) -> list[ServerHandle]:
        """The servers, as `start` found or made them."""
        return list(self._handles)

    def start(self, model_path: str, run_dir: Path) -> list[ServerHandle]:
        """Waits until every server answers."""
        urls = [normal_url(url) for url in self.urls or server_addresses()]
        if not urls:
            raise ConfigError(
                f"`servers.urls` names no server and {ADDRESSES_VARIABLE} is not set. Give the"
                " URLs, or let the run start servers: EmbeddedServers (CPU) or SGLangServers (GPU)."
            )
        repeated = {url for url in urls if urls.count(url) > 1}
        if repeated:
            raise ConfigError(f"`urls` names {', '.join(sorted(repeated))} more than once.")
        for url in urls:
            wait_until_healthy(url, self.connect_timeout_s, self.api_key, path=LISTENS)
        # On a machine with one GPU there is no doubt where a server is.
        present = machine_devices() if any(map(is_local, urls)) else []
        only = tuple(present) if len(present) == 1 else ()
        self._handles = [ServerHandle(url, devices=only if is_local(url) else ()) for url in urls]
        return list(self._handles)

    def stop(self) -> None:
        """Leaves the servers running."""
        self._handles = []


LOOK_S = 0.5
"""Between two looks at a list while no server of it answers yet."""
MOST_LOOK_S = 10.0
"""A list, or a server that is new on it, has this time to answer."""

logger = logging.getLogger(__name__)


class ServerList(RunningServers):
    """Uses servers that run already and come and go: those of a list that is looked at all along.

    One that appears is checked as those of the start are, gets the current weights, proves them and
    is used. One that is taken off the list is asked nothing more, and what it was at work on goes
    on at the others. An address is on the list, or off it, once two looks in a row say so, so that
    a list, or a file of a folder, caught half-written changes nothing. One that can't be read keeps
    its last servers.

    Args:
        source: The list: a file with an address (`http://host:port` or `host:port`) in each line,
            where `#` begins a comment; a folder of such files, in which each server may have its
            own; or a URL that answers with such lines, or with a JSON list of addresses. A password
            in it (`https://user:password@host`) is shown and recorded nowhere.
        look_every_s: Between two looks at it.
        connect_timeout_s: How long the first server may take to be on the list and answer.
        api_key: Of the servers, as `RunningServers` takes it. A list's URL is asked without it.
    """

    def __init__(
        self,
        source: str,
        look_every_s: float = 5.0,
        connect_timeout_s: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        is_list = isinstance(source, str) and bool(source.strip())
        if not is_list or ("://" in source and not re.match("https?://", source)):
            raise ConfigError(
                "source",
                "must be a file, a folder or a URL (http://, https://) that lists servers",
                masked(source) if isinstance(source, str) else source,
                "Servers that stay the same are `RunningServers(urls)`.",
            )
        require_seconds("look_every_s", look_every_s)
        super().__init__(None, connect_timeout_s, api_key)
        self.source, self.listed_in = source, masked(source)
        self.look_every_s = look_every_s
        self._files: dict[str, list[str]] = {}
        self._skipped: dict[str, str] = {}
        self._seen: list[str] = []
        self._addresses: list[str] = []
        self._unread, self._stopping = "", False

    def start(self, model_path: str, run_dir: Path) -> list[ServerHandle]:
        """Waits until a server of the list answers; the others may do so later."""
        self._stopping, self._seen, self._addresses = False, [], []
        deadline, said_so = time.monotonic() + self.connect_timeout_s, False
        self.look()
        time.sleep(POLL_S)
        while not self._stopping:
            handles = self.look()
            urls = [handle.url for handle in handles]
            asked = {url: _ask(url + LISTENS, MOST_LOOK_S, self.api_key) for url in urls}
            answers = asyncio.run(answers_soon(asked))
            status = {url: said.status for url, said in answers.items() if said is not None}
            if HTTPStatus.OK in status.values():
                return [handle for handle in handles if status.get(handle.url) == HTTPStatus.OK]
            refusing = next((url for url in status if status[url] in KEYS), None)
            if refusing is not None:
                raise _key_error(refusing, status[refusing], self.api_key)
            each = ", ".join(f"{url} answers {status.get(url, 'nothing')}" for url in answers)
            skipped = "; ".join(f"{name}: {why}" for name, why in self._skipped.items())
            why = self._unread or each or skipped or "it names none"
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"No server of {self.listed_in} answers after {self.connect_timeout_s:g} s:"
                    f" {why}. Start one and put its address there, or correct `source`."
                )
            if not said_so:
                told, said_so = "waiting up to %g s for a server of %s: %s", True
                logger.warning(told, self.connect_timeout_s, self.listed_in, why)
            time.sleep(LOOK_S)
        raise ServerStartError("The wait for a server was broken off.")

    def look(self) -> list[ServerHandle]:
        """The servers that are on the list by now."""
        try:
            now = self._read()
        except (OSError, ValueError, aiohttp.ClientError) as error:
            why = _why_unread(error)
            if self._addresses and not self._unread:
                told = "%s can't be read, so its last servers are kept: %s"
                logger.warning(told, self.listed_in, why)
            self._unread = f"it can't be read ({why})"
            return self.handles
        if self._addresses and self._unread:
            logger.warning("%s is read again", self.listed_in)
        self._unread, before, self._seen = "", self._seen, now
        known = [each for each in self._addresses if each in now or each in before]
        self._addresses = known + [each for each in now if each in before and each not in known]
        found: list[str] = []
        for url in self._addresses:
            if not any(_are_one(url, other) for other in found):
                found.append(url)
        # On no GPU that is known: the next may be on another, and weights have to reach both.
        self._handles = [ServerHandle(url) for url in found]
        return self.handles

    def _read(self) -> list[str]:
        """The addresses that stand there by now, normalized, each once; see `_read_list`."""
        before, self._files = self._files, {}
        skipped, self._skipped = self._skipped, {}
        for name, text in asyncio.run(_read_list(self.source)).items():
            try:
                self._files[name] = _addresses(text, name)
            except (OSError, ValueError) as error:
                if not name:  # it is the whole list
                    raise
                self._files[name] = before.get(name, [])
                self._skipped[name] = why = _why_unread(error)
                if name not in skipped:
                    told = "%s of %s is skipped, or its last servers are kept: %s"
                    logger.warning(told, name, self.listed_in, why)
        return list(dict.fromkeys(itertools.chain(*self._files.values())))

    def stop(self) -> None:
        """Leaves the servers running."""
        self._stopping = True
        super().stop()

    def describe(self) -> str:
        """Where they are listed, and one line a server."""
        return f"listed in {self.listed_in}, {super().describe()}"


def _are_one(url: str, other: str) -> bool:
    """Whether two addresses are of one server, which is spelled in two ways."""
    given, before = urlsplit(url), urlsplit(other)
    one, two = given.hostname or "", before.hostname or ""
    if (given.port, given.path) != (before.port, before.path) or not may_be_one(one, two):
        return False
    return bool(_machine_addresses(one) & _machine_addresses(two))


def may_be_one(one: str, two: str) -> bool:
    """Whether two hosts may be one: servers behind a gateway have its address, and other names."""
    is_number = any(re.fullmatch(r"[\d.]+|.*:.*", host) for host in (one, two))
    return is_number or one == two or one.startswith(f"{two}.") or two.startswith(f"{one}.")


@functools.lru_cache(1 << 12)
def _machine_addresses(host: str) -> set[str]:
    """The IP addresses of a name; itself where nobody knows any."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return {host}


def _why_unread(error: Exception) -> str:
    """Why a list can't be read, in a phrase."""
    if isinstance(error, UnicodeError):
        return "it is not text in UTF-8"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"it answers {error.status} {error.message}".rstrip()
    if isinstance(error, TimeoutError):
        return f"it does not answer within {MOST_LOOK_S:g} s"
    return masked(str(error)).rstrip(".") or type(error).__name__


async def _read_list(source: str) -> Mapping[str, str | Exception]:
    """The text of a list; of a folder's files those of each, or why not, by their names.

    Raises:
        OSError, ValueError: It can't be read, or is no text.
    """
    if "://" in source:
        timeout = aiohttp.ClientTimeout(total=MOST_LOOK_S)
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
            session.get(source) as response,
        ):
            return {"": await response.text()}
    return _read_files(source)


def _read_files(source: str) -> Mapping[str, str | Exception]:
    path = Path(source).expanduser()
    if not path.is_dir():
        return {"": path.read_text(encoding="utf-8")}
    texts: dict[str, str | Exception] = {}
    for file in sorted(path.iterdir()):
        # Network file systems keep what was deleted while it was open under such a name.
        if not file.name.startswith("."):
            try:
                texts[file.name] = file.read_text(encoding="utf-8")
            except FileNotFoundError:
                continue  # gone since the folder was read
            except (OSError, UnicodeError) as error:
                texts[file.name] = error
    return texts


def _addresses(text: str | Exception, name: str) -> list[str]:
    """The addresses of a list, or of the file of that name, normalized."""
    if isinstance(text, Exception):
        raise text
    which = f"a line of {name}" if name else "a line"
    return [normal_url(entry, which) for entry in _entries(text)]


def _entries(text: str) -> list[str]:
    """The addresses that a text lists, as they stand there."""
    text = text.removeprefix("\ufeff")  # some editors begin a file with it
    with contextlib.suppress(ValueError, RecursionError):
        listed = json.loads(text)
        if isinstance(listed, list) and all(isinstance(each, str) for each in listed):
            return listed
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


async def answers_soon(
    asked: Mapping[str, Coroutine[Any, Any, HttpAnswer | None]],
) -> dict[str, HttpAnswer | None]:
    """What each answers; None for those that take much longer than the first that is ready."""
    tasks = {name: asyncio.create_task(asking) for name, asking in asked.items()}
    for answered in asyncio.as_completed(tasks.values()):
        said = await answered
        if said is not None and said.status == HTTPStatus.OK:
            await asyncio.wait(tasks.values(), timeout=LOOK_S)
            break
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    return {name: None if task.cancelled() else task.result() for name, task in tasks.items()}


def servers_of(given: Any) -> Servers:
    """Servers as given; of URLs, those that run there.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(given, Servers):
        return given
    urls = [given] if isinstance(given, str) else given
    if isinstance(urls, list | tuple) and urls and all(isinstance(url, str) for url in urls):
        return RunningServers([normal_url(url) for url in urls])
    name = given.__name__ if isinstance(given, type) else None
    said = f"the class {name}. Call it: `{name}()`" if name else f"{given!r:.60}"
    raise ConfigError(
        "`servers` must be servers (EmbeddedServers(), SGLangServers(), RunningServers(urls)) or "
        f"the URL of one that runs, got {said}."
    )


def is_local(url: str) -> bool:
    """Whether the server is on this machine, by its address."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def normal_url(address: str, name: str = "`urls`") -> str:
    """`http://host:port` of an address with or without scheme and slash; `name` is of the setting.

    Raises:
        ConfigError: There is no port, or it is no address.
    """
    url = address.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https"):
        raise ConfigError(f"{name} must begin with http:// or https://, got {address!r}.")
    port = rest.rpartition(":")[2]
    if scheme == "http" and not (port.isdecimal() and 0 < int(port) <= MOST_PORT):
        raise ConfigError(f"{name} must carry a port (http://host:30000), got {address!r}.")
    with contextlib.suppress(ValueError):  # a port that is no number, brackets that don't close
        parts = urlsplit(url)
        if parts.hostname and parts.port != 0 and not re.search(r"[\s,;?#]", url):
            return url
    raise ConfigError(
        f"{name} must be one address (http://host:30000, http://[::1]:30000), got {address!r}."
    )
