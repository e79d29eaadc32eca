"""Whether a server fits the run, by its dialect, its version and its settings."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ConfigError, RequestError, ServerError
from lightning_grpo.serving.client import ServerClient
from lightning_grpo.serving.wire import ModelInfo, ServerInfo
from lightning_grpo.types import RouterShape

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
        keeps_routes: The experts of a pass are copied before the next one, which overlaps with its
            results, writes its own in their place.
    """

    since: Version
    reports_spans: bool
    update_session: bool
    keeps_routes: bool = True


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
    Dialect((0, 5, 17), reports_spans=False, update_session=False, keeps_routes=False),
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


SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""What in a model's config says how large its weights are, beside the vocabulary."""

DEFAULT_LABEL = "default"
"""What SGLang calls weights that nobody named."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """What the run needs of every server; None is not checked.

    Attributes:
        run_id: Name of the run; servers that carry another run's weights are refused.
        vocab_size: Rows of the trainer's embedding (`config.vocab_size`).
        max_tokens: Longest sequence: prompt and completion together.
        end_ids: Tokens that end a completion, those of the model.
        architecture: Class of the trainer's model, as its config names it.
        shape: Its sizes, by their names in the config.
        sample: A text, and its ids by the trainer's tokenizer.
        routes: What the model's routers choose, where completions must come with it.
        deterministic: Whether equal requests must get equal bits.
    """

    run_id: str
    vocab_size: int | None = None
    max_tokens: int | None = None
    end_ids: frozenset[int] = frozenset()
    architecture: str | None = None
    shape: Mapping[str, int] = field(default_factory=dict)
    sample: tuple[str, tuple[int, ...]] | None = None
    routes: RouterShape | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server said of itself."""

    dialect: Dialect
    info: ServerInfo
    model: ModelInfo

    @property
    def label(self) -> str:
        """The name of the weights that it holds."""
        return self.model.weight_version or DEFAULT_LABEL


async def verify_server(client: ServerClient, requirements: Requirements) -> ServerFacts:
    """Asks a server what it is and refuses one that can't serve this run.

    Raises:
        ServerError: It does not answer.
        ConfigError: It answers, and is unfit: old, short, another model's or another run's.
    """
    try:
        info = await client.server_info()
        model = await client.model_info()
    except RequestError as error:
        raise ConfigError(
            f"{client.url} does not speak SGLang's API, or wants another API key: {error}"
        ) from error
    except ServerError as error:
        raise ServerError(
            f"No inference server answers at {client.url} ({error})."
            " Start one there, or correct the URL."
        ) from error
    dialect = dialect_of(info.version, client.url)
    await _check_endpoints(client, info, dialect)
    _check_owner(client.url, model, requirements.run_id)
    _check_sampling(client.url, model)
    _check_length(client.url, info, requirements.max_tokens)
    _check_vocabulary(client.url, info, model, requirements.vocab_size)
    _check_architecture(client.url, model, requirements)
    if requirements.routes is not None:
        _check_routes(client.url, info, dialect)
    if requirements.deterministic and not info.enable_deterministic_inference:
        raise ConfigError(
            "trainer.deterministic",
            "needs servers that give equal requests equal bits, and heed their seeds;"
            f" {client.url} was not started for it",
            way_out="Start it with `--enable-deterministic-inference` (the embedded engine with"
            " `--deterministic`), or leave `trainer.deterministic` out.",
        )
    await _check_tokenizer(client, model, requirements.sample)
    return ServerFacts(dialect, info, model)


async def _check_endpoints(client: ServerClient, info: ServerInfo, dialect: Dialect) -> None:
    needed = ENDPOINTS + (SESSION_ENDPOINTS if dialect.update_session else ())
    missing = [path for path in needed if not await client.has_endpoint(path)]
    if missing:
        raise ConfigError(
            f"{client.url} (SGLang {info.version}) has no {', '.join(missing)}, which interruption"
            " and weight updates need. Start it with a released SGLang of at least"
            f" {'.'.join(map(str, DIALECTS[0].since))}, up to {'.'.join(map(str, NEWEST_SEEN))}."
        )


def _check_owner(url: str, model: ModelInfo, run_id: str) -> None:
    label = model.weight_version or DEFAULT_LABEL
    if label != DEFAULT_LABEL and not label.startswith(f"{run_id}:"):
        raise ConfigError(
            f"{url} carries the weights {label!r} of another run (this one is {run_id!r})."
            " End that run, or restart the server; two runs can't share one."
        )


def _check_sampling(url: str, model: ModelInfo) -> None:
    """What a server adds to each request would change what is sampled, unseen by the trainer."""
    added = model.preferred_sampling_params
    if added and added != "{}":
        raise ConfigError(
            f"{url} adds sampling parameters of its own to what it is asked ({added}), so that"
            " completions would come from another distribution than the one that is trained. Start"
            " it without `--preferred-sampling-params`."
        )


def _check_length(url: str, info: ServerInfo, max_tokens: int | None) -> None:
    # SGLang names a context only where it was told one; its longest input is always known, and
    # after an interruption prompt and partial completion are one input.
    limits = {"context_length": info.context_length, "max_req_input_len": info.max_req_input_len}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    name = min(known, key=known.__getitem__, default="")
    if max_tokens is not None and known and max_tokens > known[name]:
        raise ConfigError(
            f"{url} takes at most {known[name]} tokens (`{name}`), the run needs {max_tokens}"
            " (longest prompt + `max_new_tokens`). Lower `max_new_tokens`, or start the server"
            " with a longer context."
        )


def check_ids(input_ids: Sequence[int], vocab_size: int | None) -> None:
    """Refuses a prompt that would end a server: SGLang dies of an id that its model doesn't have.

    Raises:
        RequestError: The prompt is empty or holds such an id.
    """
    if not input_ids:
        raise RequestError("A prompt must hold at least one token, got none.")
    low, high = min(input_ids), max(input_ids)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise RequestError(
            f"Token ids of a prompt must be in [0, {vocab_size}) (the model's vocabulary), got"
            f" {low if low < 0 else high}."
        )


def _check_vocabulary(url: str, info: ServerInfo, model: ModelInfo, vocab_size: int | None) -> None:
    served = model.vocab_size or info.vocab_size or local_config(model.model_path).get("vocab_size")
    if vocab_size is not None and served is not None and served != vocab_size:
        raise ConfigError(
            f"{url} serves {model.model_path!r} with a vocabulary of {served}, the trainer's model"
            f" has {vocab_size}. Start the server with the model that is trained."
        )


def _check_architecture(url: str, model: ModelInfo, requirements: Requirements) -> None:
    served = local_config(model.model_path)
    differing = [
        f"{name} {served[name]} instead of {size}"
        for name, size in requirements.shape.items()
        if served.get(name, size) != size
    ]
    expected = requirements.architecture
    if model.architectures and expected and expected not in model.architectures:
        differing.insert(0, f"{model.architectures[0]} instead of {expected}")
    if differing:
        raise ConfigError(
            f"{url} serves {model.model_path!r}, another model than the trainer's:"
            f" {', '.join(differing)}. Start the server with the model that is trained."
        )


def _check_routes(url: str, info: ServerInfo, dialect: Dialect) -> None:
    """What replaying the choice of experts needs of a server."""
    if not dialect.keeps_routes and not info.disable_overlap_schedule:
        raise ConfigError(
            f"`router_replay` needs SGLang 0.5.19 or newer, {url} runs {info.version}: while its"
            " scheduler overlaps with the model, it may tell the next pass's experts. Upgrade it,"
            " or start it with `--disable-overlap-schedule`."
        )
    if not info.enable_return_routed_experts:
        raise ConfigError(
            f"`router_replay` needs servers that say which experts tokens went through, and {url}"
            " was not started for it. Start it with `--enable-return-routed-experts`, or leave"
            " `router_replay` out."
        )


async def _check_tokenizer(
    client: ServerClient, model: ModelInfo, sample: tuple[str, tuple[int, ...]] | None
) -> None:
    """Only ids travel, but the server's tokenizer decides which of them end a completion."""
    if sample is None:
        return
    text, expected = sample
    try:
        found = await client.tokenize(text)
    except ServerError as error:
        logger.info("%s can't be asked for its tokenizer: %s", client.url, error)
        return
    if tuple(found) != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
        raise ConfigError(
            f"{client.url} has another tokenizer ({model.tokenizer_path!r}) than the trainer's"
            f" model: of {text[:40]!r}... it makes {found[at : at + 4]} from token {at} on, the"
            f" model's {list(expected[at : at + 4])}. Start the server with the model that is"
            " trained, and no `tokenizer-path` of its own."
        )


def local_config(model_path: str) -> dict[str, Any]:
    """The config of a model folder on this machine; empty where it can't be read."""
    path = Path(model_path) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
