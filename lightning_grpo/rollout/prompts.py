"""Prompts: from a dataset to token ids, and the endless stream of seeded passes over them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.protocols import Tokenizer
from lightning_grpo.rollout.sources import open_rows
from lightning_grpo.types import Prompt, PromptKey

MakePrompt = Callable[[Mapping[str, Any]], Prompt]

_NATURAL_NAMES = ("prompt", "messages")


class Prompts:
    """Where prompts come from and how a row becomes one. Nothing is read before `load`.

    Args:
        path: Hub name, file (.json, .jsonl, .parquet), folder, `shipped:NAME`, a `datasets.Dataset`
            or a list of rows.
        name: Configuration of the dataset, where it has several.
        split: Which split.
        column: The column to ask: text, or a list of chat messages.
        system: System message put first.
        suffix: Text added to the end of the (last user) message.
        transform: Changes a row before anything else reads it.
        limit: Use the first so many rows.
        shuffle: Whether each pass has its own seeded order.
        seed: Of the order, and of what is sampled; None: the run's (`seed_everything`), else 0.
        weight: Share of the prompts asked, relative to the other datasets of the run.
        too_long: What to do with a prompt that leaves no room for `max_new_tokens`: `error` names
            the rows, `skip` leaves them out and counts them.
    """

    def __init__(  # noqa: PLR0913 - config surface: what a YAML file may set
        self,
        path: str | Sequence[Mapping[str, Any]],
        name: str | None = None,
        split: str = "train",
        column: str = "prompt",
        system: str | None = None,
        suffix: str | None = None,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        limit: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        weight: float = 1.0,
        too_long: Literal["error", "skip"] = "error",
    ) -> None:
        if limit is not None and limit < 1:
            raise ConfigError(f"`limit` must be >= 1, or null for every row, got {limit}.")
        if weight <= 0:
            raise ConfigError(
                f"`weight` must be > 0 (a share of the prompts asked), got {weight}. "
                "Way out: leave the dataset out."
            )
        if too_long not in ("error", "skip"):
            raise ConfigError(f"`too_long` must be 'error' or 'skip', got {too_long!r}.")
        self.path = path
        self.name = name
        self.split = split
        self.column = column
        self.system = system
        self.suffix = suffix
        self.transform = transform
        self.limit = limit
        self.shuffle = shuffle
        self.seed = run_seed() if seed is None else seed
        self.weight = weight
        self.too_long = too_long

    def load(
        self,
        tokenizer: Tokenizer,
        make_prompt: MakePrompt | None = None,
        max_prompt_tokens: int | None = None,
        name: str = "",
    ) -> PromptSet:
        """Open the rows; each is rendered and tokenized when it is asked for.

        Args:
            tokenizer: Renders and encodes.
            make_prompt: Takes the place of `self.make_prompt(row, tokenizer)`.
            max_prompt_tokens: What the context leaves beside `max_new_tokens`; None: no limit.
            name: Of the dataset, where there are several.

        Raises:
            ConfigError: No such source or column, no rows, or rows that are too long.
        """
        rows = open_rows(self.path, self.name, self.split)
        make = make_prompt or (lambda row: self.make_prompt(row, tokenizer))
        loaded = PromptSet(self, rows, make, max_prompt_tokens, name)
        loaded.check(column=self.column if make_prompt is None else None)
        return loaded

    def make_prompt(self, row: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
        """Render and tokenize one (transformed) row; token ids are made here and never again."""
        content = row[self.column]
        columns = {k: v for k, v in row.items() if k != self.column or k not in _NATURAL_NAMES}
        if isinstance(content, str) and not tokenizer.chat_template:
            text = "".join(part for part in (self.system, content, self.suffix) if part)
            return Prompt(tuple(tokenizer.encode(text)), text, columns=columns)
        messages = self._messages(content)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"column {self.column!r} holds chat messages, but the tokenizer has no chat "
                "template. Use a column of text, or a chat model's tokenizer."
            )
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        return Prompt(tuple(ids), text, tuple(messages), columns)

    def _messages(self, content: Any) -> list[dict[str, Any]]:
        if isinstance(content, str):
            messages = [{"role": "user", "content": content}]
        elif isinstance(content, Sequence) and all(isinstance(m, Mapping) for m in content):
            messages = [dict(message) for message in content]
        else:
            raise ConfigError(
                f"column {self.column!r} must hold text or a list of chat messages, "
                f"got {type(content).__name__}."
            )
        if not messages:
            raise ConfigError(f"column {self.column!r} holds an empty list of chat messages.")
        if self.suffix:
            content = messages[-1].get("content")
            if not isinstance(content, str):
                raise ConfigError(
                    f"`suffix` needs a last message of text, got {type(content).__name__}. Add it "
                    "with `transform`."
                )
            messages[-1]["content"] = f"{content}{self.suffix}"
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages


def by_name(prompts: Prompts | dict[str, Prompts] | None) -> dict[str, Prompts]:
    """Datasets by name; one alone has the empty name."""
    if prompts == {}:
        raise ConfigError("`prompts` must name at least one dataset, got {}. Or give one alone.")
    if prompts is None:
        return {}
    return prompts if isinstance(prompts, dict) else {"": prompts}


class PromptSet:
    """The opened rows of `Prompts`: `len`, `columns`, and one prompt at a time."""

    def __init__(
        self,
        prompts: Prompts,
        rows: Sequence[Mapping[str, Any]],
        make: MakePrompt,
        max_prompt_tokens: int | None,
        name: str = "",
    ) -> None:
        self.prompts = prompts
        self.name = name
        self.max_prompt_tokens = max_prompt_tokens
        self.num_too_long = 0
        self._rows = rows
        self._make = make
        limit = len(rows) if prompts.limit is None else min(prompts.limit, len(rows))
        self._index: Sequence[int] = range(limit)

    def __len__(self) -> int:
        """How many prompts one pass has."""
        return len(self._index)

    def prompt(self, row: int, pass_index: int = 0) -> Prompt:
        """The prompt at a position of the (unshuffled) set."""
        made = self._made(self._index[row])
        if self.max_prompt_tokens is not None and len(made.input_ids) > self.max_prompt_tokens:
            raise ConfigError(self._too_long_message({row: len(made.input_ids)}))
        return replace(made, row=row, pass_index=pass_index, dataset=self.name)

    def __getitem__(self, row: int) -> Prompt:
        """The prompt at a position, of pass 0; makes the set iterable."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.prompt(row)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that rewards may ask for (those of the first row)."""
        return tuple(self.prompt(0).columns)

    def check(self, column: str | None) -> None:
        """Refuse an unknown column, an empty set and prompts that are too long.

        Args:
            column: The column that every row must have, if any.
        """
        if not len(self):
            raise ConfigError(f"{self._source} has no rows.")
        self._require(column, 0)
        if self.max_prompt_tokens is None:
            return
        too_long = self._measure(column, overhead=len(self._made(0).input_ids))
        if too_long and self.prompts.too_long == "error":
            raise ConfigError(self._too_long_message(too_long))
        self.num_too_long = len(too_long)
        self._index = [row for row in self._index if row not in too_long]
        if not self._index:
            raise ConfigError(self._too_long_message(too_long))

    def _measure(self, column: str | None, overhead: int) -> dict[int, int]:
        """Rows over the limit and their lengths.

        A token is at least one byte of text, so only rows with that many bytes are tokenized: for
        short questions and a long context that is none of them.
        """
        limit = self.max_prompt_tokens or 0
        too_long = {}
        for row in self._index:
            values = self._require(column, row)
            num_bytes = len(str(values.get(self.prompts.column, values)).encode())
            if num_bytes + overhead > limit:
                num_tokens = len(self._made(row).input_ids)
                if num_tokens > limit:
                    too_long[row] = num_tokens
        return too_long

    def _require(self, column: str | None, row: int) -> dict[str, Any]:
        values = self._row(row)
        if column is not None and column not in values:
            place = f" in row {row}" if row else ""
            raise ConfigError(
                f"`column` must be one of {self._source}'s columns {sorted(values)}{place}, "
                f"got {column!r}."
            )
        return values

    def _made(self, row: int) -> Prompt:
        try:
            return self._make(self._row(row))
        except ConfigError:
            raise
        except Exception as error:  # the template's, or the user's own `make_prompt`
            raise ConfigError(
                f"row {row} of {self._source} can't be made a prompt: {error!r}. Mend the row, or "
                "change it with `transform`."
            ) from error

    def _row(self, row: int) -> dict[str, Any]:
        found = self._rows[row]
        if not isinstance(found, Mapping):
            raise ConfigError(
                f"row {row} of {self._source} must have columns by name, got {found!r:.60}."
            )
        if self.prompts.transform is None:
            return dict(found)
        try:
            changed = self.prompts.transform(dict(found))
        except Exception as error:  # the user's
            raise ConfigError(
                f"`transform` failed for row {row} of {self._source}: {error!r}."
            ) from error
        if not isinstance(changed, dict):
            raise ConfigError(
                f"`transform` must return the row as a dictionary, got {type(changed).__name__} "
                f"for row {row} of {self._source}."
            )
        return changed

    @property
    def _source(self) -> str:
        path = self.prompts.path
        return repr(path) if isinstance(path, str) else f"the {type(path).__name__} given"

    def _too_long_message(self, too_long: Mapping[int, int]) -> str:
        shown = ", ".join(f"row {row} ({n} tokens)" for row, n in list(too_long.items())[:5])
        return (
            f"{len(too_long)} prompt(s) of {self._source} have more than the "
            f"{self.max_prompt_tokens} tokens that the context leaves beside `max_new_tokens`: "
            f"{shown}. Lower `max_new_tokens`, or set `too_long: skip` to leave them out."
        )


def run_seed() -> int:
    """What `lightning.seed_everything` was given in this process or the one that started it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))  # noqa: TID251 - where Lightning leaves it


class PromptStream:
    """One endless stream: seeded passes over the prompts, joined end to end.

    Entry i is position `i % N` of pass `i // N`; each pass is a permutation given by (seed, pass)
    alone, so any entry can be had at any time and the state is one number.

    Args:
        prompts: Anything with `len` and `prompt(row, pass_index)`.
        shuffle: Whether passes are permuted.
        seed: Of the permutations.
    """

    def __init__(self, prompts: PromptSet, shuffle: bool = True, seed: int = 0) -> None:
        self.prompts = prompts
        self.shuffle = shuffle
        self.seed = seed
        self._orders: dict[int, Sequence[int]] = {}

    @property
    def num_rows(self) -> int:
        """Prompts of one pass."""
        return len(self.prompts)

    def key(self, index: int) -> PromptKey:
        """The name of entry `index`, without making the prompt."""
        pass_index, position = divmod(index, self.num_rows)
        return pass_index, self._order(pass_index)[position]

    def __getitem__(self, index: int) -> Prompt:
        """Make the prompt of entry `index`."""
        pass_index, row = self.key(index)
        return self.prompts.prompt(row, pass_index)

    def _order(self, pass_index: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.num_rows)
        if pass_index not in self._orders:
            order = list(range(self.num_rows))
            random.Random(f"{self.seed}:{pass_index}").shuffle(order)
            # Two passes meet at a seam; older ones are only asked for after a resume.
            self._orders = {k: v for k, v in self._orders.items() if k == pass_index - 1}
            self._orders[pass_index] = order
        return self._orders[pass_index]
