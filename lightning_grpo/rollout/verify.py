"""Checks of a server before the run trusts it; each refusal says what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_grpo.errors import ConfigError, RequestError, ServerError
from lightning_grpo.rollout import wire
from lightning_grpo.rollout.client import ServerClient
from lightning_grpo.rollout.dialects import Dialect, dialect_of

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
    """

    run_id: str
    vocab_size: int | None = None
    max_tokens: int | None = None
    end_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server said of itself."""

    dialect: Dialect
    info: wire.ServerInfo
    model: wire.ModelInfo

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
    _check_owner(client.url, model, requirements.run_id)
    _check_length(client.url, info, requirements.max_tokens)
    _check_vocabulary(client.url, info, model, requirements.vocab_size)
    return ServerFacts(dialect, info, model)


def _check_owner(url: str, model: wire.ModelInfo, run_id: str) -> None:
    label = model.weight_version or DEFAULT_LABEL
    if label != DEFAULT_LABEL and not label.startswith(f"{run_id}:"):
        raise ConfigError(
            f"{url} carries the weights {label!r} of another run (this one is {run_id!r})."
            " End that run, or restart the server; two runs can't share one."
        )


def _check_length(url: str, info: wire.ServerInfo, max_tokens: int | None) -> None:
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


def _check_vocabulary(
    url: str, info: wire.ServerInfo, model: wire.ModelInfo, vocab_size: int | None
) -> None:
    served = model.vocab_size or info.vocab_size or local_vocab_size(model.model_path)
    if vocab_size is not None and served is not None and served != vocab_size:
        raise ConfigError(
            f"{url} serves {model.model_path!r} with a vocabulary of {served}, the trainer's model"
            f" has {vocab_size}. Start the server with the model that is trained."
        )


def local_vocab_size(model_path: str) -> int | None:
    """`vocab_size` of a model folder on this machine; None where it can't be read."""
    path = Path(model_path) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None
