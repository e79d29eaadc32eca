"""The records that cross a boundary: prompts in, completions and trajectories out.

Plain data without torch, so that rollout code runs where torch is not installed. All token-level
lists of one record have the same length and the same alignment: entry `t` is about token `t`, and
`logprobs[t]` is `log p(token_t | tokens before t)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from lightning_grpo.errors import require_count, require_number

MOST_TOKENS = 1 << 24
"""Of a completion: far beyond every model's context."""
MOST_TEMPERATURE = 1000.0
"""Far beyond the temperature at which every token is as likely as any other."""

PromptKey = tuple[int, int]
"""(pass over the prompts, row of the prompt): names one prompt of the endless stream."""

NO_VERSION = -1
"""The weight version of a token that no policy sampled (prompt, tool result)."""

Interruption = Literal["abort", "retract", "in_place"]
"""What becomes of requests in flight during an update: taken back by the client and sent again; put
back in the server's queue and read again under the new weights; or kept, with the old weights' keys
and values."""

InterruptionChoice = Literal["auto", "abort", "retract", "in_place"]
"""What is wanted; `auto`: retract where every server does it exactly, else abort."""


# No slots on a record that is a default in a constructor: jsonargparse reads it with `vars()`.
@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Training refuses `top_p`, `top_k` other than "off": they change the distribution that the
    tokens came from, which biases the importance ratio.

    Args:
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits; 0 is greedy. The trainer divides by the same number.
        top_p: Nucleus mass kept; 1 keeps all.
        top_k: Number of tokens kept; -1 keeps all.
        min_new_tokens: Tokens before which the end of the sequence can't be sampled.
        stop: Strings that end a completion. The token that completes one is trained on, and stays
            in the text that a reward sees, with whatever else it spells.
        stop_token_ids: Further token ids that end a completion (the model's own end is implied).
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that no sampling has."""
        require_count("max_new_tokens", self.max_new_tokens, most=MOST_TOKENS)
        require_number("temperature", self.temperature, least=0, most=MOST_TEMPERATURE)
        require_number("top_p", self.top_p, above=0, most=1)
        if self.top_k != -1:
            require_number("top_k", self.top_k, least=1, whole=True, way_out="-1 keeps all.")
        require_count("min_new_tokens", self.min_new_tokens, least=0, most=MOST_TOKENS)
        for token in self.stop_token_ids:
            require_count("stop_token_ids", token, least=0)


# To a config, settings by name are a `Sampling` already.
if TYPE_CHECKING:
    AnySampling = Sampling | Mapping[str, Any]
else:
    AnySampling = Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the dataset, rendered and tokenized once; its ids are never made again.

    Attributes:
        input_ids: Token ids that the server continues, `[prompt tokens]`.
        text: The rendered text (after the chat template) that `input_ids` encode.
        messages: The chat messages before the template.
        columns: Every column of the row; rewards receive those that they name.
        row: Position of the row in the dataset; of several, end to end.
        pass_index: Which pass over the dataset this is.
        dataset: Name of the dataset, where there are several.
        template_kwargs: Arguments of the chat template, in later turns as in this one.
        asked: The text of the row, where it held text and no messages.
    """

    input_ids: tuple[int, ...]
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0
    pass_index: int = 0
    dataset: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    asked: str | None = None

    @property
    def key(self) -> PromptKey:
        """The name of this prompt in the stream, the ledger and the trajectory files."""
        return (self.pass_index, self.row)


@dataclass(frozen=True, slots=True)
class RouterShape:
    """What the routers of a mixture of experts choose.

    Attributes:
        layers: Decoder layers, those without experts included.
        top_k: Experts that a token goes through in each.
        experts: How many there are to choose from.
    """

    layers: int
    top_k: int
    experts: int

    @property
    def width(self) -> int:
        """Bytes of an expert's number, of which all bits set is none."""
        return 1 if self.experts < 1 << 8 else 2

    @property
    def row_bytes(self) -> int:
        """Of one token's experts in all layers."""
        return self.layers * self.top_k * self.width


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts that a server sent the first tokens of a sequence through.

    Entry `t` is about the pass that read token `t`, so the last token of a completion has none: it
    was sampled and not read.

    Attributes:
        experts: `[tokens, layers, top_k]`, unsigned and little-endian, row by row. Layers without
            experts hold anything.
        shape: Of a row.
    """

    experts: bytes
    shape: RouterShape

    def __len__(self) -> int:
        """Tokens that have experts."""
        return len(self.experts) // self.shape.row_bytes

    def first(self, num_tokens: int) -> Routes:
        """Of the first so many tokens, or all."""
        return Routes(self.experts[: num_tokens * self.shape.row_bytes], self.shape)

    def then(self, later: Routes) -> Routes:
        """These, and behind them what a later request of the same tokens knows.

        A token that was read again keeps the experts with which the one behind it was sampled.
        """
        return Routes(self.experts + later.experts[len(self.experts) :], self.shape)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation, also when it was interrupted and resumed on the way.

    Attributes:
        token_ids: Sampled ids, the end token included where one was sampled, `[tokens]`.
        logprobs: Log-probabilities under the temperature-scaled policy that sampled, `[tokens]`.
        versions: Weight version that sampled each token, `[tokens]`.
        text: Decoded text without special tokens.
        finish_reason: `stop`, `length` or `abort`.
        num_interruptions: How often it was aborted and resubmitted.
        routes: Experts of prompt and completion, where they were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    text: str
    finish_reason: str
    num_interruptions: int = 0
    routes: Routes | None = None

    @property
    def truncated(self) -> bool:
        """Whether the length limit, not the model, ended it."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode: every token in order, and which of them the policy sampled.

    Attributes:
        input_ids: Prompt, completions and whatever an environment put between, `[tokens]`.
        response_mask: True where the policy sampled the token, `[tokens]`.
        logprobs: Behavior logprobs; 0 where `response_mask` is false, `[tokens]`.
        versions: Weight versions; `NO_VERSION` where `response_mask` is false, `[tokens]`.
        reward: The scalar that is trained on (the weighted sum of `rewards`).
        rewards: Every reward under its name, before weighting.
        text: The sampled text (of the last turn, if there are several).
        truncated: Whether the length limit ended the last completion.
        temperature: The temperature that the tokens were sampled at.
        num_turns: How many completions it holds.
        transcript: All from the first sampled token on, decoded, where there were several turns.
        length_limit: The `max_new_tokens` of the last completion; None where nobody said it.
        routes: The experts that servers chose for its tokens, where they were asked for.
    """

    input_ids: tuple[int, ...]
    response_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    reward: float
    rewards: Mapping[str, float]
    text: str
    truncated: bool
    temperature: float = 1.0
    num_turns: int = 1
    length_limit: int | None = None
    transcript: str = ""
    routes: Routes | None = None

    @property
    def num_response_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return self.response_mask.count(True)

    @property
    def num_last_tokens(self) -> int:
        """How many tokens its last completion has, if it ends with one."""
        backward = self.response_mask[::-1]
        return backward.index(False) if False in backward else len(backward)

    @property
    def oldest_version(self) -> int:
        """The oldest weights that sampled a token of it (`NO_VERSION` if none was sampled)."""
        sampled = set(itertools.compress(self.versions, self.response_mask))
        return min(sampled, default=NO_VERSION)


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """How far the rollouts are while somebody waits for them.

    Attributes:
        done: Completed trajectories of the next rollout batch.
        wanted: Trajectories of a rollout batch.
        evaluated: Completed trajectories of held-out prompts, since the start of the run.
        tokens: Tokens of all completed requests, since the start of the run.
        why: Why the next rollout batch is not ready, in one line.
    """

    done: int
    wanted: int
    evaluated: int
    tokens: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class ServerActivity:
    """A stretch of time in which a server did one thing.

    Attributes:
        slot: Which server.
        what: `generating`, `idle`, `paused`, `updating` or `out`.
        began_at: Wall-clock time, in seconds since the epoch.
        seconds: How long it lasted.
    """

    slot: int
    what: str
    began_at: float
    seconds: float


CI_LOW, CI_HIGH = "_ci95_low", "_ci95_high"
"""What the names of a held-out score's 95 % confidence interval end with."""


def is_interval(metric: str) -> bool:
    """Whether a metric is an end of another one's confidence interval."""
    return metric.endswith((CI_LOW, CI_HIGH))


@dataclass(frozen=True, slots=True)
class Group:
    """All trajectories of one prompt; advantages are computed within it.

    Attributes:
        prompt: What was asked.
        trajectories: `group_size` episodes.
        admitted_version: The weight version when the group was let in; no token is older.
        attempts: How many attempts it took, failed ones included.
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    admitted_version: int
    attempts: int = 1

    @property
    def oldest_version(self) -> int:
        """The oldest weights that sampled a token of the group: its version for staleness."""
        return min(t.oldest_version for t in self.trajectories)


class Outcome(StrEnum):
    """How a (pass, prompt) ended: each in exactly one way. One that was skipped was never asked."""

    TRAINED = "trained"
    FILTERED = "filtered"
    FAILED = "failed"
    EXPIRED = "expired"
    SKIPPED = "skipped"
