"""What a run is made of: its settings, prompts, tokenizer and servers."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig

from lightning_grpo.algorithm.layers import routers_of
from lightning_grpo.errors import ConfigError, PromptError
from lightning_grpo.policy.attention import length_switches, usable_context
from lightning_grpo.policy.load import check_config, check_source, load_policy, load_tokenizer
from lightning_grpo.policy.size import HALF, ModelSize, model_size
from lightning_grpo.rollout.admission import Curriculum
from lightning_grpo.rollout.chat import Tokenizer
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.prompts import Prompts, PromptSet, Vocabulary
from lightning_grpo.rollout.workflow import RolloutWorkflow, check_sampling
from lightning_grpo.servers.base import ServerLoad, Servers
from lightning_grpo.serving.fitness import SHAPE, Requirements
from lightning_grpo.types import Group, Prompt, RouterShape, Sampling
from lightning_grpo.validation import Evaluation
from lightning_grpo.weights.proof import Probe

RolloutsIn = Literal["auto", "thread", "process"]
"""Where rank 0's rollouts run; `auto`: in a process of their own where the trainer has a GPU."""


@dataclass(frozen=True)
class SessionSettings:
    """What a session needs to know.

    Attributes:
        model_path: Folder or hub id that the servers load.
        run_dir: Logs, weights and trajectories of this run.
        prompts: Training prompts by dataset.
        val_prompts: Held-out prompts by name.
        workflow: Runs an episode.
        servers: Starts or finds servers.
        batch_size: Groups of a rollout batch.
        group_size: Trajectories of a group.
        max_staleness: In versions.
        limits: Of rollouts.
        evaluation: What validation samples.
        keep_group: Which groups are worth training on.
        curriculum: Leaves prompts out of a pass by their past success.
        make_prompt: A row as a prompt; None: the default of `prompts`.
        seed: Of sampling.
        deterministic: Take groups strictly in the order of admission, and ask servers to answer
            equal requests with equal bits.
        training_bytes: Estimates what the trainer needs of its GPU for a model and the longest
            sequence; None: it does not train.
        router_replay: Whether servers must say which experts tokens went through.
        on_event: Told of every fetch, admission, finish, take, sync and advance.
        rollouts_in: Where rank 0's rollouts run: `thread`, `process`, or `auto`.
    """

    model_path: str
    run_dir: Path
    prompts: Mapping[str, Prompts]
    val_prompts: Mapping[str, Prompts]
    workflow: RolloutWorkflow
    servers: Servers
    batch_size: int
    group_size: int
    max_staleness: int
    limits: RolloutLimits
    evaluation: Evaluation
    keep_group: Callable[[Group], bool] | None = None
    curriculum: Curriculum | None = None
    make_prompt: Callable[[Mapping[str, Any], Tokenizer], Prompt] | None = None
    seed: int = 0
    deterministic: bool = False
    training_bytes: Callable[[ModelSize, int | None], int] | None = None
    router_replay: bool = False
    on_event: Callable[..., None] | None = None
    rollouts_in: RolloutsIn = "auto"

    @property
    def order(self) -> dict[str, Any]:
        """What the order of the prompts follows from, by the names of the settings."""
        found: dict[str, Any] = {}
        for name, prompts in self.prompts.items():
            place = f"prompts.{name}" if name else "prompts"
            for setting in ("shuffle", "seed", "weight"):
                found[f"{place}.{setting}"] = vars(prompts)[setting]
        return found


logger = logging.getLogger(__name__)


PROBE_PROMPTS = 4
PROBE_TOKENS = 32
SHORT_PROBE_TOKENS = 12
LONG_PROBE_TOKENS = 512
BEYOND_TOKENS = 32
"""Behind a switch: as many as a proof compares at a stretch."""
RESERVED_TOKENS = 8
"""SGLang's longest input is six tokens shorter than its context, and after an interruption prompt
and partial completion are one input."""
CONTEXT_STEP = 64
LOOKED_AT = 64
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
        val_sampling: Of held-out prompts; None as for training.
        prompts: Training prompts by dataset.
        val_prompts: Held-out prompts by name.
        end_ids: Tokens that end a completion, as servers find them.
        config: Of the model.
        routes: What its routers choose, where that is replayed.
    """

    tokenizer: Any
    vocab_size: int
    context_tokens: int | None
    sampling: Sampling | None
    val_sampling: Sampling | None
    prompts: dict[str, PromptSet]
    val_prompts: dict[str, PromptSet]
    end_ids: frozenset[int] = frozenset()
    config: Any = None
    routes: RouterShape | None = None

    @property
    def mean_prompt(self) -> float:
        """Tokens of a prompt on average, of those looked at."""
        lengths = [len(prompt.input_ids) for prompt in _first(self.prompts, LOOKED_AT)]
        return sum(lengths) / len(lengths)

    @property
    def first_prompts(self) -> dict[str, Prompt]:
        """Of each dataset, the first that can be asked."""
        made = {name: (_made(s, i) for i in range(len(s))) for name, s in self.prompts.items()}
        asked = {name: (p for p in each if p is not None) for name, each in made.items()}
        return {name: p for name, each in asked.items() for p in itertools.islice(each, 1)}

    @property
    def fingerprint(self) -> str:
        """The prompts in a few characters: how many, and what some of them ask.

        Of messages it is what they say: some templates add the day's date.
        """
        sampled: list[Prompt | None] = []
        for each in self.prompts.values():
            rows = range(0, len(each), -(-len(each) // FINGERPRINT_ROWS))
            sampled += [_made(each, i) for i in rows]
        asks = [
            (p.messages, dict(p.template_kwargs)) if p.messages else p.input_ids
            for p in sampled
            if p is not None
        ]
        asked = hashlib.sha256(json.dumps(asks, sort_keys=True, default=str).encode())
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
        if settings.workflow.asks_once:
            needed = self._needed(_longest_of_all)
        if needed is not None:
            probed = max(map(len, (*self.probe.sequences, *self.probe.thorough)), default=0)
            needed = max(needed, probed) + RESERVED_TOKENS
            needed = -(-needed // CONTEXT_STEP) * CONTEXT_STEP
        known = [tokens for tokens in (context, needed) if tokens is not None]
        size = model_size(self.config)
        if size is None:
            known_context = min(known, default=None)
            return ServerLoad(in_flight, batch, known_context, vocab_size=self.vocab_size)
        estimate, longest = settings.training_bytes, min(known, default=None)
        return ServerLoad(
            in_flight,
            batch,
            longest,
            weight_bytes=size.parameters * HALF,
            kv_bytes_per_token=size.kv_bytes_per_token,
            vocab_size=self.vocab_size,
            trainer_bytes=estimate(size, longest) if estimate is not None else 0,
        )

    def _needed(self, longest: Callable[[Mapping[str, PromptSet]], int]) -> int | None:
        """Tokens of the longest sequence; None where nobody says how long completions are.

        Args:
            longest: How many tokens the longest prompt of some sets has.
        """
        if self.sampling is None or self.val_sampling is None:
            return None
        needed = longest(self.prompts) + self.sampling.max_new_tokens
        if not self.val_prompts:
            return needed
        return max(needed, longest(self.val_prompts) + self.val_sampling.max_new_tokens)

    def requirements(self, run_id: str) -> Requirements:
        """What a server must be like to serve this run."""
        sizes = {name: getattr(self.config, name, None) for name in SHAPE}
        text = self._first_prompts(1)[0].text + (self.tokenizer.eos_token or "")
        return Requirements(
            run_id,
            self.vocab_size,
            self._needed(_longest),
            self.end_ids,
            architecture=next(iter(self.config.architectures or ()), None),
            shape={name: size for name, size in sizes.items() if isinstance(size, int)},
            sample=(text, tuple(self.tokenizer.encode(text, add_special_tokens=False))),
            routes=self.routes,
        )

    @property
    def greedy(self) -> Sampling:
        """Of greedy answers to held-out prompts."""
        assert self.val_sampling is not None
        return replace(self.val_sampling, temperature=0.0, top_p=1.0, top_k=-1)

    @functools.cached_property  # each sync asks for it, and it takes hundreds of prompts to make
    def probe(self) -> Probe:
        """What servers, the sent weights and the policy score to prove a weight sync.

        The starts of a few prompts, end to end, and the start of one alone. The first proof of a
        server has a long sequence more, and one beyond each length at which the model changes.
        """
        prompts = self._first_prompts(PROBE_PROMPTS)[:PROBE_PROMPTS]
        joined = tuple(i for prompt in prompts for i in prompt.input_ids[:PROBE_TOKENS])
        alone = prompts[0].input_ids[:SHORT_PROBE_TOKENS]
        whole = itertools.cycle([i for prompt in prompts for i in prompt.input_ids])
        most = self._longest_asked()
        lengths = {min(most, LONG_PROBE_TOKENS)}
        lengths |= {s + BEYOND_TOKENS for s in length_switches(self.config)}
        thorough = (tuple(itertools.islice(whole, n)) for n in sorted(lengths) if n <= most)
        short = (joined, alone)
        if self.context_tokens is not None:
            short = (joined[: self.context_tokens - RESERVED_TOKENS], alone[: self.context_tokens])
        return Probe(
            tuple(ids for ids in short if len(ids) > 1),
            tuple(ids for ids in thorough if len(ids) > len(joined)),
        )

    def _longest_asked(self) -> int:
        """Tokens of the longest sequence that servers are sure to take."""
        needed = self._needed(_longest)
        most = LONG_PROBE_TOKENS if needed is None else needed
        return most if self.context_tokens is None else min(most, self.context_tokens)

    def _first_prompts(self, most: int) -> list[Prompt]:
        """A few prompts of every dataset."""
        return _first(self.prompts, most)


def _first(sets: Mapping[str, PromptSet], most: int) -> list[Prompt]:
    """A few prompts of every set, without rows that turn out to be none."""
    found = [_made(each, i) for each in sets.values() for i in range(min(most, len(each)))]
    return [prompt for prompt in found if prompt is not None]


def _made(prompts: PromptSet, row: int) -> Prompt | None:
    """A prompt, unless its row can't be made one: that is given up when its turn comes."""
    try:
        return prompts[row]
    except PromptError:
        return None


def _longest(sets: Mapping[str, PromptSet]) -> int:
    """Tokens of the longest prompt looked at."""
    return max(len(prompt.input_ids) for prompt in _first(sets, LOOKED_AT))


def _longest_of_all(sets: Mapping[str, PromptSet]) -> int:
    """Tokens of the longest prompt; of very large datasets a guess from those seen."""
    longest = 0
    for each in sets.values():
        rows = range(min(len(each), MEASURED_PROMPTS))
        made = [_made(each, row) for row in rows]
        found = max(len(prompt.input_ids) for prompt in made if prompt is not None)
        longest = max(longest, found if len(each) == len(rows) else 2 * found)
    return longest


def open_material(settings: SessionSettings) -> Material:
    """Open the tokenizer and the prompts, refusing whatever can't work together.

    Raises:
        ConfigError: Which setting, why, and the way out.
    """
    sampling = settings.workflow.sampling
    if sampling is not None:
        check_sampling(sampling)
    check_evaluation(settings.evaluation, settings.workflow)
    val_sampling = settings.evaluation.sampling or sampling
    config = load_config(settings.model_path)
    tokenizer = load_tokenizer(settings.model_path)
    # What a reward sees is what was sampled; old settings would strip spaces before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, settings.model_path)
    end_ids = end_token_ids(settings.model_path, config, tokenizer)
    samplings = {"sampling": sampling, "evaluation.sampling": settings.evaluation.sampling}
    check_ends(end_ids, samplings, config.vocab_size)
    context = usable_context(config)
    room = room_for_prompts(sampling, context)
    val_room = room_for_prompts(val_sampling, context, "evaluation.sampling")
    prompts = _open(settings.prompts, settings, tokenizer, room, vocabulary)
    val_prompts = _open(settings.val_prompts, settings, tokenizer, val_room, vocabulary)
    num_prompts = sum(map(len, prompts.values()))
    if settings.batch_size > num_prompts:
        logger.warning(
            "`batch_size` %d is more than the %d prompts there are: a rollout batch asks some of "
            "them %d times, each time as a group of its own",
            settings.batch_size,
            num_prompts,
            -(-settings.batch_size // num_prompts),
        )
    return Material(
        tokenizer,
        config.vocab_size,
        context,
        sampling,
        val_sampling,
        prompts,
        val_prompts,
        end_ids=end_ids,
        config=config,
        routes=router_shape(settings.model_path) if settings.router_replay else None,
    )


def router_shape(model_path: str) -> RouterShape:
    """What a model's routers choose.

    Raises:
        ConfigError: It has none, or some whose choice can't be replayed.
    """
    return routers_of(load_policy(model_path, meta=True)).shape


def end_token_ids(model_path: str, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a completion: the config's, the generation config's, the tokenizer's.

    SGLang adds `<|eom_id|>`, with which Llama ends a call of a tool, where the tokenizer has it.
    """
    sources = [getattr(config, "eos_token_id", None), tokenizer.eos_token_id]
    try:
        sources.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    except OSError:
        logger.debug("%s has no generation config", model_path)
    sources.append(tokenizer.get_added_vocab().get("<|eom_id|>"))
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
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            f"`model` must be a hub id or a folder with config.json, got {model_path!r}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    check_config(config, model_path)
    return config


def read_vocabulary(tokenizer: Any, vocab_size: int, model_path: str) -> Vocabulary:
    """Ids that the model has an embedding for, and the tokenizer's tokens beyond them.

    A tokenizer may have marks that were added to it and that the model was never given (of images,
    mostly): no prompt need hold them.

    Raises:
        ConfigError: The tokenizer is another model's.
    """
    added = tokenizer.get_added_vocab()
    if max([len(tokenizer), *(token_id + 1 for token_id in added.values())]) <= vocab_size:
        return Vocabulary(vocab_size)
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= vocab_size]
    if not set(beyond) <= set(added):
        raise ConfigError(
            f"`model` {model_path!r} must come with its own tokenizer: the tokenizer has "
            f"{len(tokenizer)} tokens, the model's embedding {vocab_size}. Put the tokenizer that "
            "the model was made with into its folder."
        )
    return Vocabulary(vocab_size, tuple(beyond))


def check_ends(
    end_ids: frozenset[int], samplings: Mapping[str, Sampling | None], vocab_size: int
) -> None:
    """Refuse ends that could never be sampled: every completion would be cut at its limit.

    Args:
        end_ids: Of the model.
        samplings: Further ones, by the settings that they come from.
        vocab_size: Rows of the model's embedding.
    """
    if end_ids and not any(0 <= token_id < vocab_size for token_id in end_ids):
        raise ConfigError(
            f"the model's end tokens {sorted(end_ids)} must be in its embedding of {vocab_size} "
            "rows. Correct `eos_token_id` in config.json, generation_config.json and the "
            "tokenizer, or resize the embedding."
        )
    for place, sampling in samplings.items():
        for token_id in sampling.stop_token_ids if sampling is not None else ():
            if not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"{place}.stop_token_ids",
                    f"must be in [0, {vocab_size}), the model's embedding",
                    token_id,
                    "Leave it out.",
                )


def check_evaluation(evaluation: Evaluation, workflow: RolloutWorkflow) -> None:
    """Refuse what validation can't sample with this workflow."""
    own, wanted = workflow.sampling, evaluation.sampling
    given = {"greedy": (evaluation.greedy, "false"), "sampling": (wanted is not None, "null")}
    for name, (is_set, off) in given.items():
        if is_set and own is None:
            raise ConfigError(
                f"`evaluation.{name}` must be {off} for {type(workflow).__name__}, which has no "
                "`sampling` that another could take the place of."
            )
    if own is None or wanted is None:
        return
    ends = ("stop", "stop_token_ids")
    other = [name for name in ends if getattr(wanted, name) != getattr(own, name)]
    if wanted.max_new_tokens < own.max_new_tokens:
        other.insert(0, "max_new_tokens")
    if other:
        logger.warning(
            "held-out completions end otherwise than those of training: `evaluation.sampling` has "
            "%s. What is not stated there is at its default",
            ", ".join(f"{n} {getattr(wanted, n)} for {getattr(own, n)}" for n in other),
        )
    if workflow.asks_once:
        return
    if wanted.max_new_tokens > own.max_new_tokens:
        raise ConfigError(
            "evaluation.sampling.max_new_tokens",
            f"must be at most the workflow's {own.max_new_tokens} where an episode has several "
            "turns (the room for them is counted by it)",
            wanted.max_new_tokens,
            "Raise the workflow's.",
        )


def room_for_prompts(
    sampling: Sampling | None, context_tokens: int | None, place: str = "sampling"
) -> int | None:
    """Tokens that the context leaves for a prompt; None if there is no limit to know.

    Args:
        sampling: Of the completions.
        context_tokens: Of the model.
        place: The setting that `sampling` comes from.
    """
    if sampling is None or context_tokens is None:
        return None
    room = context_tokens - sampling.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"{place}.max_new_tokens",
            f"must leave room for a prompt in the model's context of {context_tokens} tokens",
            sampling.max_new_tokens,
            f"Lower it below {context_tokens}.",
        )
    return room


def _open(
    sources: Mapping[str, Prompts],
    settings: SessionSettings,
    tokenizer: Any,
    room: int | None,
    vocabulary: Vocabulary,
) -> dict[str, PromptSet]:
    make = settings.make_prompt
    bound = None if make is None else (lambda row: make(row, tokenizer))
    opened = {}
    for name, prompts in sources.items():
        workflow = settings.workflow.of(name)
        opened[name] = prompts.load(tokenizer, bound, room, name, vocabulary)
        workflow.validate(opened[name].columns)
    return opened
