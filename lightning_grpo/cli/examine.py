"""What `doctor` looks at of a run that was built and not started."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio

from lightning_grpo.cli.machine import Check, Finding, disk
from lightning_grpo.contract import check_trainer
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import printable
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.check import model_size
from lightning_grpo.rollout.scoring import BoundReward, RewardScorer
from lightning_grpo.rollout.workflow import RLVRWorkflow, RolloutWorkflow
from lightning_grpo.servers.base import RunningServers, Servers, free_ports
from lightning_grpo.servers.sglang import SGLangServers, examine_python, resolve_python
from lightning_grpo.serving.client import GenerateRequest, ServerClient, new_session
from lightning_grpo.session.material import Material, load_config, open_material
from lightning_grpo.types import Prompt

_SHOWN = 160
_CHECKPOINT_BYTES = 12
"""Of a parameter: fp32 weights and both moments of AdamW."""


def run_checks(run: Any, root: Path, scratch: Path, start: bool) -> Iterator[tuple[str, Check]]:
    """Name and check, in the order in which a run would fail.

    Args:
        run: Has `trainer`, `model` and `datamodule`.
        root: Where the run would write.
        scratch: A folder to write to meanwhile.
        start: Whether to start the servers.
    """
    module: GRPOModule = run.model
    data: RolloutDataModule = run.datamodule
    opened: list[Material] = []
    yield "trainer", lambda: trainer_settings(run.trainer)
    yield "disk", lambda: disk_for(module.model_path, root)
    yield "model", lambda: model(module)
    yield "prompts", lambda: prompts(module, data, scratch, opened)
    for material in opened:
        yield "reward", functools.partial(reward, material, data.workflow)
    yield "servers", lambda: servers(data.servers)
    if start:
        yield "start", lambda: one_token(module.model_path, data.servers, scratch)


def trainer_settings(trainer: Any) -> Iterator[Finding]:
    """Trainer settings that can't work with rollouts."""
    check_trainer(trainer)
    yield Finding("trainer", "ok", f"{type(trainer.strategy).__name__}, {trainer.world_size} ranks")


def disk_for(model_path: str, root: Path) -> Iterator[Finding]:
    """Room for two checkpoints of this model."""
    size = model_size(load_config(model_path))
    parameters = size.parameters if size is not None else 0
    yield from disk(root, max(1.0, 2 * _CHECKPOINT_BYTES * parameters / 1e9))


def model(module: GRPOModule) -> Iterator[Finding]:
    """Whether this model can be trained, by its config alone, and where its weights are."""
    module.check_model()
    folder = Path(module.model_path).expanduser()
    kinds = ("*.safetensors", "*.bin")
    weights = [file for kind in kinds for file in folder.glob(kind)] if folder.is_dir() else []
    size = model_size(load_config(module.model_path))
    about = f"{size.parameters / 1e6:,.1f}M parameters" if size is not None else "readable"
    if folder.is_dir() and not weights:
        yield Finding(
            "model", "failure", f"{folder} has no weights (*.safetensors)",
            "download the whole model, or save it with `save_pretrained`",
        )  # fmt: skip
    else:
        yield Finding("model", "ok", f"{module.model_path}: {about}")


def prompts(
    module: GRPOModule, data: RolloutDataModule, scratch: Path, opened: list[Material]
) -> Iterator[Finding]:
    """Whether the prompts can be read and rendered; shows the end of the first."""
    data.run_dir = scratch
    material = open_material(data.settings_for(module.model_path))
    opened.append(material)
    held_out = sum(map(len, material.val_prompts.values()))
    yield Finding("prompts", "ok", f"{material.num_prompts:,}, and {held_out:,} held out")
    first = next(iter(material.first_prompts.values()))
    said = printable(first.text[-_SHOWN:].replace("\n", "\\n"))
    yield Finding("prompts", "ok", f"the first ends: {said}")
    if material.tokenizer.chat_template is None:
        yield Finding(
            "template", "warning", f"{module.model_path} has no chat template: it continues text",
            "take the chat model (-Instruct) for questions and answers",
        )  # fmt: skip
    if not material.end_ids:
        yield Finding(
            "template", "warning", "the model has no end token: answers end by length alone",
            "set `eos_token` of the tokenizer, or `sampling.stop`",
        )  # fmt: skip


def reward(material: Material, workflow: RolloutWorkflow) -> Iterator[Finding]:
    """Each reward, with an answer that the data hold, if it names one, and with none."""
    for name, prompt in material.first_prompts.items():
        own = workflow.of(name)
        if not isinstance(own, RLVRWorkflow):
            yield Finding("reward", "ok", f"{type(own).__name__} scores by itself: not tried")
            continue
        for bound in own.rewards:
            yield anyio.run(_tried, bound, prompt)


async def _tried(bound: BoundReward, prompt: Prompt) -> Finding:
    right = [str(value) for name, value in prompt.columns.items() if name in ("answer", "solution")]
    values = []
    async with RewardScorer([bound.reward], processes=1, timeout_s=30.0) as scorer:
        for text in (*right, ""):
            values.append(await scorer.score(bound.reward, bound.arguments(prompt, text, ())))
    shown = ", ".join(str(value) for value in values)
    if right and values[0] == values[-1]:
        return Finding(
            "reward", "warning",
            f"{bound.name} gives {shown} to the row's own answer and to an empty one",
            "try it: lightning-grpo score --reward ... --data ...",
        )  # fmt: skip
    what = "the row's own answer and an empty one" if right else "an empty answer"
    return Finding("reward", "ok", f"{bound.name} gives {shown} to {what}")


def servers(chosen: Servers) -> Iterator[Finding]:
    """Whether servers could be started, or answer already."""
    if isinstance(chosen, RunningServers):
        quick = RunningServers(chosen.urls, min(chosen.connect_timeout_s, 5.0), chosen.api_key)
        for handle in quick.start("", Path()):
            yield Finding("servers", "ok", f"{handle.url} answers")
    elif isinstance(chosen, SGLangServers):
        installed = resolve_python(chosen.python)
        found = examine_python(Path(installed.python), installed.device)
        free_ports(1, chosen.port_range)
        yield Finding("servers", "ok", f"SGLang {found.sglang} in {found.python}")
    else:
        yield Finding("servers", "ok", chosen.describe() or type(chosen).__name__)


def one_token(model_path: str, chosen: Servers, folder: Path) -> Iterator[Finding]:
    """Start the servers and have each sample one token."""
    began = time.monotonic()
    try:
        for handle in chosen.start(model_path, folder):
            ids = anyio.run(_sampled, handle.url, chosen.api_key)
            seconds = time.monotonic() - began
            yield Finding("start", "ok", f"{handle.url} sampled {ids} after {seconds:.0f} s")
    finally:
        chosen.stop()


async def _sampled(url: str, api_key: str | None) -> list[int]:
    async with new_session(api_key) as session:
        request = GenerateRequest([1, 1], {"max_new_tokens": 1}, return_logprob=False)
        return list((await ServerClient(url, session).generate(request)).output_ids)
