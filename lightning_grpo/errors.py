"""One tree of errors, named for the boundary that was crossed.

Each leaf also inherits the matching built-in type. A message states the parameter, the rule, the
value and the way out.
"""

from __future__ import annotations

import re

# All but line ends and tabs: escapes move the cursor, rename windows and fill clipboards; marks of
# direction show a line in another order than it has.
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""A stranger's text for a terminal: what would command it stands there as `\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class GRPOError(Exception):
    """Everything that this package raises on purpose."""


_NO_VALUE = object()


class ConfigError(GRPOError, ValueError):
    """A setting can't work; raised before anything is started or downloaded.

    `ConfigError("group_size", "must be >= 2", 1, "Raise it.")` is a record; its sentence is made
    here: "`group_size` must be >= 2, got 1. Raise it." One argument alone is a sentence as it is,
    for what no single setting is to blame for.

    Args:
        setting: The parameter, with its owner's name where that is needed (`servers.python`).
        rule: What it must be, as the rest of a sentence that begins with its name.
        value: What was given; left out where the rule says all.
        way_out: What to do, as sentences.

    Attributes:
        sentence: Without the way out.
        told: Whether a value was given.
    """

    def __init__(
        self, setting: str, rule: str = "", value: object = _NO_VALUE, way_out: str = ""
    ) -> None:
        self.told = value is not _NO_VALUE
        self.setting, self.rule, self.way_out = setting if rule else "", rule, way_out
        self.value = value if self.told else None
        if rule:
            self.sentence = f"`{setting}` {rule}" + (f", got {value!r}" if self.told else "")
            super().__init__(f"{self.sentence}. {way_out}".rstrip())
        else:
            self.sentence, _, self.way_out = " ".join(setting.split()).partition(". ")
            super().__init__(setting)


class PromptError(ConfigError):
    """A row of a dataset can't be made a prompt; during a run it is given up, by name."""


class ServerError(GRPOError, RuntimeError):
    """An inference server failed, by name, with the end of its log where there is one."""


class ServerStartError(ServerError):
    """A server did not become healthy."""


class ServersLostError(ServerError):
    """Too few servers are left: ends the run, whatever the budget for failed episodes."""


class ReplyError(ServerError):
    """A server's reply contradicts itself or what was asked: nothing of it is trained on."""


class BusyError(ServerError):
    """A server wants the request later (429, or 503): no fault of it, nor of the prompt.

    Args:
        message: What it said.
        wait_s: How long it asks to wait; None where it does not say.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class OwnLimitError(ServerError):
    """This process has no more descriptors, ports or memory for a connection: no server's fault."""


class RequestError(ServerError):
    """A server refused one request (a 4xx answer): sending it again can't help.

    Args:
        message: What it said.
        status: Of the answer; 400 where it was not even sent.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RolloutError(GRPOError, RuntimeError):
    """An episode could not be completed."""


class RewardError(RolloutError):
    """A reward function raised, timed out or returned no finite number."""


class FailureBudgetError(RolloutError):
    """Too many groups failed; carries the first failure's traceback in its message."""


class WeightSyncError(GRPOError, RuntimeError):
    """New weights could not be brought to, or proved on, the servers."""


class RankError(GRPOError, RuntimeError):
    """Another rank failed or fell silent; names it."""


class CheckpointError(GRPOError, RuntimeError):
    """A checkpoint can't be written, read or used with this run."""


class UnreadableError(CheckpointError, ConfigError):
    """What a command was given to read is no checkpoint, or no recording."""


class StopRun(GRPOError, SystemExit):
    """A signal asked the run to end at the next safe point.

    It is a `SystemExit` too: a script that doesn't catch it ends without a traceback, with a
    status that tells. Never raise it inside the event loop (asyncio would leave the loop).

    Args:
        message: What was done with the request.
        signal: The number of the signal; the command line exits with 128 + it.
        exit_code: The process's exit status instead of 128 + signal. Ranks above 0 end with 0:
            Lightning's launcher takes anything else for a crash and kills rank 0.

    Attributes:
        saved_to: The checkpoint to go on from; empty if none was saved.
    """

    saved_to: str = ""

    def __init__(
        self,
        message: str = "stopped by a signal",
        signal: int = 15,
        exit_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.signal = signal
        self.code = 128 + signal if exit_code is None else exit_code
