"""Keys of servers: made at random, taken from the environment or a file, and written nowhere."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ConfigError

API_KEY_VARIABLE = "LIGHTNING_GRPO_API_KEY"
"""Where a server's key is looked for if nothing else is said."""

_SECRET = re.compile(
    r"(^|_)(api_?key|admin_?key|secret|password|passwd|(hf|auth|access|bearer)_token)$|^token$"
)
_REFERENCE = re.compile(r"(env|file):\S")
_PASSWORD = re.compile(r"(\w+://)(?:([^\s/?#@:]*:)[^\s/?#]+|[^\s/?#@:]{16,})(?=@)")
"""Who gives no password and has so long a name gives a token."""
_READABLE_BY_OTHERS = stat.S_IRGRP | stat.S_IROTH


def new_key() -> str:
    """A key that nobody guesses."""
    return secrets.token_urlsafe(32)


def bears(authorization: str | None, api_key: str) -> bool:
    """Whether a header is `Bearer KEY`, in a time that tells nothing of the key."""
    wanted = f"Bearer {api_key}".encode()
    return hmac.compare_digest((authorization or "").encode("utf-8", "surrogatepass"), wanted)


def is_secret(name: Any, value: Any) -> bool:
    """Whether a setting is a key, a password or a token itself, not where one is to be found."""
    written = str(name).lower().replace("-", "_")
    return isinstance(value, str) and bool(_SECRET.search(written)) and not is_reference(value)


def is_reference(value: str) -> bool:
    """Whether it says where a key is: `env:NAME` or `file:PATH`."""
    return _REFERENCE.match(value) is not None


def masked(text: str) -> str:
    """A text as it may be shown and recorded: without the passwords and tokens of URLs in it."""
    return _PASSWORD.sub(r"\1\2***", text)


def read_key(given: str | None, name: str = "api_key") -> str | None:
    """The key that a setting means.

    Args:
        given: `env:NAME`, `file:PATH` or the key; None: the variable `LIGHTNING_GRPO_API_KEY`,
            where it is set.
        name: The setting, for messages.

    Raises:
        ConfigError: There is no such variable or file, or others can read the file.
    """
    if given is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    kind, _, where = given.partition(":")
    if not is_reference(given):
        key = given
    elif kind == "env":
        if where not in os.environ:
            raise ConfigError(f"`{name}` is {given!r}, and the variable {where} is not set.")
        key = os.environ[where]
    else:
        key = _read_file(Path(where).expanduser(), given, name)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"`{name}` must be printable ASCII without spaces, as headers want it.")
    return key


def _read_file(path: Path, given: str, name: str) -> str:
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"`{name}` is {given!r}, which can't be read: {error}.") from error
    if mode & _READABLE_BY_OTHERS:
        raise ConfigError(
            f"`{name}` is {given!r}, which other users can read. Run `chmod 600 {path}`."
        )
    return text.strip()
