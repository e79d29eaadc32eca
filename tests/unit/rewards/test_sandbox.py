"""Programs that nobody has read: whatever one does, it is ended and told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rewards import code
from lightning_grpo.rewards.sandbox import (
    CodeLimits,
    CodeReward,
    ScratchFolder,
    boundary,
    last_program,
    run_python,
)

LIMITS = CodeLimits(timeout_s=60.0, memory_mb=128)  # a busy machine takes seconds to start one
SHORT = CodeLimits(timeout_s=1.5, memory_mb=128)
OUTSIDE = str(Path(tempfile.gettempdir(), "written-by-a-program"))
linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp")


def run(source, tests="", stdin=""):
    return run_python(source, tests, stdin, LIMITS)


def test_a_program_prints_reads_and_passes_its_tests():
    result = run("def f(x): return 2 * x\nprint(f(int(input())))", "assert f(3) == 6", "21\n")
    assert (result.ending, result.stdout, result.stderr) == ("done", "42\n", "")


def test_a_failed_test_is_raised_with_its_traceback():
    result = run("def f(x): return x", "assert f(3) == 6, 'no'")
    assert result.ending == "raised"
    assert "AssertionError: no" in result.stderr
    assert run("def f(:").ending == "raised"


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "exit()"])
def test_leaving_early_is_not_passing(leave):
    assert run(leave, "assert False").ending == "exited"


def test_printing_what_the_end_looks_like_is_not_passing():
    forged = "import os\nos.write(1, b'0' * 32)\nos._exit(0)"
    assert run(forged, "assert False").ending == "exited"


def test_the_program_cannot_read_its_tests_or_orders():
    seen = run("import os, sys\nprint(sys.argv, os.listdir('.'), globals())", "secret = 1")
    assert "secret" not in seen.stdout
    assert "orders" not in seen.stdout
    assert run("print(open('/proc/self/fd/0').read())", stdin="mine").stdout == "mine\n"


def test_it_has_no_environment_of_ours():
    assert "PATH" not in run("import os; print(dict(os.environ))").stdout


def test_an_endless_loop_is_ended():
    assert run_python("while True: pass", "", "", SHORT).ending == "timed_out"


def test_output_files_and_memory_have_limits():
    assert run("while True: print('x' * 1000)").ending == "too_much_output"
    big = "f = open('a', 'w')\nwhile True: f.write('x' * 100000)"
    assert run(big).ending == "too_much_output"
    assert "MemoryError" in run("x = 'x' * 10**9").stderr


@pytest.mark.parametrize(
    "write",
    [
        "open(str(n), 'wb').write(bytes(10**6))",
        "open(str(n), 'x').close()",
        "os.mkdir(str(n)); os.chdir(str(n))",
    ],
    ids=["bytes", "files", "folders"],
)
def test_all_that_it_writes_together_has_limits(write):
    source = f"import itertools, os\nfor n in itertools.count(): {write}"
    limits = CodeLimits(timeout_s=60.0)
    assert run_python(source, limits=limits).ending == "too_much_output"
    assert run_python(source, "pass", limits=limits).ending == "too_much_output"


def test_a_scratch_folder_goes_however_deep_it_is(tmp_path):
    folder = ScratchFolder(dir=tmp_path, ignore_cleanup_errors=True)
    nest = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"
    subprocess.run([sys.executable, "-c", nest], cwd=folder.name, check=True)
    folder.cleanup()
    assert not list(tmp_path.iterdir())


def test_a_crash_of_the_interpreter_is_told():
    assert run("import ctypes; ctypes.string_at(0)").ending == "killed"


@linux
@pytest.mark.parametrize(
    "source",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.kill(os.getppid(), 9)",
        f"import os; os.remove({__file__!r})",
        f"open({OUTSIDE!r}, 'w')",
        "import os; os.mkdir('../x')",
        "import os; os.symlink('/', '../x')",
    ],
)
def test_forks_connections_signals_and_writes_outside_are_refused(source):
    result = run(source)
    assert result.ending == "raised"
    assert "PermissionError" in result.stderr or "Read-only file system" in result.stderr
    assert result.missing == ()
    assert not Path(OUTSIDE).exists()


CALLS = "import ctypes\ncall = ctypes.CDLL(None, use_errno=True)\n"


@linux
@pytest.mark.parametrize(
    "source",
    [
        CALLS + "raise OSError(ctypes.get_errno()) if call.shmget(0, 4096, 0o1600) < 0 else 0",
        CALLS + "raise OSError(ctypes.get_errno()) if call.semget(0, 1, 0o1600) < 0 else 0",
        CALLS + "raise OSError(ctypes.get_errno()) if call.msgget(0, 0o1600) < 0 else 0",
        CALLS + "raise OSError(ctypes.get_errno()) if call.mq_open(b'/q', 66, 0o600, 0) < 0 else 0",
        "import os; os.memfd_create('x')",
        "open('/dev/shm/x', 'w')",
        f"import os; os.chmod({__file__!r}, 0o600)",
        f"import os; os.utime({__file__!r})",
        f"import os; os.chown({__file__!r}, -1, -1)",
        f"import os; os.setxattr({__file__!r}, 'user.x', b'1')",
        "import os; os.utime(os.open('.', os.O_RDONLY))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "import os; open(f'/proc/{PID}/environ').read()",
        "import os; open(f'/proc/{PID}/cmdline').read()",
        "import os; open(f'/proc/{PID}/mem', 'rb').read()",
        "import os; os.listdir('/proc')",
        "import os; os.listdir(os.path.expanduser('~root'))",
        f"open({__file__!r}).read()",
        "import resource; resource.prlimit(PID, resource.RLIMIT_NOFILE)",
        "import os; os.setpriority(os.PRIO_PROCESS, PID, 19)",
        "import os; os.sched_setaffinity(PID, {0})",
        "import signal; signal.pidfd_send_signal(0, 9)",
        "import os; os.kill(PID, 0)",
        "import os; os.kill(-1, 0)",
        "import fcntl; fcntl.flock(open(0), fcntl.LOCK_EX)",
        # Whom the kernel shall signal when a socket can be read.
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, PID)",
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETSIG, 9)",
        "import fcntl, socket, struct\n"
        "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', PID))",
        "import fcntl; fcntl.fcntl(open(fcntl.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
        # To live on when whoever started it is killed.
        CALLS + "raise OSError(ctypes.get_errno()) if call.prctl(1, 0, 0, 0, 0) < 0 else 0",
        # To watch the files of others.
        CALLS + "call.inotify_add_watch(call.inotify_init(), b'/tmp', 4095) < 0 and 1 / 0",
    ],
)
def test_what_outlives_a_program_and_what_is_others_is_refused(source):
    result = run(source.replace("PID", str(os.getpid())))
    assert result.ending == "raised", result
    assert "Error" in result.stderr.splitlines()[-1]
    assert "NameError" not in result.stderr
    assert "SyntaxError" not in result.stderr


@linux
def test_what_a_program_needs_works():
    source = (
        "import asyncio, ctypes, decimal, hashlib, os, random, socket, tempfile, zoneinfo\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "socket.socketpair()\n"
        "print(open('/dev/stdin').read(), os.cpu_count() > 0, len(os.urandom(4)))\n"
        "with tempfile.TemporaryDirectory(dir='.') as d: open(d + '/x', 'w').write('x')\n"
        "os.kill(os.getpid(), 0)\n"
        "import fcntl\n"
        "fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_NONBLOCK)\n"
        "os.get_terminal_size() if os.isatty(0) else ctypes.CDLL(None).prctl(15, b'name')\n"
    )
    result = run(source, stdin="in")
    assert (result.ending, result.stdout, result.stderr) == ("done", "in True 4\n", "")


def test_the_boundary_in_force_is_said_in_a_line():
    line = boundary()
    assert line.endswith("resource limits") or "NOT held back from" in line
    assert "\n" not in line


@linux
def test_a_fork_bomb_ends_with_its_time_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # to know them from other tests' own
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run_python(bomb, "", "", SHORT).ending == "timed_out"
    assert not [p for p in psutil.process_iter(["cwd"]) if str(tmp_path) in (p.info["cwd"] or "")]


def test_threads_and_the_scratch_folder_work():
    source = (
        "import threading\nopen('a', 'w').write('inside')\n"
        "t = threading.Thread(target=lambda: print(open('a').read()))\nt.start()\nt.join()"
    )
    assert run(source).stdout == "inside\n"


def test_limits_that_nothing_could_run_under_are_refused():
    with pytest.raises(ConfigError, match="`timeout_s` must be > 0, got 0"):
        CodeLimits(timeout_s=0)


@pytest.mark.parametrize("name", ["exec", "compile"])
def test_a_program_that_replaces_a_built_in_function_does_not_skip_its_tests(name):
    replaced = f"import builtins\nbuiltins.{name} = lambda *a: None"
    assert run(replaced, "assert False").ending == "raised"


def test_an_object_of_the_program_names_no_memory_of_the_tests_to_numpy():
    program = (
        "class A:\n    __array_interface__ = {'shape': (1,), 'typestr': '<f8', 'version': 3,\n"
        "                           'data': (1 << 46, True)}\n"
        "def f(): return A()\n"
    )
    tests = (
        "try:\n    f().__array_interface__\nexcept AttributeError:\n    print('refused')\nelse:\n"
    )
    tests += "    raise AssertionError\n"
    assert run_python(program, tests).ending == "done"


# -- programs in completions, against tests --------------------------------------------------------


DOUBLE = "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."
ECHO = "```\nprint(int(input()) * 2)\n```"
CASES = [{"input": "1", "output": "2\n"}, {"input": "4\n", "output": "8  "}]


def test_statements_run_after_the_program():
    assert code(DOUBLE, "assert f(2) == 4") == 1.0
    assert code(DOUBLE, "assert f(2) == 5") == 0.0


def test_inputs_must_give_their_outputs():
    assert code(ECHO, CASES) == 1.0
    assert code(ECHO, json.dumps(CASES)) == 1.0
    assert code(ECHO, [*CASES, {"input": "1", "output": "3"}]) == 0.0
    assert code(ECHO, [{"input": "x", "output": ""}]) == 0.0


def test_a_program_that_leaves_early_passes_nothing():
    leaves = "```python\nimport sys\nsys.exit(0)\n```"
    reward = CodeReward()
    assert reward(leaves, "assert False") == 0.0
    assert reward(leaves, [{"input": "", "output": "4"}]) == 0.0
    assert reward("no program", "assert True") == 0.0
    assert reward.endings == {"exited": 1, "done": 1, "no_program": 1}


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (DOUBLE, "def f(x):\n    return 2 * x\n"),
        ("```python\na\n```\n```py\nb\n```\n```bash\nls\n```", "b\n"),
        ("```python\nnever ends", None),
        ("```python\na\n```\nand ```python\nhalf", "a\n"),
        ("no program", None),
        ("```", None),
        ("```python\n" + "x" * 200_000 + "\n```", None),
        ("```" * 100_000, None),
        ('```python title="a.py"\na\n```', "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("```Python3 copy\na\n```", "a\n"),
        ("```pythonic\na\n```", None),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```\n2. Done", "if a:\n    b\n"),
        ("- ```python\n  if a:\n      b\n  ```", "if a:\n    b\n"),
        ("> ```python\n> a\n> ```", "a\n"),
        ("```python\n  if a:\n    b\n```", "if a:\n  b\n"),
        ("Answer: ```python\na\n```", "a\n"),
        ("```python\na```", "a"),
        ("```python\na = '```'\n```\nso", "a = '```'\n"),
        ("```python\r\na\r\n```", "a\r\n"),
        ("```bash\nls\n```\n```\na\n```\n", "a\n"),
    ],
)
def test_the_last_whole_block_in_python_is_the_program(completion, program):
    assert last_program(completion) == program


def test_a_dataset_without_tests_is_told():
    with pytest.raises(ValueError, match="tests are empty"):
        code(DOUBLE, "")
    with pytest.raises(ValueError, match="must have `input` and `output`"):
        code(DOUBLE, [{"input": "1"}])


def test_leaving_after_the_right_output_passes():
    leaves = "```python\nimport sys\nprint(4)\nsys.exit({})\n```"
    cases = [{"input": "", "output": "4"}]
    assert code(leaves.format(0), cases) == code(leaves.format(""), cases) == 1.0
    assert code(leaves.format(1), cases) == code(leaves.format("'no'"), cases) == 0.0


def test_line_ends_of_another_system_are_line_ends():
    assert code("```\nprint(1)\nprint(2)\n```", [{"input": "", "output": "1\r\n2\r\n"}]) == 1.0


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["```python\n", "~~~\n", "`", "a ```\nb\n", "> ", "- ```\n"])
def test_a_megabyte_of_fences_is_read_at_once(text):
    last_program(text * (2**20 // len(text)))


def in_python(program):
    return f"```python\n{program}\n```"


ALWAYS = """
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    def __contains__(self, item): return True
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __hash__(self): return 0
    def __enter__(self): return self
    def __exit__(self, *error): return True
    def __repr__(self): return "4"
class Four(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
"""
CHEATS = {
    "says yes": (ALWAYS + "def f(x): return Yes()", "assert f(3) == 6"),
    "says yes within": (ALWAYS + "def f(x): return [Yes()]", "assert f(3) == [6]"),
    "says yes to twins": (ALWAYS + "def f(x): return Yes()", "assert f(3) == f(4)"),
    "says yes as a number": (ALWAYS + "def f(x): return Four(4)", "assert f(3) == 6"),
    "is true": (ALWAYS + "def f(x): return Yes()", "assert f(3)"),
    "is more": (ALWAYS + "def f(x): return Yes()", "assert f(3) > 5"),
    "has all": (ALWAYS + "def f(x): return Yes()", "assert 6 in f(3)"),
    "is close": (ALWAYS + "def f(x): return Yes()", "assert abs(f(3) - 6) < 1e-6"),
    "swallows": (ALWAYS + "def f(x): return Yes()", "with f(3) as y:\n    assert y == 6"),
    "stands for the driver": (
        "import sys\nsys.modules['__main__']._run = lambda *a: None\nf = lambda x: 0",
        "assert f(3) == 6",
    ),
    "stands for a judge": (
        "def abs(x): return 0\nclass math:\n    isclose = lambda *a: True\nf = lambda x: 0",
        "import math\nassert abs(f(3) - 6) < 1 or math.isclose(f(3), 6)",
    ),
    "stands for a judge without an import": (
        "class math:\n    isclose = lambda *a: True\nf = lambda x: 0",
        "def check(g): assert math.isclose(g(3), 6)\ncheck(f)",
    ),
    "stands for the built-in ones": (
        "globals()['__builtins__'] = None\ndef f(x): return 0",
        "assert f(3) == 6",
    ),
    "ends a loop": (
        "def f(x): raise StopIteration",
        "assert all(map(f, [1, 2]))",
    ),
    "empties the question": (
        "def f(x):\n    x.clear()\n    return []",
        "x = [3, 1]\nassert f(x) == sorted(x)",
    ),
    "leaves": ("def f(x):\n    import os\n    os._exit(0)", "assert f(3) == 6"),
    "leaves where an error is expected": (
        "def f(x):\n    import os\n    os._exit(0)",
        "try:\n    f(3)\nexcept Exception:\n    pass",
    ),
    "raises what ends the tests": ("def f(x): raise SystemExit(0)", "assert f(3) == 6"),
    "looks for the tests": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'secret' in frame.f_globals: return frame.f_globals['secret']\n"
        "        frame = frame.f_back",
        "secret = 6\nassert f(3) == secret",
    ),
    "calls out of what it was passed": (
        "def f(check): return check.__globals__['secret']",
        "secret = 6\ndef g(): pass\nassert f(g) == secret",
    ),
    "writes on every descriptor": (
        "import os\nfor d in range(3, 20):\n    try: os.write(d, b'\\xff' * 8)\n"
        "    except OSError: pass\nf = lambda x: 0",
        "assert f(3) == 6",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_reaches_for_its_verdict_fails(name):
    program, tests = CHEATS[name]
    assert code(in_python(program), tests) == 0.0


HONEST = {
    "plain data": (
        "def f(x): return {'a': (1, 2.5, None, True), 3: {4, 5}, 'b': [b'x', 2j, 10**30]}",
        "assert f(1) == {'a': (1, 2.5, None, True), 3: {4, 5}, 'b': [b'x', 2j, 10**30]}",
    ),
    "kinds are kept": (
        "from collections import deque\ndef f(x): return deque([x])",
        "from collections import deque\nassert f(1) == deque([1]) and isinstance(f(1), deque)",
    ),
    "a method": (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def __len__(self): return 1",
        "s = Stack()\ns.push(3)\nassert s.items == [3] and len(s) == 1",
    ),
    "in place": ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "an error": (
        "class Bad(ValueError): pass\ndef f(x): raise Bad('no')",
        "try:\n    f(1)\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
        "else:\n    assert False",
    ),
    "a function as an argument": (
        "def f(g, xs): return [g(x) for x in xs]",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3]",
    ),
    "a generator": (
        "def f(n):\n    while True:\n        yield n\n        n += 1",
        "import itertools\nassert list(itertools.islice(f(3), 3)) == [3, 4, 5]",
    ),
    "what prints alike": (
        "from fractions import Fraction\ndef f(x): return Fraction(1, x)",
        "from fractions import Fraction\nassert f(2) == Fraction(1, 2) and str(f(2)) == '1/2'",
    ),
    "a check of the tests' own": (
        "def g(x): return x / 3",
        "def check(candidate):\n    assert math.isclose(candidate(1), 0.333333, abs_tol=1e-5)\n"
        "check(g)",
    ),
    "a long number": ("def f(n): return 10**n", "assert f(5000) == 10**5000"),
    "recursion and keywords": (
        "def f(n, *, k=1): return k if n == 0 else n * f(n - 1, k=k)",
        "assert f(5, k=2) == 240 and f(500) % 7 == 0",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes_as_if_its_tests_ran_beside_it(name):
    program, tests = HONEST[name]
    assert code(in_python(program), tests) == 1.0
