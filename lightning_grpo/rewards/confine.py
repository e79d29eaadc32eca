"""Confines the process that calls it, for good: memory, files, network, other processes.

For processes that run what a policy wrote, or tools with arguments that it wrote. Linux does the
work, without root: resource limits, Landlock (writing only below one folder, where asked reading
only what an interpreter needs), a seccomp filter (no sockets to anybody, no new processes, nothing
that outlives the process, nothing done to others) and no capabilities. Where one of these is
missing, `confine` says so. `sandbox` puts bubblewrap around it where that is installed. Standard
library only.
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
_READS, _IOCTL_DEV = 1 << 2 | 1 << 3, 1 << 15  # files, folders
_WRITES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # and remove, make of every kind
_SINCE_ABI = ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))
_ABI_SCOPES, _SCOPES = 6, 0b11  # abstract sockets, signals: only within the confined processes

# ---- seccomp --------------------------------------------------------------------------------
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, architecture
_NO_CALL = -1
# What no confined process may do, as its number on x86-64 and on arm64.
_REFUSED = {
    # Memory and queues that outlive the process, or are on nobody's account.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # Owners, modes, times, attributes and locks of files, of which Landlock knows nothing.
    "chmod": (90, _NO_CALL), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, _NO_CALL), "fchown": (93, 55), "lchown": (94, _NO_CALL), "fchownat": (260, 54),
    "utime": (132, _NO_CALL), "utimes": (235, _NO_CALL), "futimesat": (261, _NO_CALL),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "flock": (73, 32),
    "inotify_add_watch": (254, 27),
    # Other processes: their memory, descriptors, limits, order, and signals to them.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "process_madvise": (440, 440), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    # Ways around a filter or a view of the system.
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "unshare": (272, 97),
    "setns": (308, 268), "chroot": (161, 51), "mount": (165, 40), "open_tree": (428, 428),
    "fsopen": (430, 430), "bpf": (321, 280), "perf_event_open": (298, 241),
}  # fmt: skip
_FORKS = {"fork": (57, _NO_CALL), "vfork": (58, _NO_CALL)}
_REACHING = {"connect": (42, 203), "bind": (49, 200), "socket": (41, 198)}
_SOCKET, _SOCKETPAIR, _PRLIMIT, _CLONE = (41, 198), (53, 199), (302, 261), (56, 220)
_KILLS = {"kill": (62, 129), "tgkill": (234, 131)}
# fcntl and ioctl have the kernel send others signals (F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN,
# SIOCSPGRP), which Landlock holds back since Linux 6.12, and hold up or watch files (F_SETLEASE,
# F_NOTIFY); prctl lets a process live on when its parent is killed.
_BY_FILE = (((72, 25), (8, 10, 15, 1024, 1026)), ((16, 29), (0x8901, 0x8902)))
_PRCTL = (157, 167)
_CLONE3, _X32_BIT, _CLONE_THREAD = 435, 0x40000000, 0x00010000
_AF_INET, _AF_INET6, _AF_NETLINK, _SOCK_STREAM, _SOCK_KIND = 2, 10, 16, 1, 0xF
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EACCES = 1, 38, 13
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
_OF_NUMBER, _OF_ARCHITECTURE, _OF_FIRST_ARGUMENT, _OF_SECOND_ARGUMENT = 0, 4, 16, 24
_Instruction = tuple[int, int, int, int]

_MOST_FILES = 256


@dataclass(frozen=True)
class Confinement:
    """What a confined process may use.

    Attributes:
        memory_mb: Memory beyond what it has when it is confined.
        cpu_s: Processor time in all, a backstop behind whoever measures the time; None: no limit.
        file_mb: Size of any file that it writes, its output included.
        scratch: The only folder that it may write to.
        reads: What it may read, with all below; None: everything that its user may.
        network: Whether it may open network sockets.
        processes: Whether it may start processes.
    """

    memory_mb: int
    cpu_s: int | None
    file_mb: int
    scratch: str
    reads: tuple[str, ...] | None = None
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
    missing = [] if _restrict_files(libc, limits) else ["files"]
    _drop_capabilities(libc)
    if not _filter_calls(libc, limits):
        missing += [*([] if limits.network else ["network"]), "processes"]
    return missing


def interpreter_files() -> tuple[str, ...]:
    """What a Python program reads that was given no files."""
    libraries = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
    devices = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
    system = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu")
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(sys.executable).parent)}
    return (*sorted(prefixes - {"/"}), *libraries, *devices, *system)


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
        resource.RLIMIT_NOFILE: _MOST_FILES,
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


def _restrict_files(libc: ctypes.CDLL, limits: Confinement) -> bool:
    abi = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return False
    writes = _WRITES | sum(right for since, right in _SINCE_ABI if abi >= since)
    handled = writes | (0 if limits.reads is None else _READS)
    attributes = struct.pack("=QQQ", handled, 0, _SCOPES if abi >= _ABI_SCOPES else 0)
    size = len(attributes) if abi >= _ABI_SCOPES else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        return False
    rules = [(limits.scratch, handled), ("/dev/null", handled & (_WRITE_FILE | _TRUNCATE))]
    rules += [(path, handled & _READS) for path in limits.reads or ()]
    if not all(_may(libc, ruleset, path, rights) for path, rights in rules):
        return False
    done = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _may(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # what isn't there need not be allowed
        return True
    if not Path(path).is_dir():
        rights &= _READS & ~(1 << 3) | _WRITE_FILE | _TRUNCATE
    rule = struct.pack("=Qi", rights, descriptor)
    added = not rights or libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) == 0
    os.close(descriptor)
    return added


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """What root may do beyond its own files: also to read every process's environment."""
    version_3, words = 0x20080522, 2
    libc.capset(struct.pack("=Ii", version_3, 0), struct.pack("=III", 0, 0, 0) * words)


def _filter_calls(libc: ctypes.CDLL, limits: Confinement) -> bool:
    machine = platform.machine()
    if machine not in _MACHINES:
        return False
    program = _program(machine, limits)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0)


def _program(machine: str, limits: Confinement) -> list[_Instruction]:
    """The filter: (code, jump if true, jump if false, value) each."""
    column, architecture = _MACHINES[machine]
    program = [
        (_LOAD, 0, 0, _OF_ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OF_NUMBER),
    ]
    if machine == "x86_64":  # the same calls under other numbers
        program += [(_AT_LEAST, 0, 1, _X32_BIT), _refusal(_EPERM)]
    refused = {**_REFUSED, **({} if limits.processes else _FORKS)}
    for numbers in refused.values():
        program += _refused(numbers[column], _EPERM)
    if not limits.network:
        for numbers in _REACHING.values():
            program += _refused(numbers[column], _EACCES)
    else:  # to other programs' sockets, and to hosts by these families only
        families = (_AF_INET, _AF_INET6, _AF_NETLINK)
        program += _only(_SOCKET[column], _OF_FIRST_ARGUMENT, families)
    # Pairs are a process's own; of datagrams, they can send to any other program's socket.
    program += _only(_SOCKETPAIR[column], _OF_SECOND_ARGUMENT, (_SOCK_STREAM,), _SOCK_KIND)
    program += _only(_PRLIMIT[column], _OF_FIRST_ARGUMENT, (0, os.getpid()))
    for numbers in _KILLS.values():
        program += _only(numbers[column], _OF_FIRST_ARGUMENT, (os.getpid(),))
    for numbers, commands in _BY_FILE:
        program += _except(numbers[column], _OF_SECOND_ARGUMENT, commands)
    program += _except(_PRCTL[column], _OF_FIRST_ARGUMENT, (_PR_SET_PDEATHSIG,))
    if not limits.processes:
        # Its flags lie in memory, where no filter looks; told "unknown", libraries use `clone`.
        program += _refused(_CLONE3, _ENOSYS)
        program += [
            (_EQUAL, 0, 4, _CLONE[column]),
            (_LOAD, 0, 0, _OF_FIRST_ARGUMENT),
            (_ANY_BIT, 0, 1, _CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            _refusal(_EPERM),
        ]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _refusal(error: int) -> _Instruction:
    return _RETURN, 0, 0, _REFUSE | error


def _refused(number: int, error: int) -> list[_Instruction]:
    return [(_EQUAL, 0, 1, number), _refusal(error)] if number != _NO_CALL else []


def _only(
    number: int, argument: int, values: tuple[int, ...], mask: int = 0xFFFFFFFF
) -> list[_Instruction]:
    """A call that is allowed with these values of an argument."""
    count = len(values)
    return [
        (_EQUAL, 0, count + 4, number),
        (_LOAD, 0, 0, argument),
        (_AND, 0, 0, mask),
        *[(_EQUAL, count - place, 0, value) for place, value in enumerate(values)],
        _refusal(_EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _except(number: int, argument: int, values: tuple[int, ...]) -> list[_Instruction]:
    """A call that is refused with these values of an argument."""
    count = len(values)
    return [
        (_EQUAL, 0, count + 3, number),
        (_LOAD, 0, 0, argument),
        *[(_EQUAL, count - place, 0, value) for place, value in enumerate(values)],
        (_RETURN, 0, 0, _ALLOW),
        _refusal(_EPERM),
    ]
