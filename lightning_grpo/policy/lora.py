"""LoRA adapters, and the weights that they come to."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_grpo.errors import ConfigError, require_number
from lightning_grpo.policy.load import whole_folder

_ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """A low-rank update B A * alpha / rank for each adapted weight (arXiv 2106.09685).

    The model's own weights stay as they are and B begins at 0, so training begins at the model.
    Without dropout: two passes over a token must give the same logprob. A small update counts in
    bf16, too: it is rounded along with the layer's own product, and by chance where it is merged
    for the servers. Needs the extra `lora`.

    Args:
        rank: Rows of A, columns of B.
        alpha: Scale of the update; with alpha = rank it is B A itself.
        targets: Which linear layers, by the last part of their names (`q_proj`); None is all but
            the head. A model with fused experts needs them named: the experts can't be adapted.
    """

    rank: int = 32
    alpha: int = 32
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            require_number(
                f"lora.{name}", value, least=1, most=65536, whole=True, way_out="The usual is 32."
            )
        if self.targets is not None and not self.targets:
            raise ConfigError("`lora.targets` must name a layer, got none. Leave it out for all.")
        if importlib.util.find_spec("peft") is None:
            raise ConfigError(
                "`lora` needs PEFT, which is not installed. "
                "Way out: pip install 'lightning-grpo[lora]'."
            )

    def add_to(self, model: PreTrainedModel) -> None:
        """Puts the adapter into `model`, in place; nothing else of it is trained from then on.

        Raises:
            ConfigError: `targets` names no layer, or one that can't be adapted.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import ParamWrapper

        from lightning_grpo.policy.adapted import AdaptedLinear

        layers = _linear_layers(model)
        self._check_targets(model, {name.rpartition(".")[2] for name in layers})
        self._check_own_weights(model, layers)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules="all-linear" if self.targets is None else list(self.targets),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        )
        config._register_custom_module({nn.Linear: AdaptedLinear, Conv1D: AdaptedLinear})
        with warnings.catch_warnings():
            # Of patterns that PEFT makes itself for what is refused below.
            warnings.filterwarnings("ignore", message="The following .*_pattern keys")
            try:
                inject_adapter_in_model(config, model, _ADAPTER)
            except ValueError as error:  # PEFT's own rules for layers that transformers has fused
                raise ConfigError(
                    f"`lora.targets` must name layers of {type(model).__name__} that PEFT can "
                    f"adapt, got {', '.join(self.targets or ('all',))}: {error} Name layers of the "
                    "attention alone."
                ) from error
        # PEFT takes the names of a mixture's layers, as they once were, for its fused experts.
        if any(isinstance(module, ParamWrapper) for module in model.modules()):
            raise ConfigError(
                f"`lora.targets` must leave out the experts of {type(model).__name__} (servers "
                f"would not get what adapts them), got {', '.join(self.targets or ())}. Name "
                "layers of the attention alone."
            )
        _check_plain(model)

    def _check_own_weights(self, model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
        names: dict[int, list[str]] = {}
        for name, layer in layers.items():
            if self.targets is None or name.rpartition(".")[2] in self.targets:
                names.setdefault(id(layer.weight), []).append(name)
        shared = [found for found in names.values() if len(found) > 1]
        if shared:
            raise ConfigError(
                f"`lora.targets` must name layers with weights of their own, {shared[0][0]} and "
                f"{shared[0][1]} of {type(model).__name__} have the same (servers hold them once, "
                "and each would be adapted by itself). Name other layers, or train without `lora`."
            )

    def _check_targets(self, model: PreTrainedModel, known: set[str]) -> None:
        name, listed = type(model).__name__, ", ".join(sorted(known))
        if not known:
            raise ConfigError(f"`lora` needs linear layers, {name} has none. Train it without.")
        if self.targets is None and _has_fused_experts(model):
            raise ConfigError(
                f"`lora.targets` must name layers of {name}, whose experts are one tensor for all "
                f"and can't be adapted (servers would not get what adapts them). It has {listed}; "
                "those of the attention are the usual choice."
            )
        unknown = sorted(set(self.targets or ()) - known)
        if unknown:
            raise ConfigError(
                f"`lora.targets` must name linear layers of the model (not the embedding or the "
                f"head), got {', '.join(unknown)}. It has {listed}."
            )


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By their names; GPT-2's are transformers' Conv1D, whose weight is transposed."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def _check_plain(model: PreTrainedModel) -> None:
    """Refuse adapted layers whose forward is more than a product: it would be left out."""
    from lightning_grpo.policy.adapted import AdaptedLinear

    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        base = layer.get_base_layer()
        if type(base).forward not in (nn.Linear.forward, Conv1D.forward):
            raise ConfigError(
                f"`lora.targets` must leave out {name.rpartition('.')[2]} of "
                f"{type(model).__name__} ({type(base).__name__}, which computes more than a "
                "product). Name the other layers."
            )


def _has_fused_experts(model: PreTrainedModel) -> bool:
    stacked = 3  # experts, rows, columns
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    return any(p.ndim >= stacked and id(p) not in kernels for p in model.parameters())


class WithoutAdapter(nn.Module):
    """A policy with its adapter switched off: the model that training began with.

    It shares all weights with the policy, so a reference costs a pass and no memory.

    Args:
        policy: A `PackedPolicy` whose model has an adapter.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See `PackedPolicy`."""
        with _switched_off(self.policy):
            return self.policy(*args, **kwargs)


@contextmanager
def _switched_off(policy: nn.Module) -> Iterator[None]:
    """PEFT's own switch freezes the adapter too, which sharded parameters would not forget."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.set_scale(_ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_ADAPTER, 1.0)


def export_adapter(model: PreTrainedModel, base: str, folder: str | Path) -> Path:
    """Writes the adapter alone, as PEFT's `PeftModel.from_pretrained(base_model, folder)` reads it.

    Args:
        model: With an adapter.
        base: Hub id or folder of the model that it belongs to.
        folder: Where to; it is there whole or not at all.
    """
    from peft import PeftConfig, get_peft_model_state_dict

    configs: dict[str, PeftConfig] = model.peft_config  # type: ignore[assignment]
    configs[_ADAPTER].base_model_name_or_path = base
    values = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    tensors = {f"base_model.model.{name}": value for name, value in values.items()}
    target = Path(folder).expanduser().absolute()
    with whole_folder(target) as written:
        save_file(tensors, written / "adapter_model.safetensors", metadata={"format": "pt"})
        configs[_ADAPTER].save_pretrained(str(written))
    return target
