"""A policy from a folder or the hub, its weights after sharding, and its export.

Values for a policy that was built on the meta device, sharded or not.

`to_empty` leaves garbage in buffers that checkpoints don't hold (the rotary embedding's
frequencies): the model would run and be wrong, so they come from the model that rank 0 loads.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from lightning_grpo._compat import named_by_architecture
from lightning_grpo.errors import ConfigError, require_on_hub
from lightning_grpo.policy.attention import PACKED, register_packed_attention

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
_OLD_BUFFERS = re.compile(r"(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$")
"""Buffers that older versions of transformers wrote and that follow from the config."""
_NOISE = re.compile(r"dropout|pdrop|layerdrop|drop_path|jitter")

_DECIDED = {
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        "weights are fp32, in which small updates count, and compute in bf16 is the Trainer's "
        "`precision` or `fsdp2`",
    ),
    **dict.fromkeys(("device_map", "tp_plan"), "where weights are is the Trainer's `strategy`"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), "quantized weights can't be trained"),
    **dict.fromkeys(
        ("state_dict", "output_loading_info", "ignore_mismatched_sizes"),
        "weights are those of the folder, all of them",
    ),
}
"""Options of `from_pretrained` that are no one else's to choose, and why."""
_QUANTIZED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")
"""As files of safetensors and of torch call them."""
_PACKED_WEIGHTS = (".qweight", ".weight_packed")
"""Integers that hold several weights each (GPTQ and AWQ, compressed-tensors)."""
_SPACED = ("qwen3_next", "qwen3_5")
"""Of whose layers each so-many-th attends, and those between carry a state."""
_LFS_POINTER = b"version https://git-lfs"
_OTHER_THAN_TEXT = ("vision", "audio", "vq")

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, StrictDataclassError),
)
"""What transformers raises for folders, hub ids and options that it can't make a model of."""


def load_policy(
    model: str,
    *,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model with packed attention and without dropout, in training mode.

    Args:
        model: Hub id or folder.
        dtype: Of the parameters.
        meta: Only the shapes, on the meta device; `materialize_from_folder` brings the values.
        model_kwargs: For transformers' `from_pretrained` (`revision`, `attn_implementation`, ...).

    Raises:
        ConfigError: The folder or the hub id can't be loaded, or lacks weights.
    """
    register_packed_attention()
    for name in model_kwargs or ():
        if name in _DECIDED:
            raise ConfigError(
                f"`model_kwargs` must leave out `{name}`: {_DECIDED[name]}. Remove it there."
            )
    # Said, since transformers would otherwise ask at the terminal whether to run a folder's code.
    options: dict[str, Any] = {
        "attn_implementation": PACKED,
        "trust_remote_code": False,
        **(model_kwargs or {}),
    }
    check_source(model)
    try:
        check_config(_read_config(model, options), model, options)
        _check_dtypes(model, options)
        policy = _meta(model, dtype, options) if meta else _load(model, dtype, options)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, KeyError) and error.args == (PACKED,):
            raise ConfigError(
                f"`model` must let transformers choose its attention, {model!r} has a fixed list "
                "of its own. Way out: a newer architecture, such as Qwen3 or Llama."
            ) from error
        _check_files(model)
        raise ConfigError(
            f"`model` must be a causal language model that transformers loads, got {model!r}: "
            f"{_first_line(error)} Way out: a hub id, or a folder with config.json and weights."
        ) from error
    without_dropout(policy)
    policy.config.use_cache = False
    policy.train()
    return policy


def load_tokenizer(model: str, **tokenizer_kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder.

    Raises:
        ConfigError: There is none.
    """
    check_source(model)
    _check_tokenizer_files(model)
    try:
        options = {"trust_remote_code": False, **tokenizer_kwargs}
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except StrictDataclassError as error:  # of the config, which it reads for its class
        raise ConfigError(
            f"`model` must have a config.json that transformers reads, got {model!r}: "
            f"{_first_line(error)} Way out: the config.json that belongs to these weights."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        _check_files(model)
        raise ConfigError(
            f"`model` must come with a tokenizer, got {model!r}: {_first_line(error)} "
            "Way out: put tokenizer.json and tokenizer_config.json into the folder."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def check_source(model: str) -> None:
    """Raise ConfigError for what is no folder with a model of its own, nor on the hub."""
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "~", "/")) or model.count("/") > 1
    if path.is_dir():
        adapted = (path / "adapter_config.json").is_file()
        if adapted:
            raise ConfigError(
                f"`model` must be a whole model, got {model!r}, which holds an adapter "
                "(adapter_config.json): servers would not load it. Way out: merge it into the "
                "weights (PEFT's `merge_and_unload`), or move it to a folder of its own."
            )
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"`model` must be a folder with config.json, got {model!r}, which has none. "
                "Way out: a folder as `save_pretrained` writes it."
            )
    elif looks_like_path:
        raise ConfigError(
            f"`model` must be a folder that exists, got {model!r}. "
            "Way out: check the path, or give a hub id such as Qwen/Qwen3-0.6B."
        )
    else:
        require_on_hub("model", model, "model")


def check_config(config: Any, model: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse models whose weights can't be trained here, by what their config says of them.

    Args:
        config: Of transformers.
        model: Where it is from.
        options: For `from_pretrained`.

    Raises:
        ConfigError: The weights are quantized, or the model takes more than text.
    """
    quantized = (options or {}).get("quantization_config") or getattr(
        config, "quantization_config", None
    )
    if quantized:
        said = quantized if isinstance(quantized, Mapping) else vars(quantized)
        raise ConfigError(
            f"`model` must have weights that can be trained, those of {model!r} are quantized "
            f"({said.get('quant_method', 'unknown method')}). Way out: the model that they were "
            "made from; with `lora` on a GPU that is too small, fewer layers or a smaller model."
        )
    parts = [part.removesuffix("_config") for part in getattr(config, "sub_configs", None) or ()]
    if any(part.startswith(_OTHER_THAN_TEXT) or part == "text" for part in parts):
        raise ConfigError(
            f"`model` must be a language model alone, {model!r} ({config.model_type}) consists of "
            f"parts: {', '.join(sorted(parts))}. Way out: save its text part as a model of its own "
            '(docs/troubleshooting.md, "A model that also sees") and give that folder.'
        )


def _check_files(model: str) -> None:
    """Name the file that was not fetched whole: what reads it says what is wrong, but not where."""
    for file in sorted(Path(model).expanduser().glob("*.*")):
        try:
            said = _damage(file)
        except (OSError, SafetensorError) as error:
            said = f"can't be read ({error})"
        if said:
            raise ConfigError(
                f"`model` must be a folder of whole files, {str(file)!r} {said}. Way out: fetch it "
                "again (`git lfs pull`, `hf download`)."
            )


def _damage(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return "is a pointer of Git LFS in the place of the file"
    if file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    return ""


def _check_tokenizer_files(model: str) -> None:
    # transformers makes up a tokenizer without a vocabulary where a folder has none.
    folder = Path(model).expanduser()
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        raise ConfigError(
            f"`model` must come with a tokenizer, got {model!r}, which has none. "
            "Way out: put tokenizer.json and tokenizer_config.json into the folder."
        )


def without_dropout(model: nn.Module) -> None:
    """Set every dropout layer to 0: two passes over a token must give the same logprob."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def compute_as_served(model: PreTrainedModel) -> None:
    """Leave training mode, in which models add noise that servers don't have.

    Dropout, jitter and sampled routes, wherever a model keeps them, ask for training mode. So does
    gradient checkpointing, of the blocks alone: they stay in it, with their own noise set to 0.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in list(vars(module).items()):
                if _NOISE.search(name) and isinstance(value, float):
                    setattr(module, name, 0.0)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the blocks' inputs for the backward pass; acts in training mode alone.

    transformers 5.2x renames `gradient_checkpointing_enable`; the old name warns there.

    Raises:
        ConfigError: The model's blocks can't be recomputed.
    """
    renamed = "activation_checkpointing_enable"
    name = renamed if hasattr(model, renamed) else "gradient_checkpointing_enable"
    enable = getattr(model, name)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"`gradient_checkpointing` must be false for {type(model).__name__}, whose blocks "
            f"can't be recomputed: {error} To save memory lower `max_tokens_per_microbatch`."
        ) from error


def _load(model: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    reports = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, **{**options, **reports}
        )
    policy: PreTrainedModel = loaded[0]
    _check_weights(policy, loaded[1], model)
    return policy


def _check_dtypes(model: str, options: Mapping[str, Any]) -> None:
    """Refuse weights of 8 bits and fewer, which mean nothing without their scales."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        where = {name: options[name] for name in ("cache_dir", "revision") if name in options}
        config = try_to_load_from_cache(model, "config.json", **where)
        if not isinstance(config, str):
            return
        folder = Path(config).parent
    for name, dtype in _stored_dtypes(folder):
        packed = name.endswith(_PACKED_WEIGHTS)
        if (dtype in _QUANTIZED or packed) and not _OLD_BUFFERS.search(name):
            raise ConfigError(
                f"`model` must have weights that can be trained, {name} of {model!r} is {dtype}: "
                "quantized, although its config.json names no `quantization_config`. Way out: the "
                "model that it was made from."
            )


def _stored_dtypes(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor in the files that transformers reads."""
    for whole, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{whole}.{ending}.index.json"
        shards = {f"{whole}.{ending}"}
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
        files = [folder / shard for shard in sorted(shards) if (folder / shard).is_file()]
        for file in files:
            yield from _dtypes_of(file)
        if files:
            return


def _dtypes_of(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield name, str(opened.get_slice(name).get_dtype())
        return
    for name, value in torch.load(file, map_location="meta", weights_only=True).items():
        if isinstance(value, Tensor):
            yield name, str(value.dtype).removeprefix("torch.")


def _check_weights(policy: PreTrainedModel, info: Mapping[str, Any], model: str) -> None:
    """Refuse what transformers would fill with random numbers or leave out, with a warning."""
    if getattr(policy, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"`model` must be a whole model, got {model!r}, which comes with an adapter. Way out: "
            "merge it into the weights (PEFT's `merge_and_unload`) and give that folder."
        )
    wrong = {
        "lacks": sorted(info["missing_keys"]),
        "has in another shape": sorted(
            f"{name} ({_shape(found)}, by the config {_shape(wanted)})"
            for name, found, wanted in info["mismatched_keys"]
        ),
        "has beside the layers of the config": _left_out(policy, info["unexpected_keys"]),
    }
    said = [f"{problem} {_some(names)}" for problem, names in wrong.items() if names]
    if said:
        raise ConfigError(
            f"`model` must hold the weights that its config.json describes, {model!r} "
            f"{'; it '.join(said)}. Way out: a complete checkpoint of this architecture, "
            "or the config.json that belongs to these weights."
        )
    head, embedding = policy.get_output_embeddings(), policy.get_input_embeddings()
    tied = getattr(policy.config, "tie_word_embeddings", False) and isinstance(head, nn.Linear)
    if tied and head.weight is not embedding.weight:
        raise ConfigError(
            "`model` must have one weight for embedding and head (`tie_word_embeddings` in "
            f"config.json), {model!r} holds two that differ. Way out: set `tie_word_embeddings` to "
            "false there."
        )


def _left_out(policy: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Weights of the language model itself; a value head, say, does no harm."""
    trunk = policy.base_model
    head = next((n for n, m in policy.named_modules() if m is policy.get_output_embeddings()), "")
    parts = (name for name, _ in trunk.named_children())
    ours = {policy.base_model_prefix, head.partition(".")[0], *parts}
    names = (name for name in unexpected if not _OLD_BUFFERS.search(name))
    return sorted(name for name in names if name.partition(".")[0] in ours)


def _some(names: list[str], most: int = 3) -> str:
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


@contextmanager
def without_bars() -> Iterator[None]:
    """Reading and writing are quick or happen on every rank: a bar for each says nothing."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _read_config(model: str, options: Mapping[str, Any]) -> Any:
    kwargs = {k: v for k, v in options.items() if k not in ("attn_implementation", "config")}
    return AutoConfig.from_pretrained(model, **kwargs)


def _meta(model: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    config = _read_config(model, options)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=options["attn_implementation"]
        )
    assert isinstance(policy, PreTrainedModel)
    return policy


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, StrictDataclassError):  # which field of a config, and then why
        text = " ".join(text.split())
    text = text.split("\n", 1)[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def materialize_from_folder(
    model: PreTrainedModel,
    folder: str,
    *,
    device: torch.device | str = "cpu",
    model_kwargs: dict[str, Any] | None = None,
    adapt: Callable[[PreTrainedModel], None] | None = None,
) -> None:
    """Fills a meta model (after `fully_shard`, if it is sharded) with a checkpoint's values.

    With several ranks it is a collective: rank 0 reads, the others receive their shards.

    Args:
        model: Built by `load_policy(..., meta=True)`.
        folder: Hub id or folder of the checkpoint.
        device: Where this rank computes.
        model_kwargs: As `load_policy` had them (`revision`, ...).
        adapt: What was done to the model after it was built (`LoRA.add_to`); new parameters get
            their first values so.

    Raises:
        ConfigError: The checkpoint lacks a parameter; on every rank.
    """
    model.to_empty(device=device)
    model.tie_weights()
    many = distributed.is_initialized() and distributed.get_world_size() > 1
    source: PreTrainedModel | None = None
    failed: Exception | None = None
    if not many or distributed.get_rank() == 0:
        try:
            source = _read(model, folder, model_kwargs, adapt)
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            failed = error
    _raise_everywhere(failed, many)
    values = {} if source is None else source.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=many, strict=False)
    set_model_state_dict(model, values, options=options)
    for name, buffer in _unsaved_buffers(model).items():
        if source is not None:
            buffer.copy_(source.get_buffer(name))
        if many:
            distributed.broadcast(buffer, src=0)


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that follow from the config, and that no checkpoint holds."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }


def _raise_everywhere(failed: Exception | None, many: bool) -> None:
    """Raise rank 0's error on every rank: the others would wait for values that never come."""
    box = [None if failed is None else str(failed) or repr(failed)]
    if many:
        distributed.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    if box[0] is not None:
        raise ConfigError(box[0])


def _read(
    model: PreTrainedModel,
    folder: str,
    model_kwargs: dict[str, Any] | None,
    adapt: Callable[[PreTrainedModel], None] | None,
) -> PreTrainedModel:
    source = load_policy(folder, dtype=model.dtype, model_kwargs=model_kwargs)
    if adapt is not None:
        adapt(source)
    wanted, there = ({*each.state_dict(), *_unsaved_buffers(each)} for each in (model, source))
    missing = sorted(wanted - there)
    if missing:
        raise ConfigError(
            f"`model` must hold every parameter, {folder!r} lacks {missing[0]} and "
            f"{len(missing) - 1} more. Way out: a complete checkpoint of the same architecture."
        )
    return source


def export_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes weights, config and tokenizer; the folder is there whole or not at all.

    Names and layouts are those of the architecture's checkpoints, as servers read them.

    Everything is written beside it first and then renamed; a folder that was there before is
    replaced. The config written names no attention implementation and turns the KV cache on.

    Args:
        model: The model of transformers (not the wrapper around it).
        tokenizer: Written along, if given.
        folder: Where to.
        state_dict: Full tensors under the model's own names, where its parameters are not those
            (sharded, or with an adapter beside them). Buffers are the model's own.

    Returns:
        The folder.
    """
    target = Path(folder).expanduser().absolute()
    with whole_folder(target) as written:
        _write(model, tokenizer, written, state_dict)
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, beside `target`, whose place it takes if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield written
        written.chmod(0o777 & ~_umask())
        _put_in_place(written, target)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    use_cache = model.config.use_cache
    model.config.use_cache = True
    try:
        values = None if state_dict is None else {**_kept_buffers(model), **state_dict}
        with without_bars(), named_by_architecture(model):
            model.save_pretrained(folder, state_dict=values)
    finally:
        model.config.use_cache = use_cache
    _say_interval(folder / "config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _say_interval(file: Path) -> None:
    """Say which layers attend as SGLang (0.5.19) reads it, beside transformers' own list.

    Checkpoints of Qwen3-Next and Qwen3.5 say it by a number, which transformers reads and drops.
    """
    config = json.loads(file.read_text())
    kinds = config.get("layer_types") or []
    if not config["model_type"].startswith(_SPACED) or "full_attention" not in kinds:
        return
    interval = kinds.index("full_attention") + 1
    if kinds == [kinds[i % interval] for i in range(len(kinds))]:
        config.setdefault("full_attention_interval", interval)
        file.write_text(json.dumps(config, indent=2) + "\n")


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds beside parameters: the bias that balances experts, for one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {n: value for n, value in model.state_dict().items() if n not in parameters}


def _put_in_place(written: Path, target: Path) -> None:
    if not target.exists():
        written.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        written.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
