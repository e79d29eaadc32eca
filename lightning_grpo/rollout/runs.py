"""The prompts that are asked now or next, and the same as plain data in a checkpoint."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec

from lightning_grpo.errors import CheckpointError
from lightning_grpo.rollout.episodes import Attempt
from lightning_grpo.rollout.gate import StalenessGate
from lightning_grpo.rollout.mixture import PromptMixture
from lightning_grpo.types import Group, Prompt, PromptKey, Trajectory

_decoder = msgspec.msgpack.Decoder(tuple[Trajectory, ...])


@dataclass(eq=False)
class GroupRun:
    """One admitted prompt, until it is taken or ends otherwise.

    Attributes:
        ticket: Its name at the gate.
        prompt: What is asked.
        attempts: Which attempt runs, from 1.
        started_at: When that attempt began, on the loop's clock.
        attempt: The attempt's episodes.
        scope: Cancels it.
        group: The result, once it has finished.
        wanted: What `keep_group` said of the result.
    """

    ticket: int
    prompt: Prompt
    attempts: int
    started_at: float = 0.0
    attempt: Attempt = field(default_factory=Attempt)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    group: Group | None = None
    wanted: bool = True

    @property
    def key(self) -> PromptKey:
        """The prompt's name."""
        return self.prompt.key


class Backlog:
    """Which prompt comes next, which were put back, and which are at the gate.

    Args:
        stream: The endless stream of prompts.
        wants: Whether an entry is to be asked.
        skip: Told of every entry that is not.
    """

    def __init__(
        self,
        stream: PromptMixture,
        wants: Callable[[PromptKey], bool],
        skip: Callable[[PromptKey], None],
    ) -> None:
        self.stream = stream
        self._wants = wants
        self._skip = skip
        self.runs: dict[int, GroupRun] = {}
        self._again: deque[tuple[PromptKey, int]] = deque()  # put back, with their attempts

    @property
    def num_put_back(self) -> int:
        """Prompts that are to be asked once more."""
        return len(self._again)

    def next(self) -> tuple[PromptKey, int]:
        """The key of the next prompt and which attempt at it comes."""
        if self._again:
            return self._again.popleft()
        key = self.stream.peek()
        while not self._wants(key):
            self._skip(key)
            self.stream.advance(asked=False)
            key = self.stream.peek()
        self.stream.advance()
        return key, 1

    def put_back(self, run: GroupRun) -> None:
        """Ask a prompt again, before any other."""
        self._again.appendleft((run.key, run.attempts))

    def state_dict(self, handed_over: Sequence[GroupRun] = ()) -> dict[str, Any]:
        """Finished groups whole; those that run are asked again after a resume.

        Args:
            handed_over: Groups that were taken but not trained on; they are finished again.
        """
        runs = [*handed_over, *(self.runs[ticket] for ticket in sorted(self.runs))]
        running = [(run.key, run.attempts) for run in runs if run.group is None]
        return {
            "stream": self.stream.state_dict(),
            "ask_again": [[list(key), attempts] for key, attempts in [*running, *self._again]],
            "finished": [pack_group(run.group, run.wanted) for run in runs if run.group],
        }

    def load_state_dict(self, state: dict[str, Any], gate: StalenessGate) -> None:
        """Go on from `state_dict`; the gate gives the finished groups new tickets."""
        self.stream.load_state_dict(state["stream"])
        self._again = deque(((p, row), attempts) for (p, row), attempts in state["ask_again"])
        self.runs = {}
        for packed in state["finished"]:
            group = unpack_group(packed, self.stream.by_key)
            ticket = gate.restore_finished(group.admitted_version)
            run = GroupRun(ticket, group.prompt, group.attempts, group=group)
            run.wanted = bool(packed["wanted"])
            self.runs[ticket] = run


def pack_group(group: Group, wanted: bool = True) -> dict[str, Any]:
    """A group without its prompt, which is made again from its key."""
    return {
        "key": list(group.prompt.key),
        "prompt_digest": _digest(group.prompt),
        "admitted_version": group.admitted_version,
        "attempts": group.attempts,
        "wanted": wanted,
        "trajectories": msgspec.msgpack.encode(group.trajectories),
    }


def unpack_group(packed: dict[str, Any], make_prompt: Callable[[PromptKey], Prompt]) -> Group:
    """The group that `pack_group` packed.

    Raises:
        CheckpointError: The prompt of that name isn't the one that was asked then.
    """
    pass_index, row = packed["key"]
    prompt = make_prompt((int(pass_index), int(row)))
    if _digest(prompt) != packed["prompt_digest"]:
        raise CheckpointError(
            f"prompt {prompt.key} is not the one of the checkpoint: the dataset, its order or the "
            "chat template changed. Resume with the prompts that the run was started with."
        )
    return Group(
        prompt=prompt,
        trajectories=_decoder.decode(packed["trajectories"]),
        admitted_version=int(packed["admitted_version"]),
        attempts=int(packed["attempts"]),
    )


def _digest(prompt: Prompt) -> str:
    return hashlib.blake2b(repr(prompt.input_ids).encode(), digest_size=8).hexdigest()
