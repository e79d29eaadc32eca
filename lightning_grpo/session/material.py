"""Everything of a run that needs no server: tokenizer, prompts, and whether they fit together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoConfig, GenerationConfig

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import check_config, check_source, load_tokenizer
from lightning_grpo.policy.memory import HALF, model_size
from lightning_grpo.policy.rope import usable_context
from lightning_grpo.rollout.prompts import Prompts, PromptSet
from lightning_grpo.rollout.verify import SHAPE, Requirements
from lightning_grpo.servers.sizing import ServerLoad
from lightning_grpo.session.settings import SessionSettings
from lightning_grpo.types import Prompt, Sampling
from lightning_grpo.weights.probe import Probe

logger = logging.getLogger(__name__)

PROBE_PROMPTS = 4
PROBE_TOKENS = 32
SHORT_PROBE_TOKENS = 12
CONTEXT_STEP = 64
MEASURED_PROMPTS = 20_000
FINGERPRINT_ROWS = 64


@dataclass(frozen=True)
class Material:
    """What rank 0 opened and checked.

    Attributes:
        tokenizer: Of the model.
        vocab_size: Rows of the model's embedding.
        context_tokens: Longest sequence that the model takes; None if it does not say.
        sampling: Of training; None if the workflow keeps it to itself.
        prompts: Training prompts by dataset.
        val_prompts: Held-out prompts by name.
        end_ids: Tokens that end a completion, as servers find them.
        config: Of the model.
    """

    tokenizer: Any
    vocab_size: int
    context_tokens: int | None
    sampling: Sampling | None
    prompts: dict[str, PromptSet]
    val_prompts: dict[str, PromptSet]
    end_ids: frozenset[int] = frozenset()
    config: Any = None

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt looked at; a bound for servers with a shorter context."""
        return max(len(prompt.input_ids) for prompt in self._first_prompts(64))

    @property
    def fingerprint(self) -> str:
        """The prompts in a few characters: how many, and what some of them ask."""
        sampled: list[tuple[int, ...]] = []
        for each in self.prompts.values():
            rows = range(0, len(each), -(-len(each) // FINGERPRINT_ROWS))
            sampled += [each[i].input_ids for i in rows]
        asked = hashlib.sha256(repr(sampled).encode())
        return f"{self.num_prompts} prompts ({asked.hexdigest()[:8]})"

    @property
    def num_prompts(self) -> int:
        """Rows of all datasets."""
        return sum(map(len, self.prompts.values()))

    def load_of(self, settings: SessionSettings) -> ServerLoad:
        """What the run will ask of its servers."""
        batch = settings.batch_size * settings.group_size
        in_flight = (settings.max_staleness + 1) * batch
        context, needed = self.context_tokens, None
        if self.sampling is not None and settings.workflow.asks_once:
            needed = self._longest_of_all() + self.sampling.max_new_tokens
            needed = -(-needed // CONTEXT_STEP) * CONTEXT_STEP
        known = [tokens for tokens in (context, needed) if tokens is not None]
        size = model_size(self.config)
        if size is None:
            known_context = min(known, default=None)
            return ServerLoad(in_flight, batch, known_context, vocab_size=self.vocab_size)
        estimate = settings.training_bytes
        return ServerLoad(
            in_flight,
            batch,
            min(known, default=None),
            weight_bytes=size.parameters * HALF,
            kv_bytes_per_token=size.kv_bytes_per_token,
            vocab_size=self.vocab_size,
            trainer_bytes=estimate(size) if estimate is not None else 0,
        )

    def _longest_of_all(self) -> int:
        """Tokens of the longest prompt; of very large datasets a guess from those seen."""
        sets = [*self.prompts.values(), *self.val_prompts.values()]
        longest = 0
        for each in sets:
            rows = range(min(len(each), MEASURED_PROMPTS))
            found = max(len(each[i].input_ids) for i in rows)
            longest = max(longest, found if len(each) == len(rows) else 2 * found)
        return longest

    def requirements(self, run_id: str) -> Requirements:
        """What a server must be like to serve this run."""
        needed = None
        if self.sampling is not None:
            needed = self.longest_prompt + self.sampling.max_new_tokens
        sizes = {name: getattr(self.config, name, None) for name in SHAPE}
        text = self._first_prompts(1)[0].text + (self.tokenizer.eos_token or "")
        return Requirements(
            run_id,
            self.vocab_size,
            needed,
            self.end_ids,
            architecture=next(iter(self.config.architectures or ()), None),
            shape={name: size for name, size in sizes.items() if isinstance(size, int)},
            sample=(text, tuple(self.tokenizer.encode(text, add_special_tokens=False))),
        )

    @property
    def greedy(self) -> Sampling:
        """The workflow's sampling at temperature 0."""
        assert self.sampling is not None
        return replace(self.sampling, temperature=0.0, top_p=1.0, top_k=-1)

    @property
    def probe(self) -> Probe:
        """What servers, the sent weights and the policy score to prove a weight sync.

        The starts of a few prompts, end to end, and the start of one alone.
        """
        starts = [prompt.input_ids[:PROBE_TOKENS] for prompt in self._first_prompts(PROBE_PROMPTS)]
        joined = tuple(i for start in starts[:PROBE_PROMPTS] for i in start)
        alone = starts[0][:SHORT_PROBE_TOKENS]
        sequences = (joined[: self.context_tokens], alone[: self.context_tokens])
        return Probe(tuple(ids for ids in sequences if len(ids) > 1))

    def _first_prompts(self, most: int) -> list[Prompt]:
        """A few prompts of every dataset."""
        return [each[i] for each in self.prompts.values() for i in range(min(most, len(each)))]


def open_material(settings: SessionSettings) -> Material:
    """Open the tokenizer and the prompts, refusing whatever can't work together.

    Raises:
        ConfigError: Which setting, why, and the way out.
    """
    sampling = settings.workflow.sampling
    if sampling is not None and not settings.allow_biased_sampling:
        check_sampling(sampling)
    if sampling is None and settings.evaluation.greedy:
        raise ConfigError(
            f"`evaluation.greedy` must be false for {type(settings.workflow).__name__}, which has "
            "no `sampling` whose temperature could be set to 0."
        )
    config = load_config(settings.model_path)
    tokenizer = load_tokenizer(settings.model_path)
    check_tokenizer(tokenizer, config.vocab_size, settings.model_path)
    context = usable_context(config)
    room = room_for_prompts(sampling, context)
    prompts = _open(settings.prompts, settings, tokenizer, room)
    val_prompts = _open(settings.val_prompts, settings, tokenizer, room)
    return Material(
        tokenizer,
        config.vocab_size,
        context,
        sampling,
        prompts,
        val_prompts,
        end_ids=end_token_ids(settings.model_path, config, tokenizer),
        config=config,
    )


def end_token_ids(model_path: str, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a completion: the config's, the generation config's, the tokenizer's."""
    sources = [getattr(config, "eos_token_id", None), tokenizer.eos_token_id]
    try:
        sources.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    except OSError:
        logger.debug("%s has no generation config", model_path)
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else [] if source is None else [source])
    return frozenset(ids)


def load_config(model_path: str) -> Any:
    """The model's configuration, without its weights.

    Raises:
        ConfigError: There is none at that path or hub id.
    """
    check_source(model_path)
    try:
        config = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`model` must be a hub id or a folder with config.json, got {model_path!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_config(config, model_path)
    return config


def check_sampling(sampling: Sampling) -> None:
    """Refuse sampling that would bias the importance ratio of training."""
    off = {"top_p": 1.0, "top_k": -1, "min_new_tokens": 0}
    for name, value in off.items():
        if getattr(sampling, name) != value:
            raise ConfigError(
                f"`sampling.{name}` must be {value} in training (it changes the distribution that "
                f"tokens come from, which biases the ratio), got {getattr(sampling, name)}. "
                f"Leave it out; evaluation may use it."
            )
    if sampling.temperature <= 0:
        raise ConfigError(
            f"`sampling.temperature` must be > 0 in training (a group of greedy completions has no "
            f"variance), got {sampling.temperature}. The usual value is 1.0."
        )
    if sampling.max_new_tokens < 1:
        raise ConfigError(f"`sampling.max_new_tokens` must be >= 1, got {sampling.max_new_tokens}.")
    if not all(sampling.stop):
        raise ConfigError(
            f"`sampling.stop` must hold texts that are not empty, got {list(sampling.stop)}. "
            "Leave the empty one out."
        )


def check_tokenizer(tokenizer: Any, vocab_size: int, model_path: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"`model` {model_path!r} must come with its own tokenizer: the tokenizer has "
            f"{len(tokenizer)} tokens, the model's embedding {vocab_size}. Put the tokenizer that "
            "the model was made with into its folder."
        )


def room_for_prompts(sampling: Sampling | None, context_tokens: int | None) -> int | None:
    """Tokens that the context leaves for a prompt; None if there is no limit to know."""
    if sampling is None or context_tokens is None:
        return None
    room = context_tokens - sampling.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"`sampling.max_new_tokens` must leave room for a prompt in the model's context of "
            f"{context_tokens} tokens, got {sampling.max_new_tokens}. Lower it below "
            f"{context_tokens}."
        )
    return room


def _open(
    sources: Mapping[str, Prompts], settings: SessionSettings, tokenizer: Any, room: int | None
) -> dict[str, PromptSet]:
    make = settings.make_prompt
    bound = None if make is None else (lambda row: make(row, tokenizer))
    opened = {}
    for name, prompts in sources.items():
        workflow = settings.workflow.of(name)
        opened[name] = prompts.load(tokenizer, bound, room, name)
        workflow.validate(opened[name].columns)
    return opened
