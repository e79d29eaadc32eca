"""Servers that somebody else started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_grpo.checks import MOST_PORT, require_seconds
from lightning_grpo.errors import ConfigError
from lightning_grpo.keys import read_key
from lightning_grpo.servers.base import ServerHandle, Servers
from lightning_grpo.servers.process import (
    ADDRESSES_VARIABLE,
    LISTENS,
    machine_devices,
    server_addresses,
    wait_until_healthy,
)

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


def normal_url(address: str) -> str:
    """`http://host:port` of an address with or without scheme and slash.

    Raises:
        ConfigError: There is no port.
    """
    url = address.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https"):
        raise ConfigError(f"`urls` must begin with http:// or https://, got {address!r}.")
    port = rest.rpartition(":")[2]
    if scheme == "http" and not (port.isdecimal() and 0 < int(port) <= MOST_PORT):
        raise ConfigError(f"`urls` must carry a port (http://host:30000), got {address!r}.")
    return url
