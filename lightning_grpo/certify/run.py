"""All checks of a model, in the order in which training would meet them; a table of many models.

In the table every causal architecture of transformers is certified, each in a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from lightning_grpo.certify.checks import CHECKS, CheckLine, Parts
from lightning_grpo.certify.tiny import completed, tiny_config, tiny_model
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.check import check_architecture
from lightning_grpo.policy.load import check_config, load_tokenizer
from lightning_grpo.session.material import end_token_ids
from lightning_grpo.templates import check_template

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


# -- every architecture of transformers ------------------------------------------------------------

SECONDS, MEMORY_BYTES = 300.0, 8 << 30
"""What one architecture may take."""
_LEFT_OPEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {  # small from the start: its parts have configs of their own
        **{"d_model": 64, "n_heads": 4},
        "attn_config": {"rope_theta": 5e5, "clip_qkv": 8, "kv_n_heads": 2},
        "ffn_config": {
            **{"hidden_size": 64, "ffn_hidden_size": 36, "moe_num_experts": 5, "moe_top_k": 2}
        },
    },
    "gemma4_assistant": {
        "text_config": {
            **{"model_type": "gemma4_text", "num_kv_shared_layers": 30},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        }
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
        **{"indexer_budget": 2048, "indexer_compress_ratio": 4},
    },
    "reformer": {"is_decoder": True},
}
"""What every checkpoint of these says, and without which transformers makes no model of them."""
_HEADER = """\
| model | verdict | logprobs apart | gradient apart | embedded engine | why |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Certificate:
    """All lines of one model.

    Attributes:
        model: As it was named.
        lines: In the order in which they were found.
    """

    model: str
    lines: tuple[CheckLine, ...]

    @property
    def verdict(self) -> str:
        """`certified`, or the worst verdict of a line."""
        found = {line.verdict for line in self.lines}
        return next((v for v in ("WRONG", "refused", "untried") if v in found), "certified")

    @property
    def why(self) -> str:
        """What the lines say that kept it from being certified; empty where it is."""
        worst = [line for line in self.lines if line.verdict == self.verdict]
        return "; ".join(f"`{line.check}`: {_sentence(line.found)}" for line in worst)

    def line(self, check: str) -> CheckLine | None:
        """The line of one check, where it was made."""
        return next((line for line in self.lines if line.check == check), None)


def architectures() -> list[str]:
    """The `model_type` of every causal language model that transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def certify_each(
    kinds: Iterable[str], seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> Iterator[Certificate]:
    """Certify one architecture after the other, by transformers' own config of each.

    Args:
        kinds: Each a `model_type`.
        seconds: After which its process is ended.
        memory_bytes: That its process may address.
    """
    # Forked from a process that has imported torch and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for kind in kinds:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_certify_alone, args=(kind, memory_bytes, writer))
        process.start()
        writer.close()
        lines = _received(reader, time.monotonic() + seconds, seconds)
        process.kill()
        process.join()
        yield Certificate(kind, tuple(lines))


def _received(reader: Connection, deadline: float, seconds: float) -> list[CheckLine]:
    lines: list[CheckLine] = []
    while True:
        if not reader.poll(max(0.0, deadline - time.monotonic())):
            return [*lines, CheckLine("time", "untried", f"not done after {seconds:g} s")]
        try:
            line = reader.recv()
        except EOFError:
            return [*lines, CheckLine("process", "untried", "its process has died")]
        if line is None:
            return lines
        lines.append(line)


def _certify_alone(kind: str, memory_bytes: int, writer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    torch.set_num_threads(1)
    quietly()
    gc.disable()
    for line in certify_kind(kind):
        writer.send(line)
    writer.send(None)


def certify_kind(kind: str) -> Iterator[CheckLine]:
    """Certify an architecture as transformers itself configures it.

    Args:
        kind: A `model_type`.
    """
    try:
        config: Any = completed(CONFIG_MAPPING[kind](**copy.deepcopy(_LEFT_OPEN.get(kind, {}))))
        lines = certify(config)
        first = next(lines)
        if first.verdict == "refused" and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            with contextlib.suppress(ConfigError), torch.device("meta"):
                check_config(config, kind)  # what that refuses need not be built
                AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # noqa: BLE001 - configs and models raise errors of any kind
        said = f"transformers makes no model of its own config: {type(error).__name__}: {error}"
        yield CheckLine("config", "untried", said)
        return
    yield first
    yield from lines


def quietly() -> None:
    """Have transformers and PEFT keep to themselves what they think of random models."""
    hf_logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def table(found: Sequence[Certificate]) -> str:
    """Markdown: the certified first, then what is wrong or not known, then the refused.

    Args:
        found: One for each model.
    """
    order = {"certified": 0, "WRONG": 1, "untried": 2, "refused": 3}
    rows = sorted(found, key=lambda each: (order[each.verdict], each.model))
    return _HEADER + "".join(f"{_row(each)}\n" for each in rows)


def counts(found: Sequence[Certificate]) -> str:
    """How many of each verdict, in words."""
    many = Counter(each.verdict for each in found)
    named = ("certified", "refused", "WRONG", "untried")
    return ", ".join(f"{many[verdict]} {verdict}" for verdict in named)


def _row(each: Certificate) -> str:
    engine = each.line("engine")
    served = {"ok": "yes", "skipped": "no"}.get(engine.verdict, "WRONG") if engine else ""
    cells = [
        *(f"`{each.model}`", each.verdict, _figure(each.line("packed"))),
        *(_figure(each.line("gradient")), served, each.why.replace("|", "\\|")),
    ]
    return "| " + " | ".join(cells) + " |"


def _figure(line: CheckLine | None) -> str:
    return "" if line is None or line.figure is None else f"{line.figure:.1e}"


def _sentence(text: str) -> str:
    """Without the way out, and no longer than a line."""
    return " ".join(text.split()).partition(". Way out")[0].partition(". Please")[0][:240]
