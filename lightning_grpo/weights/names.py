"""Names of parameters as the Hugging Face checkpoint has them, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

WRAPPER_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What `torch.compile`, activation checkpointing and FSDP put into names, at any depth."""
ADAPTED_PART = "base_layer"
"""What PEFT puts into the names of a layer's own weights beside an adapter."""
ADAPTER_PARTS = ("lora_A", "lora_B")
"""The adapter's own parameters, which are no part of the checkpoint."""
TIED_HEAD = "lm_head.weight"


def checkpoint_name(name: str) -> str:
    """The name without the parts that wrappers put in."""
    left_out = (*WRAPPER_PARTS, ADAPTED_PART)
    return ".".join(part for part in name.split(".") if part not in left_out)


def pretrained_prefix(module: nn.Module) -> str:
    """Where the Hugging Face model sits inside `module`: `""`, `"model."`, `"policy.model."`, ...

    The outermost `PreTrainedModel`, since its own names are the checkpoint's. A module without one
    is taken as it is.
    """
    # Here, not above: transformers takes seconds to import, and plain modules don't need it.
    from transformers import PreTrainedModel

    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel):
            return f"{name}." if name else ""
    return ""


def ties_head(module: nn.Module) -> bool:
    """Whether the output layer is the embedding, so that the checkpoint holds it once."""
    from transformers import PreTrainedModel

    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            return bool(child.config.get_text_config().tie_word_embeddings)
    return False


def checkpoint_names(names: Iterable[str], prefix: str, *, tied: bool) -> dict[str, str]:
    """Maps each parameter's own name to its checkpoint name; tied weights appear once.

    Adapters are left out: `gather_weights` adds them to the weights that they belong to.

    Args:
        names: As `named_parameters` gives them.
        prefix: Where the Hugging Face model sits; what lies outside it is left out.
        tied: Leave the output layer out.
    """
    mapped: dict[str, str] = {}
    for name in names:
        if not name.startswith(prefix) or not set(ADAPTER_PARTS).isdisjoint(name.split(".")):
            continue
        target = checkpoint_name(name.removeprefix(prefix))
        if not (tied and target == TIED_HEAD):
            mapped[name] = target
    return mapped
