"""What each SGLang version can do and demands, as a table: one row per change, oldest first."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from lightning_grpo.errors import ConfigError

logger = logging.getLogger(__name__)

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to talk to a server of one range of versions.

    Attributes:
        since: The first version of the range.
        reports_spans: `/generate` names the weight version of each span of tokens. Where it does
            not, the version pinned at submission holds, because every update drains first.
        update_session: Distributed and tensor updates go between `/begin_weight_update` and
            `/end_weight_update` (a disk update needs neither).
    """

    since: Version
    reports_spans: bool
    update_session: bool


ENDPOINTS = (
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/update_weight_version",
)
"""What interruption and versioned weights take, on every version."""
SESSION_ENDPOINTS = ("/begin_weight_update", "/end_weight_update")

DIALECTS: tuple[Dialect, ...] = (
    Dialect((0, 5, 17), reports_spans=False, update_session=False),
    Dialect((0, 5, 19), reports_spans=True, update_session=False),
    Dialect((0, 5, 20), reports_spans=True, update_session=True),
)
NEWEST_SEEN: Version = (0, 5, 23)


def parse_version(text: str) -> Version | None:
    """The three leading numbers of a version; None for a build that carries none (0.0.0.dev1)."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        return None
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    return version if version > (0, 0, 0) else None


def dialect_of(version_text: str, url: str) -> Dialect:
    """The row for a server's version.

    Raises:
        ConfigError: The server is older than the oldest row.
    """
    version = parse_version(version_text)
    oldest, newest = DIALECTS[0], DIALECTS[-1]
    if version is None or version > NEWEST_SEEN:
        seen = ".".join(map(str, NEWEST_SEEN))
        logger.warning(
            "%s runs SGLang %s, newer than any seen (%s): treated like %s",
            url,
            version_text,
            seen,
            seen,
        )
        return newest
    if version < oldest.since:
        raise ConfigError(
            f"{url} runs SGLang {version_text}; at least {'.'.join(map(str, oldest.since))} is"
            " needed (interruption and versioned weight updates). Upgrade the server's environment."
        )
    return max((row for row in DIALECTS if row.since <= version), key=lambda row: row.since)
