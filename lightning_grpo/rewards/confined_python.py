"""The inside of `sandbox.run_python`: `python -I confined_python.py`, its orders on descriptor 0.

Two of them run where a program has tests. One runs the program and then answers calls of what it
defined; the other runs the tests, in an interpreter that the program never touches, and names of
the program stand there for calls of the first. Only plain data comes back, so that no `__eq__` of
the program's compares anything, and nothing of the tests is in the program's reach but the
arguments of its calls. Standard library and one sibling file only; loaded by path, so that `-I` can
keep the user's environment out.
"""

from __future__ import annotations

import builtins
import collections
import importlib
import importlib.util
import json
import os
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM_ENDED = 3
"""The tests' exit status where the program was gone, or answered what is no answer."""

_LENGTH = struct.Struct("=I")
_MOST_BYTES = 64 * 2**20
_KNOWN_ALIASES = {"np": "numpy", "pd": "pandas"}
_MOST_DEPTH = 100
_ATOMS = (bool, int, float, str)
_LISTED = (list, tuple, set, frozenset, collections.deque)
_MADE: dict[str, Callable[[Any], Any]] = {
    "bytes": lambda text: text.encode("latin-1"),
    "bytearray": lambda text: bytearray(text, "latin-1"),
    "complex": lambda parts: complex(*parts),
    **{kind.__name__: kind for kind in _LISTED},
    "dict": dict,
}
_CHANGED_IN_PLACE = (list, dict, set, bytearray, collections.deque)


class OtherEndedError(BaseException):
    """The process at the other end is gone; not an exception, which tests may expect."""


def main() -> None:
    """Confines this process and runs what it is ordered to."""
    orders = json.loads(os.read(0, os.fstat(0).st_size))
    confine = _load("confine", Path(__file__).with_name("confine.py"))
    if orders["parent"] is not None:
        confine.die_with_parent(orders["parent"])
    stdin = os.open(orders["stdin"], os.O_RDONLY)
    os.dup2(stdin, 0)
    os.close(stdin)
    limits = orders["limits"]
    missing = confine.confine(confine.Confinement(**{**limits, "reads": tuple(limits["reads"])}))
    os.write(2, (json.dumps(missing) + "\n").encode())
    sys.argv = ["program.py"]
    sys.set_int_max_str_digits(0)
    if orders["tests"] is not None:
        _run_tests(orders["tests"], Peer(*orders["pipes"]))
        return
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    pipes, source = orders["pipes"], orders["source"]
    exec(compile(source, "program.py", "exec"), names)
    if pipes:
        sys.stdout.flush()
        _serve_program(Peer(*pipes), names)


def _serve_program(peer: Peer, names: dict[str, Any]) -> None:
    peer.may_use_anything = True
    public = {name: value for name, value in names.items() if not name.startswith("__")}
    peer.send({"names": {n: peer.encoded(v) for n, v in public.items() if not _is_module(v)}})
    try:
        while True:
            peer.serve(peer.receive())
    except OtherEndedError:
        return


def _run_tests(source: str, peer: Peer) -> None:
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    try:
        defined = peer.receive()["names"]
        # The program must not stand in for what judges it: `abs`, `math`.
        judges = {*dir(builtins), *sys.stdlib_module_names, *_KNOWN_ALIASES}
        for name, value in defined.items():
            if name not in judges and not name.startswith("__"):
                names[name] = peer.decoded(value)
        code = compile(source, "tests.py", "exec")
        for name in judges.intersection(_names(code)).difference(dir(builtins)):
            names[name] = _module(_KNOWN_ALIASES.get(name, name))
        exec(code, names)
    except OtherEndedError:
        os._exit(PROGRAM_ENDED)


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*(_names(c) for c in inner))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _is_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType)


class Peer:
    """One end of the calls between tests and program; each may call what the other passed to it.

    Args:
        incoming: Descriptor to read from.
        outgoing: Descriptor to write to.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.may_use_anything = False
        self._incoming, self._outgoing = incoming, outgoing
        self._shown: list[Any] = []

    def ask(self, handle: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Have the other side call a method of something of its own."""
        sent = {k: self.encoded(v) for k, v in kwargs.items()}
        self.send(
            {"of": handle, "do": method, "args": [self.encoded(a) for a in args], "kwargs": sent}
        )
        while "do" in (reply := self.receive()):
            self.serve(reply)
        if "raised" in reply:
            raise _exception(reply["raised"], reply["text"], method)
        value = self.decoded(reply["value"])
        # Who works in place returns nothing; who returns something has not changed the question.
        for argument, changed in zip(args, reply["args"] if value is None else (), strict=False):
            if changed is not None and isinstance(argument, _CHANGED_IN_PLACE):
                _become(argument, self.decoded(changed))
        return value

    def serve(self, request: dict[str, Any]) -> None:
        """Do what the other side asks, and reply."""
        try:
            target, method = self._shown[request["of"]], request["do"]
            if not self.may_use_anything and method != "__call__":
                raise TypeError("a program may only call what tests pass to it")
            args = [self.decoded(a) for a in request["args"]]
            kwargs = {k: self.decoded(v) for k, v in request["kwargs"].items()}
            value = _done(target, method, args, kwargs)
            in_place = [self.encoded(a) if isinstance(a, _CHANGED_IN_PLACE) else None for a in args]
            reply = {"value": self.encoded(value), "args": in_place}
        except Exception as error:  # noqa: BLE001 - told to the other side
            reply = {"raised": [c.__name__ for c in type(error).__mro__], "text": _text(error)}
        self.send(reply)

    def send(self, message: dict[str, Any]) -> None:
        """Write one message."""
        body = json.dumps(message).encode("utf-8", "surrogatepass")
        view = memoryview(_LENGTH.pack(len(body)) + body)
        try:
            while view:
                view = view[os.write(self._outgoing, view) :]
        except BrokenPipeError as error:
            raise OtherEndedError from error

    def receive(self) -> dict[str, Any]:
        """Read one message.

        Raises:
            OtherEndedError: The other side is gone, or wrote what is no message.
        """
        try:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            message = json.loads(self._read(min(length, _MOST_BYTES)))
            return dict(message)
        except (ValueError, TypeError, struct.error, RecursionError) as error:
            raise OtherEndedError from error

    def _read(self, count: int) -> bytes:
        parts = []
        while count and (part := os.read(self._incoming, min(count, 2**20))):
            parts.append(part)
            count -= len(part)
        return b"".join(parts) if not count else b""

    def encoded(self, value: Any, depth: int = 0) -> Any:
        """A value as JSON: plain data by its content, all else by a number to call it with."""
        if isinstance(value, Remote):
            return {"yours": object.__getattribute__(value, "_handle")}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            value = value.tolist()
        plain = _plain(value) if depth < _MOST_DEPTH else None
        if plain is None and value is not None:
            self._shown.append(value)
            return {"mine": len(self._shown) - 1}
        if isinstance(plain, tuple):
            kind, items = plain
            return {kind: [self.encoded(item, depth + 1) for item in items]}
        return plain

    def decoded(self, value: Any) -> Any:
        """What `encoded` made it from, or something that stands for it."""
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "mine":
            return Remote(self, int(content))
        if kind == "yours":
            return self._shown[content]
        parts = content if isinstance(content, str) else [self.decoded(item) for item in content]
        return _MADE[kind](parts)


def _plain(value: Any) -> Any:
    """Plain data in JSON, as it is or `(kind, items)`; None for what is none."""
    for atom in _ATOMS:
        if isinstance(value, atom):
            return atom(value)
    if isinstance(value, bytes | bytearray):
        plain: Any = {_kind(value, (bytes, bytearray)): value.decode("latin-1")}
    elif isinstance(value, complex):
        plain = "complex", [value.real, value.imag]
    elif isinstance(value, dict):
        plain = "dict", [list(pair) for pair in value.items()]
    else:
        kind = _kind(value, _LISTED)
        plain = (kind, list(value)) if kind else None
    return plain


def _kind(value: Any, kinds: tuple[type, ...]) -> str:
    return next((kind.__name__ for kind in kinds if isinstance(value, kind)), "")


class Remote:
    """Something of the other side; compared by what it prints, and with no truth of its own."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, peer: Peer, handle: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):  # numpy would read memory of the tests' own process there
            raise AttributeError(name)
        return _ask(self, "__getattribute__", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "__setattr__", name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            mine, theirs = (object.__getattribute__(it, "_handle") for it in (self, other))
            return bool(mine == theirs)
        return bool(_ask(self, "__repr__") == repr(other))

    def __bool__(self) -> bool:
        raise TypeError("an object of the program has no truth here: test what it returns")


def _ask(remote: Remote, method: str, *args: Any, **kwargs: Any) -> Any:
    peer = object.__getattribute__(remote, "_peer")
    return peer.ask(object.__getattribute__(remote, "_handle"), method, *args, **kwargs)


def _forwarded(method: str) -> Callable[..., Any]:
    def forward(self: Remote, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, method, *args, **kwargs)

    return forward


for _method in (
    # None of those that are told what they should give: `__sub__`, `__lt__`, `__exit__`.
    "__call__ __iter__ __next__ __len__ __getitem__ __setitem__ __delitem__ __repr__ __str__ "
    "__int__ __float__ __index__"
).split():
    setattr(Remote, _method, _forwarded(_method))


def _done(target: Any, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if method == "__call__":
        return target(*args, **kwargs)
    if method == "__getattribute__":
        return getattr(target, *args)
    if method == "__setattr__":
        return setattr(target, *args)
    return getattr(type(target), method)(target, *args, **kwargs)


def _become(changed: Any, content: Any) -> None:
    if changed != content:
        changed.clear()
        getattr(changed, "update" if isinstance(changed, dict | set) else "extend")(content)


def _exception(names: list[str], text: str, method: str) -> Exception:
    kinds = [getattr(builtins, str(name), None) for name in names]
    known = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
    if method != "__next__" and StopIteration in known:  # it would end a loop of the tests
        return RuntimeError(text)
    try:
        return known[0](text) if known else RuntimeError(text)
    except TypeError:  # it takes more than a text
        return RuntimeError(text)


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception as another:  # noqa: BLE001 - the program's own `__str__`
        return type(another).__name__


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
