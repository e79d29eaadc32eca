"""The errors of the package, and the checks of settings that raise one of them at construction.

Errors are one tree, named for the boundary that was crossed; each leaf also inherits the matching
built-in type. A message states the parameter, the rule, the value and the way out.

Every number of a public constructor goes through a check: it is finite, and in a range in which it
does something. A size beyond all sense (a group of a billion) would be silence, then the end.
"""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

# All but line ends and tabs: escapes move the cursor, rename windows and fill clipboards; marks of
# direction show a line in another order than it has.
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""A stranger's text for a terminal: what would command it stands there as `\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class GRPOError(Exception):
    """Everything that this package raises on purpose.

    Attributes:
        saved_to: The checkpoint to go on from that was saved when this ended a run; empty if none
            was.
    """

    saved_to: str = ""


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


class RolloutsLostError(RolloutError):
    """The rollouts' process is gone, and with it where they stood: no checkpoint can be saved."""


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
    """

    def __init__(
        self,
        message: str = "stopped by a signal",
        signal: int = 15,
        exit_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.signal = signal
        self.code = 128 + signal if exit_code is None else exit_code


# -- checks of settings ----------------------------------------------------------------------------

A_YEAR_S = 365 * 86400
"""Nothing is waited for longer; clocks of the system overflow not far beyond."""
MOST = 10**9
"""What has no bound of its own ends here."""
MOST_SAMPLES = 65536
"""Of one prompt, or at once on one server."""
MOST_SERVERS = 10_000
MOST_PORT = 65535
_HUB_TIMEOUT_S = 10.0


def require_number(  # noqa: PLR0913 - a range in words
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = MOST,
    whole: bool = False,
    why: str = "",
    way_out: str = "",
) -> None:
    """Refuse what is no finite number of a range.

    Args:
        name: Of the setting.
        value: What was given; None is for the caller to allow.
        least: The smallest.
        above: In the place of `least`: all numbers above this.
        most: The largest.
        whole: Whether it counts something.
        why: The reason of the lower bound, in a few words.
        way_out: What to do, as sentences.

    Raises:
        ConfigError: The setting, the rule that it breaks, and the way out.
    """
    number: Any = value
    kind: Any = Integral if whole else Real
    reason = ""
    if not isinstance(number, kind) or isinstance(number, bool):
        rule = "a whole number" if whole else "a number"
    elif not math.isfinite(number):
        rule = "finite"
    elif number > most:
        rule = f"<= {_shown(most)}"
    else:
        reason = f" ({why})" if why else ""
        if least is not None and number < least:
            rule = f">= {_shown(least)}"
        elif above is not None and number <= above:
            rule = f"> {_shown(above)}"
        else:
            return
    raise ConfigError(name, f"must be {rule}{reason}", value, way_out)


def require_seconds(name: str, value: object) -> None:
    """`value` must be a time that can be waited for."""
    require_number(name, value, above=0, most=A_YEAR_S)


def require_count(name: str, value: object, least: int = 1, most: float = MOST) -> None:
    """`value` must be a whole number of `least` to `most`."""
    require_number(name, value, least=least, most=most, whole=True)


def require_on_hub(setting: str, name: str, kind: Literal["model", "dataset"]) -> None:
    """`name`, which no folder has, must be one of the hub's, or kept from an earlier download.

    Asked once and without patience: whoever loads it would ask for every file, five times each,
    before a misspelt name is told.

    Args:
        setting: For the message.
        name: What was given.
        kind: Of the hub's repositories.

    Raises:
        ConfigError: The hub can't have it, does not have it, or can't be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    kept = f"{kind}s--{name}".replace("/", "--")
    if constants.HF_HUB_OFFLINE or (Path(constants.HF_HUB_CACHE) / kept).is_dir():
        return  # whoever loads it says what is missing
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        reason = "the hub has none of this name that you may see"
    except HFValidationError:
        reason = "it can't be a hub id"
    except HfHubHTTPError:
        return
    except Exception as error:  # noqa: BLE001 - of whichever HTTP library the hub's client has
        reason = f"the hub ({constants.ENDPOINT}) can't be reached: {error or type(error).__name__}"
    else:
        return
    raise ConfigError(
        f"`{setting}` must be a folder that exists or a hub id, got {name!r}: there is no folder "
        f"of that name, and {reason}. Way out: check the path and the spelling."
    )


def _shown(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def require_positive(name: str, value: float, default: str) -> None:
    """`value` must be > 0."""
    require_number(name, value, above=0, way_out=f"Way out: {default} is the default.")


def require_clip(clip_low: float, clip_high: float) -> None:
    """Both must be >= 0 and `clip_low` <= 1, so that the band holds 1 and no negative ratio."""
    if not 0 <= clip_low <= 1:
        raise ConfigError(
            "clip_low",
            "must be between 0 and 1 (the ratio is clipped at 1 - clip_low)",
            clip_low,
            "Way out: 0.2.",
        )
    require_number(
        "clip_high",
        clip_high,
        least=0,
        why="the ratio is clipped at 1 + clip_high",
        way_out="Way out: 0.28.",
    )


def require_band(low: float, high: float) -> None:
    """0 <= low <= 1 <= high: a band that drops unchanged weights trains on nothing."""
    if not 0 <= low <= 1 <= high <= MOST:
        raise ConfigError(
            f"`low` and `high` must satisfy 0 <= low <= 1 <= high, finite (1 is the ratio of equal "
            f"policies), got {low} and {high}. Way out: put 1 between them."
        )


def require_cap(cap: float) -> None:
    """`cap` must be >= 1."""
    require_number(
        "cap",
        cap,
        least=1,
        why="the ratio of equal policies",
        way_out="Way out: 2.0 or more.",
    )


def require_builder(name: str, given: Any, example: str) -> None:
    """Refuse what builds nothing: the object itself, or its name; None passes.

    Args:
        name: Of the setting.
        given: What was given.
        example: What would do, as it is written.
    """
    if given is not None and not callable(given):
        raise ConfigError(
            f"`{name}` must be a function that builds it, such as `{example}`, since the "
            f"parameters are not there before the run, got {given!r:.60}."
        )


def require_part(name: str, given: Any, example: str, kind: type | None = None) -> None:
    """Refuse what is no part of its kind: a class in the place of its object, a number, a name.

    Args:
        name: Of the setting.
        given: What was given; None, for the default, passes.
        example: What would do, as it is written.
        kind: The class of all that fits; None: whatever can be called.
    """
    fits = callable(given) if kind is None else isinstance(given, kind)
    if given is None or (fits and not isinstance(given, type)):
        return
    is_class = isinstance(given, type)
    shown = f"the class {given.__name__}" if is_class else f"{given!r:.60}"
    raise ConfigError(
        f"`{name}` must be an object such as `{example}`, got {shown}."
        + (" Call it." if is_class else "")
    )
