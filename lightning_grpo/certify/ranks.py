"""One step of the real Trainer on one rank, and on two: plain data parallelism, and shards.

The ranks are processes of this machine over gloo. They take the step from the same recorded rollout
batch, so that all that differs is how it is shared out and put together again.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, distributed, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from typing_extensions import Protocol, override

from lightning_grpo.certify.tiny import (
    AllInFp64,
    difference,
    gradients_apart,
    plain_logprobs,
    policy_logprobs,
    random_ids,
    rows_of,
    tiny_model,
)
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.load import load_policy, without_bars
from lightning_grpo.rollout.records import write_groups
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy, reshard
from lightning_grpo.types import NO_VERSION, Group, Prompt, Trajectory

NUM_RANKS = 2
STRATEGIES = ("ddp", "fsdp2")
_HOST = "127.0.0.1"
_WHOLE, _PART = 10**6, 60
"""Tokens of a micro-batch: on one rank all are in one, on two in several, not as many on each."""
_RATE = 0.1
_PATIENCE = timedelta(minutes=2)
"""How long a rank waits for the other one."""


class ShardsInFp64(FSDP2Strategy):
    """FSDP2Strategy, computing and reducing in fp64: what is left is no rounding."""

    @override
    def dtype_on(self, device_type: str) -> str:
        return "float64"


def strategy_of(name: str) -> Any:
    """What the Trainer is given as its strategy on several ranks."""
    return ShardsInFp64(reduce_dtype="float64") if name == "fsdp2" else name  # type: ignore[arg-type]


class Parts(Protocol):
    """What is shared out over ranks and put together again; it is sent to them."""

    @property
    def policy(self) -> Callable[..., nn.Module]:
        """A model of transformers to the policy that trains."""

    @property
    def publish(self) -> Callable[[nn.Module], Mapping[str, Tensor]]:
        """A policy to the tensors that servers get, by name; a collective."""

    @property
    def strategy(self) -> Callable[[str], Any]:
        """One of `STRATEGIES` to what `Trainer(strategy=)` takes."""


def differences(config: Any, parts: Parts) -> list[tuple[float, str]]:
    """How far a step on two ranks is from that on one, and in what; in fp64.

    Args:
        config: Of a tiny model.
        parts: What is tried; it is sent to the ranks.

    Returns:
        A difference and where it is, for the loss, the gradient (relative to each parameter's own),
        the logprobs and the published weights after the step, under each strategy.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    store = TCPStore(_HOST, 0, None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        _write(config, Path(folder))
        with ProcessPoolExecutor(NUM_RANKS, context, _end_with_parent) as pool:
            ranks = [
                pool.submit(_run, rank, store.port, config, parts, folder)
                for rank in range(NUM_RANKS)
            ]
            for done in wait(ranks, return_when=FIRST_EXCEPTION).done:
                done.result()  # the first error: what the other rank says follows from it
            return ranks[0].result()


# -- what the ranks train on -----------------------------------------------------------------------

_GROUPS = ((21, (5, 14, 30)), (3, (2, 40)), (9, (1, 33, 6)), (12, (17, 8)))
"""Length of a prompt, and of each answer to it."""


def _write(config: Any, folder: Path) -> None:
    """The model, and a rollout batch of answers that it might have sampled a step before."""
    model = tiny_model(config)
    with without_bars():
        model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(11)
    groups = []
    for row, (length, answers) in enumerate(_GROUPS):
        ids = random_ids(length, generator)
        rows = [torch.cat([ids, random_ids(n, generator)]) for n in answers]
        with torch.no_grad():
            logprobs = plain_logprobs(model, rows)
        logprobs += torch.randn(logprobs.shape, generator=generator) / 10
        given = logprobs.split([len(each) for each in rows])
        members = [
            _trajectory(each, length, said, reward=float((row + k) % 2))
            for k, (each, said) in enumerate(zip(rows, given, strict=True))
        ]
        groups.append(Group(Prompt(tuple(ids.tolist()), "", row=row), tuple(members), 0))
    write_groups(folder / "batches" / "step_000000.parquet", groups, step=0, version=0)


def _trajectory(ids: Tensor, prompt: int, logprobs: Tensor, reward: float) -> Trajectory:
    answer = len(ids) - prompt
    return Trajectory(
        input_ids=tuple(ids.tolist()),
        response_mask=(False,) * prompt + (True,) * answer,
        logprobs=(0.0,) * prompt + tuple(logprobs[prompt:].tolist()),
        versions=(NO_VERSION,) * prompt + (0,) * answer,
        reward=reward,
        rewards={"score": reward},
        text="",
        truncated=False,
    )


# -- on a rank -------------------------------------------------------------------------------------


@dataclass
class _Step:
    """What one step computed."""

    loss: Tensor
    gradients: dict[str, Tensor]
    logprobs: Tensor
    published: dict[str, Tensor]


class _Trained(GRPOModule):
    """Computes in fp64, and keeps its gradient."""

    def __init__(self, folder: Path, max_tokens: int, parts: Parts) -> None:
        super().__init__(
            str(folder / "model"),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=_RATE),
            max_tokens_per_microbatch=max_tokens,
        )
        self.parts, self.gradients = parts, dict[str, Tensor]()

    @override
    def build_policy(self) -> PreTrainedModel:
        on_meta = torch.get_default_device().type == "meta"
        model = load_policy(self.model_path, dtype=torch.float64, meta=on_meta)
        model.set_experts_implementation("eager")  # there is no kernel for others
        return model.double()  # also what is fp32 by its own word

    @override
    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = self.parts.policy(self.build_policy())  # type: ignore[assignment]

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for name, parameter in self.sharding_root().named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
            self.gradients[name] = whole.detach()


class _Pair(LightningEnvironment):
    """Says which of the ranks this process is; the process group is there already."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.set_world_size(NUM_RANKS)
        self.set_global_rank(rank)
        self._rank = rank

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @override
    def local_rank(self) -> int:
        return self._rank


def _run(rank: int, port: int, config: Any, parts: Parts, folder: str) -> list[tuple[float, str]]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    nowhere = io.StringIO()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        return _steps(rank, port, config, parts, Path(folder))


def _steps(
    rank: int, port: int, config: Any, parts: Parts, folder: Path
) -> list[tuple[float, str]]:
    alone = _step(config, parts, folder) if rank == 0 else None
    store = TCPStore(_HOST, port, None, is_master=False, timeout=_PATIENCE)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=_PATIENCE
    )
    found = []
    for name in STRATEGIES:
        step = _step(config, parts, folder, name, rank)
        if alone is not None:
            found += [(figure, f"{what} under {name}") for figure, what in _compare(step, alone)]
    distributed.destroy_process_group()
    return found


def _step(config: Any, parts: Parts, folder: Path, strategy: str = "", rank: int = 0) -> _Step:
    shared = bool(strategy)
    module = _Trained(folder, _PART if shared else _WHOLE, parts)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=NUM_RANKS if shared else 1,
        strategy=parts.strategy(strategy) if shared else "auto",
        plugins=[_Pair(rank)] if shared else None,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder / "run"),
    )
    with AllInFp64():
        trainer.fit(module, ReplayDataModule(str(folder / "batches")))
        policy = module.sharding_root()
        logprobs = policy_logprobs(policy, rows_of(config))
        reshard(policy)
        published = {name: tensor.clone() for name, tensor in parts.publish(policy).items()}
    return _Step(trainer.callback_metrics["policy/loss"], module.gradients, logprobs, published)


def _compare(step: _Step, alone: _Step) -> list[tuple[float, str]]:
    figure, worst = gradients_apart(step.gradients, alone.gradients)
    found = [
        (difference(step.loss, alone.loss), "the loss"),
        (figure, f"the gradient of {worst}"),
        (difference(step.logprobs, alone.logprobs), "logprobs after the step"),
    ]
    if step.published.keys() != alone.published.keys():
        found.append((math.inf, "the names of what servers get"))
        return found
    for name, tensor in step.published.items():
        found.append((difference(tensor, alone.published[name]), f"what servers get of {name}"))
    return found


def _end_with_parent() -> None:
    """A process of a pool would wait for the next task of a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
