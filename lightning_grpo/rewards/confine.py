"""Confines the process that calls it, for good: memory, files, network, new processes.

For processes that run what a policy wrote, or tools with arguments that it wrote. Linux does the
work, without root: resource limits, Landlock (writing only below one folder, signals only to
itself) and a seccomp filter (no network sockets, no new processes; threads are allowed). Where one
of these is missing, `confine` says so. It stops accidents and cheats, and is no container: files
can still be read. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_MB = 2**20
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38

# ---- Landlock: the same system call numbers on every machine --------------------------------
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _TRUNCATE, _REFER = 1 << 1, 1 << 14, 1 << 13
_WRITES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # and remove, make of every kind
_SINCE_ABI = ((2, _REFER), (3, _TRUNCATE))
_ABI_SCOPES, _SCOPES = 6, 0b11  # abstract sockets, signals: only within the confined processes

# ---- seccomp: {machine: (audit architecture, numbers)} ---------------------------------------
_SOCKET_NUMBERS = {"x86_64": (41,), "aarch64": (198,)}
_FORK_NUMBERS = {"x86_64": (57, 58), "aarch64": ()}  # fork, vfork
_CLONE_NUMBER = {"x86_64": 56, "aarch64": 220}
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE3, _IO_URING_SETUP, _X32_BIT = 435, 425, 0x40000000
_CLONE_THREAD, _AF_UNIX = 0x00010000, 1
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EACCES = 1, 38, 13
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_OF_NUMBER, _OF_ARCHITECTURE, _OF_FIRST_ARGUMENT = 0, 4, 16


@dataclass(frozen=True)
class Confinement:
    """What a confined process may use.

    Attributes:
        memory_mb: Memory beyond what it has when it is confined.
        cpu_s: Processor time in all, a backstop behind whoever measures the time; None: no limit.
        file_mb: Size of any file that it writes, its output included.
        scratch: The only folder that it may write to.
        network: Whether it may open network sockets.
        processes: Whether it may start processes.
    """

    memory_mb: int
    cpu_s: int | None
    file_mb: int
    scratch: str
    network: bool = False
    processes: bool = False


def confine(limits: Confinement) -> list[str]:
    """Confine this process; there is no way back.

    Returns:
        What could not be enforced on this machine: of `files`, `network`, `processes`.
    """
    _limit_resources(limits)
    if sys.platform != "linux":
        return ["files", *([] if limits.network else ["network"]), "processes"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing = [] if _restrict_writes(libc, limits.scratch) else ["files"]
    wanted = {"network": not limits.network, "processes": not limits.processes}
    if any(wanted.values()) and not _filter_calls(libc, limits):
        missing += [name for name, want in wanted.items() if want]
    return missing


def die_with_parent(parent: int) -> None:
    """End this process, by force, when the thread that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _limit_resources(limits: Confinement) -> None:
    # Python ignores this signal, so that a gigabyte written would be a mere error.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    most = {
        resource.RLIMIT_FSIZE: limits.file_mb * _MB,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: _address_space() + limits.memory_mb * _MB,
    }
    if limits.cpu_s is not None:
        most[resource.RLIMIT_CPU] = limits.cpu_s
    for which, value in most.items():
        hard = resource.getrlimit(which)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (least, least))


def _address_space() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def _restrict_writes(libc: ctypes.CDLL, scratch: str) -> bool:
    abi = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return False
    handled = _WRITES | sum(right for since, right in _SINCE_ABI if abi >= since)
    attributes = struct.pack("=QQQ", handled, 0, _SCOPES if abi >= _ABI_SCOPES else 0)
    size = len(attributes) if abi >= _ABI_SCOPES else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        return False
    of_files = handled & (_WRITE_FILE | _TRUNCATE)
    for path, rights in ((scratch, handled), ("/dev/null", of_files)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, descriptor)
        added = libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(descriptor)
        if added != 0:
            return False
    done = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _filter_calls(libc: ctypes.CDLL, limits: Confinement) -> bool:
    machine = platform.machine()
    if machine not in _AUDIT_ARCHITECTURE:
        return False
    program = _program(machine, limits)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0)


def _program(machine: str, limits: Confinement) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value) of the filter."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | _EPERM)
    program = [
        (_LOAD, 0, 0, _OF_ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OF_NUMBER),
    ]
    if machine == "x86_64":  # the same calls under other numbers
        program += [(_AT_LEAST, 0, 1, _X32_BIT), refuse]
    refused = [_IO_URING_SETUP]
    if not limits.processes:
        refused += _FORK_NUMBERS[machine]
        # Its flags lie in memory, where no filter looks; told "unknown", libraries use `clone`.
        program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _REFUSE | _ENOSYS)]
        program += [
            (_EQUAL, 0, 4, _CLONE_NUMBER[machine]),
            (_LOAD, 0, 0, _OF_FIRST_ARGUMENT),
            (_ANY_BIT, 0, 1, _CLONE_THREAD),
            allow,
            refuse,
        ]
    for number in refused:
        program += [(_EQUAL, 0, 1, number), refuse]
    if not limits.network:
        for number in _SOCKET_NUMBERS[machine]:
            program += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _OF_FIRST_ARGUMENT),
                (_EQUAL, 0, 1, _AF_UNIX),
                allow,
                (_RETURN, 0, 0, _REFUSE | _EACCES),
            ]
    return [*program, allow]
