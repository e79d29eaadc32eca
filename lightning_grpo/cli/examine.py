"""What `doctor` looks at of a run that was built and not started."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio

from lightning_grpo.cli.machine import Check, CheckResult, disk
from lightning_grpo.cli.trainer_cli import GRPOCLI
from lightning_grpo.contract import check_trainer
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import printable
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.size import model_size
from lightning_grpo.rollout.scoring import Reward, RewardScorer, RewardValue, reward_name
from lightning_grpo.rollout.workflow import RolloutWorkflow
from lightning_grpo.servers.base import RunningServers, Servers, free_ports
from lightning_grpo.servers.sglang import SGLangServers, examine_python, resolve_python
from lightning_grpo.serving.client import GenerateRequest, ServerClient, new_session
from lightning_grpo.session.material import Material, load_config, open_material
from lightning_grpo.types import Prompt

_SHOWN = 160
_TRY_REWARD = (
    "what is right isn't known (no column `answer`): call it on a right answer in a test of its "
    "own, as `lightning-grpo init` makes one"
)
_SAME_FOR_RIGHT = "the first answer tried is the row's own `answer`: it should be worth more"
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
    yield "trainer", lambda: trainer_settings(run.trainer)
    yield "model", lambda: model(module, root)
    yield "prompts", lambda: prompts(module, data, scratch, opened)
    for material in opened:  # none where the prompts have failed
        yield "reward", functools.partial(reward, material, data.workflow)
    yield "servers", lambda: servers(data.servers)
    if start:
        yield "start", lambda: one_token(module.model_path, data.servers, scratch)


def trainer_settings(trainer: Any) -> Iterator[CheckResult]:
    """Trainer settings that can't work with rollouts."""
    check_trainer(trainer)
    strategy, ranks = type(trainer.strategy).__name__, trainer.world_size
    yield CheckResult("trainer", "ok", f"{strategy}, {ranks} rank{'' if ranks == 1 else 's'}")


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


def reward(material: Material, workflow: RolloutWorkflow) -> Iterator[CheckResult]:
    """Each reward, with the row's own answer where there is one, and with an empty one."""
    for name, prompt in material.first_prompts.items():
        own = workflow.of(name)
        tried = anyio.run(_tried, own, prompt)
        if not tried:
            yield CheckResult("reward", "ok", f"{type(own).__name__} scores by itself: not tried")
        for called, given, empty in tried:
            found = f"{called} gives {given} to the first answer tried and {empty} to an empty one"
            if given == empty:
                known = "answer" in prompt.columns
                way_out = _SAME_FOR_RIGHT if known else _TRY_REWARD
                yield CheckResult("reward", "warning", found, way_out)
            else:
                yield CheckResult("reward", "ok", found)


async def _tried(workflow: RolloutWorkflow, prompt: Prompt) -> list[tuple[str, Any, Any]]:
    """Of each reward its name, and what it gave to an answer of the data's and to none."""
    values: list[tuple[str, Any, Any]] = []
    async with RewardScorer(workflow.reward_functions, processes=1) as scorer:

        async def score(reward: Reward, arguments: Mapping[str, Any]) -> RewardValue:
            given = await scorer.score(reward, arguments)
            nothing = {"completion": "", "completion_ids": ()}
            empty = {name: nothing.get(name, value) for name, value in arguments.items()}
            values.append((reward_name(reward), given, await scorer.score(reward, empty)))
            return given

        await workflow.try_rewards(prompt, score)
    return values


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
