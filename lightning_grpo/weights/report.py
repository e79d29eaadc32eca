"""What a publish may take, and what it did."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from lightning_grpo.errors import WeightSyncError
from lightning_grpo.types import InterruptionChoice
from lightning_grpo.weights.probe import Reading
from lightning_grpo.weights.transport import Transport


@dataclass(frozen=True)
class SyncSettings:
    """How weights travel, and how long each part may take.

    Attributes:
        transport: None chooses by what is there.
        bucket_bytes: Size of flat buckets.
        gather_timeout_s: Deadline of gathering the shards.
        request_timeout_s: Deadline of each phase at a server.
        verify: Whether a probe must agree after each publish.
        interruption: What is to become of requests in flight.
        recovery_timeout_s: Deadline for a server to come back when none is left.
        release_memory: Whether servers give their GPU memory back while the trainer steps.
    """

    transport: Transport | None = None
    bucket_bytes: int = 2 << 30
    gather_timeout_s: float = 60.0
    request_timeout_s: float = 60.0
    verify: bool = True
    interruption: InterruptionChoice = "auto"
    recovery_timeout_s: float = 300.0
    release_memory: bool = False


@dataclass
class PublishReport:
    """What one publish did.

    Attributes:
        version: Of the weights.
        num_bytes: Of weights, for one server.
        paused_s: From the interruption until the last server worked again.
        seconds: By phase; of the slowest server where each has its own.
        updated: The servers that hold the version now.
        readings: Their probes, where there is one.
        failures: Why the others do not.
        sent_diff: What was sent against the policy, mean |dlogprob|; None where not compared.
    """

    version: int
    num_bytes: int = 0
    paused_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    updated: list[str] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    sent_diff: float | None = None

    @property
    def probe_diff(self) -> float | None:
        """The largest difference of a server from what was sent, mean |dlogprob|."""
        return max((r.diff for r in self.readings.values()), default=None)

    @property
    def probe_change(self) -> float | None:
        """How far what was sent moved since the previous version, mean |dlogprob|."""
        changes = [r.change for r in self.readings.values() if r.change is not None]
        return max(changes, default=None)

    @asynccontextmanager
    async def phase(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """Times a phase and ends it at its deadline, by name."""
        started = time.monotonic()
        try:
            with anyio.fail_after(timeout_s):
                yield
        except TimeoutError as error:
            raise WeightSyncError(
                f"`{name}` of version {self.version} took longer than {timeout_s:g} s"
            ) from error
        finally:
            elapsed = time.monotonic() - started
            self.seconds[name] = max(self.seconds.get(name, 0.0), elapsed)
