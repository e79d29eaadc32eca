"""What `doctor` looks at of a run that was built and not started."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
from lightning.pytorch.accelerators import CPUAccelerator

from lightning_grpo.cli.machine import Check, CheckResult, disk
from lightning_grpo.cli.trainer_cli import GRPOCLI
from lightning_grpo.contract import check_trainer
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import RewardError, printable
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.size import model_size
from lightning_grpo.rollout.scoring import Reward, RewardScorer, RewardValue, reward_name
from lightning_grpo.rollout.workflow import RolloutWorkflow
from lightning_grpo.servers.base import RunningServers, Servers, free_ports
from lightning_grpo.servers.sglang import SGLangServers, examine_python, resolve_python
from lightning_grpo.serving.client import ServerClient, new_session
from lightning_grpo.serving.wire import GenerateRequest
from lightning_grpo.session.material import Material, load_config, open_material
from lightning_grpo.strategies.checkpoints import (
    reading,
    require_same_model,
    saved_shapes,
    shapes,
)
from lightning_grpo.types import Prompt

_SHOWN = 160
_TRY_REWARD = (
    "what is right isn't known (no column `answer`): call it on a right answer in a test of its "
    "own, as `lightning-grpo init` makes one"
)
_SAME_FOR_RIGHT = "the first answer tried is the row's own `answer`: it should be worth more"
_TOO_LATE = (
    "make it faster, or raise `data.limits.reward_timeout_s`; a group without a reward is sampled "
    "again"
)
_POLICY = "policy.model."
"""What the names of a policy's parameters begin with in a checkpoint."""
_WEIGHTS = ("*.safetensors", "*.bin")
_CHECKPOINTS, _CHECKPOINT_BYTES = 2, 12
"""Of a parameter: fp32 weights and both moments of AdamW."""


def run_checks(run: GRPOCLI, root: Path, scratch: Path, start: bool) -> Iterator[tuple[str, Check]]:
    """Name and check, in the order in which a run would fail.

    Args:
        run: What was built.
        root: Where the run would write.
        scratch: A folder to write to meanwhile.
        start: Whether to start the servers.
    """
    module: GRPOModule = run.model
    data: RolloutDataModule = run.datamodule
    opened: list[Material] = []
    yield "trainer", lambda: trainer_settings(run.trainer, data)
    yield "model", lambda: model(module, root)
    ckpt_path = run.config["fit"].ckpt_path
    if ckpt_path is not None and Path(ckpt_path).exists():
        yield "checkpoint", lambda: checkpoint(module, ckpt_path)
    yield "prompts", lambda: prompts(module, data, scratch, opened)
    for material in opened:  # none where the prompts have failed
        yield (
            "reward",
            functools.partial(reward, material, data.workflow, data.limits.reward_timeout_s),
        )
    yield "servers", lambda: servers(data.servers)
    if start:
        yield "start", lambda: one_token(module.model_path, data.servers, scratch)


def trainer_settings(trainer: Any, data: RolloutDataModule) -> Iterator[CheckResult]:
    """Trainer settings that can't work with rollouts, or with this machine."""
    check_trainer(trainer)
    strategy, ranks = type(trainer.strategy).__name__, trainer.world_size
    data.check_ranks(ranks)
    found = f"{strategy}, {ranks} rank{'' if ranks == 1 else 's'}"
    here, cores = ranks // trainer.num_nodes, len(os.sched_getaffinity(0))
    if isinstance(trainer.accelerator, CPUAccelerator) and here > cores:
        yield CheckResult(
            "trainer", "warning", f"{found}, and {cores} CPU cores here",
            f"set trainer.devices to {cores} at most: one core a rank",
        )  # fmt: skip
    else:
        yield CheckResult("trainer", "ok", found)


def model(module: GRPOModule, root: Path) -> Iterator[CheckResult]:
    """Whether this model can be trained, by its config alone; its weights; room to save it."""
    module.check_model()
    size = model_size(load_config(module.model_path))
    about = f"{size.parameters / 1e6:,.1f}M parameters" if size is not None else "readable"
    yield CheckResult("model", "ok", f"{module.model_path}: {about}")
    folder = Path(module.model_path).expanduser()
    if folder.is_dir() and not any(f for kind in _WEIGHTS for f in folder.glob(kind)):
        yield CheckResult(
            "model", "failure", f"{folder} has no weights (*.safetensors)",
            "download the whole model, or save it with `save_pretrained`",
        )  # fmt: skip
    saved = _CHECKPOINTS * _CHECKPOINT_BYTES * size.parameters if size is not None else 0
    yield from disk(root, max(1.0, saved / 1e9))


def checkpoint(module: GRPOModule, path: str) -> Iterator[CheckResult]:
    """Whether a checkpoint is one of this model, by the shapes of its parameters."""
    with reading(path):
        saved = saved_shapes(path)
    builds_itself = type(module).build_policy is not GRPOModule.build_policy
    if module.lora is None and not builds_itself:
        built = load_policy(module.model_path, meta=True)
        own = {f"{_POLICY}{name}": shape for name, shape in shapes(built.state_dict()).items()}
        require_same_model({n: s for n, s in saved.items() if n.startswith(_POLICY)}, own)
    yield CheckResult("checkpoint", "ok", f"{path}: {len(saved)} tensors")


def prompts(
    module: GRPOModule, data: RolloutDataModule, scratch: Path, opened: list[Material]
) -> Iterator[CheckResult]:
    """Whether the prompts can be read and rendered; shows the end of the first."""
    data.run_dir = scratch
    material = open_material(data.settings_for(module.model_path, module.router_replay))
    opened.append(material)
    held_out = sum(map(len, material.val_prompts.values()))
    yield CheckResult("prompts", "ok", f"{material.num_prompts:,}, and {held_out:,} held out")
    first = next(iter(material.first_prompts.values()))
    said = printable(first.text[-_SHOWN:].replace("\n", "\\n"))
    yield CheckResult("prompts", "ok", f"the first ends: {said}")
    if material.tokenizer.chat_template is None:
        yield CheckResult(
            "template", "warning", f"{module.model_path} has no chat template: it continues text",
            "take the chat model (-Instruct) for questions and answers",
        )  # fmt: skip
    if not material.end_ids:
        yield CheckResult(
            "template", "warning", "the model has no end token: answers end by length alone",
            "set `eos_token` of the tokenizer, or `sampling.stop`",
        )  # fmt: skip


def reward(
    material: Material, workflow: RolloutWorkflow, timeout_s: float
) -> Iterator[CheckResult]:
    """Each reward, with the row's own answer where there is one, and with an empty one."""
    for name, prompt in material.first_prompts.items():
        own = workflow.of(name)
        tried, failed = anyio.run(_tried, own, prompt, timeout_s)
        if failed:
            yield CheckResult("reward", "warning", failed, _TOO_LATE)
        elif not tried:
            yield CheckResult("reward", "ok", f"{type(own).__name__} scores by itself: not tried")
        for called, given, empty in tried:
            found = f"{called} gives {given} to the first answer tried and {empty} to an empty one"
            if given == empty:
                known = "answer" in prompt.columns
                way_out = _SAME_FOR_RIGHT if known else _TRY_REWARD
                yield CheckResult("reward", "warning", found, way_out)
            else:
                yield CheckResult("reward", "ok", found)


async def _tried(
    workflow: RolloutWorkflow, prompt: Prompt, timeout_s: float
) -> tuple[list[tuple[str, Any, Any]], str]:
    """Of each reward its name, and what it gave to an answer of the data's and to none.

    Also why one gave nothing, which may be another thing in the run (its time, what it calls).
    """
    values: list[tuple[str, Any, Any]] = []
    failed = ""
    async with RewardScorer(workflow.reward_functions, 1, timeout_s) as scorer:

        async def score(reward: Reward, arguments: Mapping[str, Any]) -> RewardValue:
            nonlocal failed
            try:
                given = await scorer.score(reward, arguments)
            except RewardError as error:
                failed = str(error)
                raise
            nothing = {"completion": "", "completion_ids": ()}
            empty = {name: nothing.get(name, value) for name, value in arguments.items()}
            values.append((reward_name(reward), given, await scorer.score(reward, empty)))
            return given

        await workflow.try_rewards(prompt, score)
    return values, "" if values else failed


def servers(chosen: Servers) -> Iterator[CheckResult]:
    """Whether servers could be started, or answer already."""
    if isinstance(chosen, RunningServers):
        quick = RunningServers(chosen.urls, min(chosen.connect_timeout_s, 5.0), chosen.api_key)
        for handle in quick.start("", Path()):
            yield CheckResult("servers", "ok", f"{handle.url} answers")
    elif isinstance(chosen, SGLangServers):
        installed = resolve_python(chosen.python)
        found = examine_python(Path(installed.python), installed.device)
        free_ports(1, chosen.port_range)
        yield CheckResult("servers", "ok", f"SGLang {found.sglang} in {found.python}")
    else:
        yield CheckResult("servers", "ok", chosen.describe() or type(chosen).__name__)


def one_token(model_path: str, chosen: Servers, folder: Path) -> Iterator[CheckResult]:
    """Start the servers and have each sample one token."""
    began = time.monotonic()
    try:
        for handle in chosen.start(model_path, folder):
            ids = anyio.run(_sampled, handle.url, chosen.api_key)
            seconds = time.monotonic() - began
            yield CheckResult("start", "ok", f"{handle.url} sampled {ids} after {seconds:.0f} s")
    finally:
        chosen.stop()


async def _sampled(url: str, api_key: str | None) -> list[int]:
    async with new_session(api_key) as session:
        request = GenerateRequest([1, 1], {"max_new_tokens": 1}, return_logprob=False)
        return list((await ServerClient(url, session).generate(request)).output_ids)
