"""All checks of a model, in the order in which training would meet what they look at."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from lightning_grpo.certify import served, trained
from lightning_grpo.certify.parts import CheckLine, Parts
from lightning_grpo.certify.tiny import tiny_config, tiny_model
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.check import check_architecture
from lightning_grpo.policy.load import check_config, load_tokenizer
from lightning_grpo.session.material import end_token_ids
from lightning_grpo.templates import check_template

CHECKS: tuple[Callable[[Any, Parts], CheckLine], ...] = (
    *(trained.packed, trained.apart, trained.prefixes, trained.passes),
    *(trained.gradient, trained.cuts, trained.checkpoint, trained.flops),
    *(served.names, served.engine, served.adapter, served.export),
)
"""Each of them makes its models from a tiny config, and leaves nothing behind."""
_QUESTION = ({"role": "user", "content": "What is 2 + 3?"},)
_SHOWN = 40


def certify(config: Any, parts: Parts | None = None) -> Iterator[CheckLine]:
    """Check a model by a tiny one of its kind; a refusal is the last line.

    Args:
        config: Of transformers, as large as it may be: no weights are made or loaded of it.
        parts: What is certified; None: the package's own.
    """
    line = architecture(config)
    yield line
    if line.verdict != "ok":
        return
    try:
        tiny = tiny_config(config)
        tiny_model(tiny)
    except Exception as error:  # noqa: BLE001 - configs check themselves, by errors of any kind
        yield CheckLine("tiny", "untried", f"no tiny model could be made of it: {_said(error)}")
        return
    for check in CHECKS:
        line = run_check(check, tiny, parts or Parts())
        yield line
        if line.verdict == "refused":
            return


def architecture(config: Any) -> CheckLine:
    """Whether the package takes the model, by what it looks at before a run."""
    folder = ""
    try:
        check_config(config, config.model_type)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            check_architecture(folder)
    except ConfigError as error:
        said = str(error).replace(repr(folder), repr(config.model_type))
        return CheckLine("architecture", "refused", said)
    except Exception as error:  # noqa: BLE001 - whatever a model's own code raises
        return CheckLine("architecture", "refused", f"it can't be built: {_said(error)}")
    kind = (config.architectures or [config.model_type])[0]
    return CheckLine("architecture", "ok", f"{kind} is taken")


def run_check(check: Callable[[Any, Parts], CheckLine], config: Any, parts: Parts) -> CheckLine:
    """One check; what is raised is its line, too.

    Args:
        check: One of `CHECKS`.
        config: Tiny.
        parts: What is certified.
    """
    return _line(check.__name__, lambda: check(config, parts))


def _line(name: str, check: Callable[[], CheckLine]) -> CheckLine:
    try:
        return check()
    except ConfigError as error:
        return CheckLine(name, "refused", str(error))
    except Exception as error:  # noqa: BLE001 - whatever a model's own code raises
        return CheckLine(name, "WRONG", _said(error))


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def template(model: str, config: Any) -> CheckLine:
    """Whether the tokenizer renders a question so that an answer can begin, and what ends it.

    Args:
        model: Folder or hub id.
        config: Its own, not the tiny one.
    """
    return _line("template", lambda: _rendered(model, config))


def _rendered(model: str, config: Any) -> CheckLine:
    try:
        tokenizer: Any = load_tokenizer(model)
    except ConfigError as error:
        return CheckLine("template", "skipped", error.sentence)
    if tokenizer.chat_template is None:
        return CheckLine("template", "skipped", "no chat template: it continues texts")
    messages = [dict(message) for message in _QUESTION]
    check_template(tokenizer, messages)
    closed = tokenizer.apply_chat_template(messages, tokenize=False)
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rows = config.get_text_config().vocab_size
    ends = sorted(i for i in end_token_ids(model, config, tokenizer) if 0 <= i < rows)
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
    found = f"an answer begins after {opened[-_SHOWN:]!r} and ends with {names or 'nothing'}"
    return CheckLine("template", "ok" if opened != closed and ends else "WRONG", found)
