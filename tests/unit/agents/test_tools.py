"""Tools in processes of their own: whatever one does, it is ended, counted and told."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import anyio
import psutil
import pytest

from lightning_grpo.agents.tools import (
    ToolBox,
    ToolCall,
    ToolLimits,
    ToolProcesses,
    reply_parser,
    strip_specials,
)
from lightning_grpo.errors import ConfigError
from tests.fakes.agents import make_chat_tokenizer
from tests.fakes.tokenizer import CharTokenizer
from tests.fakes.tools import add, sleep

LIMITS = ToolLimits(timeout_s=1.5, memory_mb=256, output_mb=1, processes=1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp")


def call(*tools, limits=LIMITS):
    """Call each tool (or `(tool, arguments)`) in turn in one pool, then a harmless one."""
    pairs = [tool if isinstance(tool, tuple) else (tool, {}) for tool in tools]

    async def play():
        processes = ToolProcesses([*(tool for tool, _ in pairs), lambda: "fine"], limits)
        async with processes.in_use():
            results = [await processes.call(i, pairs[i][1]) for i in range(len(pairs))]
            last = await processes.call(len(pairs), {})
        return results, last, processes.counts

    results, last, counts = anyio.run(play)
    assert (last.kind, last.text) == ("value", "fine")
    kinds = [result.kind for result in results] + ["value"]
    assert vars(counts) == {kind: kinds.count(kind) for kind in vars(counts)}
    return results


@contextlib.contextmanager
def secret_environment():
    os.environ["LEFT_API_KEY"] = "secret"
    try:
        yield
    finally:
        del os.environ["LEFT_API_KEY"]


def test_a_function_and_a_coroutine_give_a_text():
    results = call((add, {"a": 2, "b": 3}), (sleep, {"seconds": 0.01}), lambda: {"a": [1]})
    assert [result.text for result in results] == ["5", "slept", '{"a": [1]}']


def test_a_mistake_is_told():
    missing, zero, leaves = call((add, {"a": 1}), lambda: 1 / 0, lambda: sys.exit(3))
    assert missing.text.startswith("TypeError: add() missing 1 required")
    assert zero.text == "ZeroDivisionError: division by zero"
    assert leaves.text == "SystemExit: 3"


def test_an_endless_loop_is_ended():
    def loop():
        while True:
            pass

    assert [result.kind for result in call(loop, (sleep, {"seconds": 60}))] == 2 * ["timed_out"]


def test_an_end_of_its_own_is_told():
    leaves, crashes = call(lambda: os._exit(7), lambda: ctypes.string_at(0))
    assert (leaves.kind, leaves.text) == ("killed", "its process ended by itself (status 7)")
    assert crashes.kind == "killed"


def test_a_gigabyte_returned_or_printed_or_held_is_refused():
    def prints():
        while True:
            print("x" * 10_000)

    def writes():
        with Path("big").open("w") as file:
            while True:
                file.write("x" * 100_000)

    long, held, printed, written = call(lambda: "x" * 100_000, lambda: "x" * 2**30, prints, writes)
    assert long.kind == "too_long"
    assert held.text.startswith("MemoryError")
    assert printed.text == written.text == "it wrote more than 1 MB"


@linux
def test_a_fork_a_child_and_a_connection_are_refused():
    def connects():
        return socket.create_connection(("127.0.0.1", 9))

    forks, starts, offline = call(os.fork, lambda: subprocess.run(["true"], check=True), connects)
    assert "Operation not permitted" in forks.text
    assert "Operation not permitted" in starts.text
    assert "Permission denied" in offline.text
    (online,) = call(connects, limits=ToolLimits(network=True, processes=1))
    assert "refused" in online.text


@linux
def test_threads_are_allowed():
    def threads():
        thread = threading.Thread(target=print)
        thread.start()
        thread.join()
        return "ran"

    assert call(threads)[0].text == "ran"


@linux
def test_a_write_outside_the_scratch_folder_is_refused():
    outside = Path(tempfile.gettempdir(), "written-by-a-tool")

    def write(path):
        Path(path).write_text("x")
        return ",".join(sorted(os.listdir()))

    here = __file__
    out, within, removes, signals = call(
        (write, {"path": str(outside)}),
        (write, {"path": "inside"}),
        lambda: os.remove(here),
        lambda: os.kill(os.getppid(), 0),
    )
    assert not outside.exists()
    assert within.text == "inside"
    refusals = ("Permission denied", "Read-only file system", "not permitted", "No such process")
    assert all(any(r in it.text for r in refusals) for it in (out, removes, signals))


def test_the_scratch_folder_is_empty_at_every_call():
    def write(name):
        Path(name).write_text("x")
        Path(name + "-folder").mkdir()
        return ",".join(sorted(os.listdir()))

    async def play():
        processes = ToolProcesses([write], LIMITS)
        async with processes.in_use():
            return [(await processes.call(0, {"name": name})).text for name in "ab"]

    assert anyio.run(play) == ["a,a-folder", "b,b-folder"]


def test_what_is_no_answer_ends_the_process():
    def forges():
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"\xff" * 8)
            except OSError:
                continue
        return "x"

    assert call(forges)[0].kind == "killed"


def test_what_a_call_writes_on_every_descriptor_is_no_answer_of_the_next_one():
    def forges():
        body = b'{"kind": "value", "text": "forged"}'
        message = len(body).to_bytes(4, sys.byteorder) + body
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, 2 * message)
            except OSError:
                continue
        return "mine"

    results = call(forges, (add, {"a": 2, "b": 3}), (add, {"a": 3, "b": 4}))
    assert results[0].kind == "killed"
    assert [result.text for result in results[1:]] == ["5", "7"]


def test_nothing_that_a_call_leaves_in_memory_is_there_at_the_next_one():
    def leaves():
        builtins.left = getattr(builtins, "left", 0) + 1
        os.environ["LEFT"] = os.environ.get("LEFT", "") + "x"
        json.dumps.__dict__["left"] = json.dumps.__dict__.get("left", 0) + 1
        return [builtins.left, os.environ["LEFT"], json.dumps.__dict__["left"]]

    assert [result.text for result in call(leaves, leaves)] == 2 * ['[1, "x", 1]']


def test_a_tool_sees_a_short_environment():
    def shown():
        return sorted(os.environ)

    def read(path):
        return Path(path).read_bytes().decode()

    with secret_environment():
        names, own, others = call(
            shown,
            (read, {"path": "/proc/self/environ"}),
            (read, {"path": f"/proc/{os.getpid()}/environ"}),
        )
        (named,) = call(
            lambda: os.environ.get("LEFT_API_KEY"),
            limits=ToolLimits(processes=1, environment=("LEFT_API_KEY",)),
        )
    assert "KEY" not in names.text
    assert "PATH" in names.text
    assert "secret" not in own.text + others.text
    assert named.text == "secret"


@linux
def test_what_outlives_a_call_and_what_is_others_is_refused():
    here, pid = __file__, os.getpid()
    refused = call(
        lambda: os.memfd_create("x"),
        lambda: os.chmod(here, 0o600),
        lambda: os.utime(here),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        lambda: os.kill(os.getppid(), 9),
        limits=ToolLimits(processes=1, network=True),
    )
    assert all("not permitted" in result.text for result in refused), refused


def test_a_cancelled_call_ends_its_process_and_the_last_user_ends_the_rest():
    async def play():
        processes = ToolProcesses([time.sleep, os.getppid], LIMITS)
        before = set(psutil.Process().children())
        async with processes.in_use():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(processes.call, 0, {"seconds": 60})
                await anyio.sleep(1.0)
                tasks.cancel_scope.cancel()
            await processes.call(1, {})
            assert set(psutil.Process().children()) > before
        assert set(psutil.Process().children()) <= before

    anyio.run(play)


def test_tools_run_at_once_as_many_as_there_are_processes():
    async def play():
        processes = ToolProcesses([os.getppid, sleep], ToolLimits(processes=2))
        pids = set()

        async def ask():
            await processes.call(1, {"seconds": 0.05})
            pids.add((await processes.call(0, {})).text)

        async with processes.in_use(), anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(ask)
        return pids, processes.counts.value

    pids, count = anyio.run(play)
    assert len(pids) <= 2
    assert count == 12


def test_a_tool_that_cannot_be_loaded_is_a_mistake_of_the_configuration():
    class Broken:
        def __reduce__(self):
            return (int, ("no number",))

        def __call__(self):
            return ""

    async def play():
        processes = ToolProcesses([Broken()], LIMITS)
        async with processes.in_use():
            await processes.call(0, {})

    with pytest.raises(ConfigError, match=r"can't be loaded in a process: (.|\n)*invalid literal"):
        anyio.run(play)


def described(a: int, b: int = 2) -> int:
    """Adds.

    Args:
        a: One number.
        b: Another.
    """
    return a + b


def test_a_function_is_described_by_its_hints_and_docstring():
    def bare(a, b):
        return a + b

    (schema,) = ToolBox([described], LIMITS).schemas
    function = schema["function"]
    assert (function["name"], function["description"]) == ("described", "Adds.")
    assert function["parameters"]["required"] == ["a"]
    with pytest.raises(ConfigError, match=r"tool 'bare' can't be described .*under `Args:`"):
        ToolBox([bare], LIMITS)
    with pytest.raises(ConfigError, match="different names, two are named 'described'"):
        ToolBox([described, described], LIMITS)
    with pytest.raises(ConfigError, match="got none"):
        ToolBox([], LIMITS)


def test_a_call_of_no_tool_is_answered_and_counted():
    async def play():
        box = ToolBox([described], LIMITS)
        return await box.call(ToolCall("subtract", {})), box.counts.raised

    result, raised = anyio.run(play)
    assert result.text == "there is no tool 'subtract', only described"
    assert raised == 1


def test_limits_that_nothing_could_run_under_are_refused():
    with pytest.raises(ConfigError, match=r"`limits.timeout_s` must be > 0, got 0"):
        ToolLimits(timeout_s=0)


# ---- calls are read in the form that the tokenizer states ---------------------------------------

HERMES = "<tool_call>{}</tool_call>"
TAGGED = "<tool_call><function={{name}}><parameter=...></tool_call>"
LLAMA = 'Respond in the form {"name": ..., "parameters": ...}'
ADD = '{"name": "add", "arguments": {"a": 1, "b": "x"}}'


def parse(template, text):
    return reply_parser(make_chat_tokenizer(template), [])(text)


def test_calls_between_tags_are_read_in_order_and_leave_the_words_around_them():
    reply = parse(HERMES, f"I add. <tool_call>\n{ADD}\n</tool_call>\n<tool_call>{ADD}</tool_call>")
    assert reply.content == "I add."
    assert [(c.name, c.arguments, c.error) for c in reply.calls] == 2 * [
        ("add", {"a": 1, "b": "x"}, "")
    ]


def test_an_answer_without_a_call_stays_as_it_is():
    assert parse(HERMES, " 5 <|") == parse(LLAMA, " 5 <|")
    assert parse(HERMES, " 5 <|").content == " 5 <|"
    assert parse(HERMES, " 5 <|").calls == ()


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        ("{", "not valid JSON"),
        ('{"name": "add"', "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"arguments": {}}', "`name` is missing"),
        ('{"name": 3}', "`name` is missing"),
        ('{"name": "add", "arguments": [1]}', "`arguments` must be an object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(inside, why):
    (call,) = parse(HERMES, f"<tool_call>{inside}</tool_call>").calls
    assert why in call.error
    assert len(call.error) < 500


def test_a_call_that_does_not_end_is_told():
    (call,) = parse(HERMES, f"<tool_call>{ADD}").calls
    assert "`</tool_call>` is missing" in call.error


def test_arguments_may_be_json_in_a_string_or_missing():
    quoted = '{"name": "add", "arguments": "{\\"a\\": 1}"}'
    assert parse(HERMES, f"<tool_call>{quoted}</tool_call>").calls[0].arguments == {"a": 1}
    bare = '<tool_call>{"name": "now"}</tool_call>'
    assert parse(HERMES, bare).calls[0].arguments == {}


def test_functions_and_parameters_in_tags_are_read():
    text = (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\ntwo words\n</parameter>\n</function>\n</tool_call>"
    )
    (call,) = parse(TAGGED, text).calls
    assert (call.name, call.arguments) == ("add", {"a": 1, "b": "two words"})
    assert "must be `<function=name>`" in parse(TAGGED, "<tool_call>x</tool_call>").calls[0].error


def test_a_whole_answer_may_be_the_call():
    (call,) = parse(LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}').calls
    assert (call.name, call.arguments) == ("add", {"a": 1})


def test_the_tokenizers_own_parser_goes_first():
    class Own(CharTokenizer):
        response_template = "some template"

        def parse_response(self, text, *, prefix, tools):
            assert (prefix, tools) == ("before", [{"t": 1}])
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            return {"role": "assistant", "content": "so", "tool_calls": [call]}

    reply = reply_parser(Own(), [{"t": 1}], prefix="before")("anything")
    assert (reply.content, reply.calls[0].name, reply.calls[0].arguments) == ("so", "add", {"a": 1})


def test_transformers_own_parser_is_spoken_to_as_it_wants():
    tokenizer = make_chat_tokenizer("no form")
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {"close": ["<|im_end|>"]},
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
            },
        },
    }
    reply = reply_parser(tokenizer, [], "<|im_start|>assistant\n")(
        f"So. <tool_call>{ADD}</tool_call>"
    )
    assert [(c.name, c.arguments) for c in reply.calls] == [("add", {"a": 1, "b": "x"})]
    assert reply.content == "So."
    (broken,) = reply_parser(tokenizer, [])("<tool_call>{</tool_call>").calls
    assert "can't be read" in broken.error


def test_a_template_that_knows_no_tools_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"states no form of tool calls.*pass `parse`"):
        parse("{{ messages }}", "x")


def test_the_end_mark_is_no_part_of_the_answer():
    tokenizer = make_chat_tokenizer()
    assert strip_specials(tokenizer, "5<|im_end|>") == "5"
