"""FSDP2Strategy: sharding, and when gradients are synchronized.

FSDP2Strategy: fully sharded data parallelism by torch's `fully_shard`, from Trainer(strategy=).

Importing this module registers the strategy as `fsdp2` (`grpo_fsdp2` should Lightning come to own
that name).
"""

from __future__ import annotations

import atexit
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import Protocol, override, runtime_checkable

from lightning_grpo._compat import no_split_modules
from lightning_grpo._compat_lightning import (
    destroy_dist_connection,
    optimizers_to_device,
    set_data_parallel_size,
)
from lightning_grpo.errors import CheckpointError, ConfigError, require_count, require_seconds
from lightning_grpo.policy.check import check_splittable
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.checkpoints import (
    METADATA,
    AtomicCheckpointIO,
    first_error,
    load_shards,
    read_plain,
    reading,
    remove,
    replace,
    require_checkpoint,
    require_same_model,
    saved_shapes,
    shapes,
)
from lightning_grpo.strategies.checkpoints import is_sharded as is_folder_of_shards
from lightning_grpo.strategies.working_copy import WorkingCopy, working_copies


@runtime_checkable
class KeepsParameters(Protocol):
    """A strategy that says whether full parameters are freed after the forward pass."""

    @property
    def reshard_after_forward(self) -> bool:
        """Free them between forward and backward."""


@contextmanager
def gradient_sync(module: L.LightningModule, enabled: bool) -> Iterator[None]:
    """Run one micro-batch's forward and backward with or without reducing gradients.

    The same call for every strategy: DDP's `no_sync`, FSDP2's flags, nothing on one device. The
    last micro-batch has it enabled; what earlier ones left in the gradients is reduced with it,
    also when its backward runs after the block (Lightning's own).

    Args:
        module: The LightningModule in training.
        enabled: Whether this backward pass reduces.
    """
    wrapped = module.trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        with nullcontext() if enabled else wrapped.no_sync():
            yield
        return
    sharded = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for copy in working_copies(module):
        copy.keeps = not enabled
    strategy = module.trainer.strategy
    keeps = isinstance(strategy, KeepsParameters) and not strategy.reshard_after_forward
    _set(sharded, enabled, keeps)
    try:
        yield
    finally:
        _set(sharded, True, keeps)


def _set(sharded: Sequence[FSDPModule], enabled: bool, keeps: bool) -> None:
    for each in sharded:
        each.set_requires_gradient_sync(enabled, recurse=False)
        each.set_is_last_backward(enabled)
        if keeps:
            # What stays gathered after the forward pass serves the step's later micro-batches too.
            each.set_reshard_after_backward(enabled, recurse=False)


MESH_DIMENSION = "data_parallel"
_DTYPES = {
    **{"bfloat16": torch.bfloat16, "float16": torch.float16},
    **{"float32": torch.float32, "float64": torch.float64},
}


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: list[str] | None = None,
    param_dtype: str = "auto",
    reduce_dtype: str = "float32",
    reshard_after_forward: bool | None = None,
    cpu_offload: bool = False,
    shard_size: int | None = None,
    sequence_parallel_size: int = 1,
) -> nn.Module:
    """Shard every decoder block, then the root, over the ranks of a mesh.

    All parameters must be used from inside `module.forward`. With Fabric:
    `ModelParallelStrategy(parallelize, data_parallel_size=N, tensor_parallel_size=1)`.

    Args:
        module: The root; its fp32 parameters stay the master weights.
        mesh: One dimension, or several of which one is named `data_parallel`.
        blocks: Class names of the blocks; None: what transformers declares; []: the root alone.
            Blocks that share parameters are left to the root.
        param_dtype: Of parameters in forward and backward; auto is float32 on CPUs, else bfloat16.
        reduce_dtype: Of the gradients' reduction over ranks.
        reshard_after_forward: Free a block's full parameters between forward and backward; None:
            where there are several ranks. The root keeps its own: backward begins with them.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory (GPUs only).
        shard_size: Ranks in a row that share one copy, most often those of a machine; the others
            have copies like it. None: all share one.
        sequence_parallel_size: Ranks in a row that compute each packed row together; they must be
            given the same rows.

    Returns:
        The same module.

    Raises:
        ConfigError: A block is not found, or a setting can't work on this device, or this model.
    """
    mesh = _data_parallel(mesh)
    _split_rows(module, mesh, sequence_parallel_size)
    mesh = _hybrid(mesh, shard_size)
    if cpu_offload and mesh.device_type == "cpu":
        raise ConfigError("`cpu_offload` needs a GPU to offload from. Leave it out on the CPU.")
    compute = _dtype("param_dtype", param_dtype, mesh.device_type)
    reduce = _dtype("reduce_dtype", reduce_dtype, mesh.device_type)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    if reshard_after_forward is None:
        reshard_after_forward = mesh.size() > 1
    # Float inputs are no activations, and are not rounded: temperatures, and the factors of RoPE
    # that some models, like servers, keep in fp32.
    policy = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for block in reversed(_find_blocks(module, blocks)):  # those inside of others first
        shard(block, reshard_after_forward=reshard_after_forward)
    shard(module, reshard_after_forward=False)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether it, or something inside, is sharded, or computes with a copy as on a single rank."""
    sharded = any(isinstance(each, FSDPModule) for each in module.modules())
    return sharded or bool(working_copies(module))


def reshard(module: nn.Module) -> None:
    """Give back the full parameters that the root keeps after a forward without backward.

    Until then its parameters are plain tensors, not shards: to be called before anything looks at
    `parameters()` (state dicts do it by themselves).
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def unshard(module: nn.Module) -> None:
    """On a single rank, make the parameters in the compute dtype at once: block by block is slower.

    On several nothing is done, since no rank need have room for all; blocks are gathered as they
    are run. `reshard` gives the parameters back.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule) and _num_ranks(each) == 1:
            each.unshard()


def _num_ranks(module: nn.Module) -> int:
    first = next(module.parameters())
    return first.device_mesh.size() if isinstance(first, DTensor) else 1


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim == 1:
        return mesh
    if MESH_DIMENSION not in (mesh.mesh_dim_names or ()):
        raise ConfigError(
            f"`mesh` must have a dimension {MESH_DIMENSION!r}, got {mesh.mesh_dim_names}."
        )
    return mesh[MESH_DIMENSION]


def _hybrid(mesh: DeviceMesh, shard_size: int | None) -> DeviceMesh:
    """Rows of ranks that share a copy (hybrid sharding, arXiv 2304.11277, section 3.2.2)."""
    if shard_size is None or shard_size == mesh.size():
        return mesh
    _require_even("shard_size", shard_size, mesh.size())
    rows = mesh.mesh.view(-1, shard_size)
    return DeviceMesh(mesh.device_type, rows, mesh_dim_names=("replicate", "shard"))


def _split_rows(module: nn.Module, mesh: DeviceMesh, row_ranks: int) -> None:
    """Have each policy inside compute its rows on so many ranks together; a collective."""
    if row_ranks == 1:
        return
    _require_even("sequence_parallel_size", row_ranks, mesh.size())
    rows = mesh.mesh.view(-1, row_ranks)
    group = DeviceMesh(mesh.device_type, rows, mesh_dim_names=("rows", "row")).get_group("row")
    for policy in (each for each in module.modules() if isinstance(each, PackedPolicy)):
        check_splittable(policy.model, row_ranks)
        policy.row_group = group


def row_ranks_of(strategy: object) -> int:
    """How many ranks compute each packed row together under a strategy, and count as one."""
    return strategy.sequence_parallel_size if isinstance(strategy, FSDP2Strategy) else 1


_WAYS_OUT = {
    "shard_size": "Most often it is the number of GPUs of a machine. None shards over all ranks.",
    "sequence_parallel_size": "1 gives each rank rows of its own; more are ranks of one machine.",
}


def _require_even(setting: str, ranks: int, num_ranks: int) -> None:
    """Refuse rows of ranks that would leave some over."""
    require_count(setting, ranks)
    if num_ranks % ranks:
        rule = f"must divide the number of ranks ({num_ranks})"
        raise ConfigError(setting, rule, ranks, _WAYS_OUT[setting])


def _dtype(parameter: str, name: str, device_type: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device_type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"`{parameter}` must be one of auto, {', '.join(_DTYPES)}, got {name!r}.")
    return _DTYPES[name]


def _find_blocks(module: nn.Module, blocks: list[str] | None) -> list[nn.Module]:
    wanted = no_split_modules(module) if blocks is None else set(blocks)
    found = [m for m in module.modules() if type(m).__name__ in wanted and m is not module]
    missing = wanted - {type(m).__name__ for m in found} if blocks is not None else set()
    if missing:
        present = sorted({type(m).__name__ for m in module.modules()})
        raise ConfigError(
            f"`blocks` names {sorted(missing)}, which the model has not. It has: "
            f"{', '.join(present)}."
        )
    if blocks is None and not found:
        raise ConfigError(
            f"`blocks` must be given for {type(module).__name__}: transformers declares no decoder "
            "blocks in it. Name their classes, or pass [] to shard it as a whole."
        )
    places = _places(module)
    return [each for each in found if all(places[p] == n for p, n in _places(each).items())]


def _places(module: nn.Module) -> Counter[nn.Parameter]:
    """In how many places each parameter is."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


@runtime_checkable
class Shardable(Protocol):
    """What the strategy asks of a LightningModule."""

    def sharding_root(self) -> nn.Module:
        """The module to shard: every trainable parameter is in it and used by its forward."""


@runtime_checkable
class Materializable(Protocol):
    """A LightningModule that may be built on the meta device, and filled afterwards."""

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        """Fill the (sharded) root, parameters and buffers, on that device; a collective."""


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all ranks, or over those of a machine.

    Data-parallel by default, on GPUs and on CPUs (gloo), with one device or many. Precision is set
    here, not by the Trainer: parameters stay fp32 (updates of 1e-6 vanish in bf16) and are cast
    for forward and backward. The LightningModule names what to shard by `sharding_root()`; if it
    has `materialize(module, device)`, `configure_model` runs on the meta device, so that no rank
    ever holds the whole model.

    Args:
        data_parallel_size: Number of ranks to shard over; auto is all, the only size so far.
        blocks: Class names of the blocks that are sharded one by one; None takes what
            transformers declares for the model.
        param_dtype: Of parameters in forward and backward; auto is bfloat16 on GPUs, float32 on
            CPUs.
        reduce_dtype: Of the gradients' reduction over ranks.
        reshard_after_forward: Free a block's full parameters between forward and backward; if not,
            they stay gathered until the step's last backward (faster, and more memory). None: free
            them where there are several ranks; on a single one nothing is sharded, and passes
            compute with a copy of the parameters (see `WorkingCopy`).
        cpu_offload: Keep parameters, gradients and optimizer state in host memory (GPUs only).
        save_distributed_checkpoint: Each rank writes its shards into a folder; otherwise rank 0
            writes one file. Either can be resumed on another number of ranks.
        timeout: Limit of one collective.
        shard_size: Ranks in a row that share one copy of parameters and optimizer state; between
            these rows only gradients travel. Set it to the GPUs of a machine where the network
            between machines is slow and the model fits into one. None: all ranks share one copy.
        sequence_parallel_size: Ranks in a row, of one machine, that compute each packed row
            together (DeepSpeed-Ulysses, arXiv 2309.14509): each a slice of its tokens, in attention
            a part of its heads. For sequences that one GPU has no room for; the token budget of a
            micro-batch is that of all of them. It must divide the model's query heads.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        blocks: list[str] | None = None,
        param_dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        reshard_after_forward: bool | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        timeout: timedelta = timedelta(minutes=30),
        shard_size: int | None = None,
        sequence_parallel_size: int = 1,
    ) -> None:
        if shard_size is not None:
            require_count("shard_size", shard_size)
        require_count("sequence_parallel_size", sequence_parallel_size)
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timeout,
        )
        if data_parallel_size != "auto":
            require_count("data_parallel_size", data_parallel_size)
        require_seconds("timeout", timeout.total_seconds())
        self._requested_size = data_parallel_size
        self._blocks = blocks
        self._param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self._reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.shard_size = shard_size
        self.sequence_parallel_size = sequence_parallel_size

    @property
    def reshard_after_forward(self) -> bool:
        """Free a block's full parameters between forward and backward."""
        return self.reshards(self.world_size)

    def reshards(self, ranks: int) -> bool:
        """`reshard_after_forward` on so many ranks."""
        return ranks > 1 if self._reshard_after_forward is None else self._reshard_after_forward

    @property
    def compute_dtype(self) -> str:
        """What forward and backward compute in."""
        return self.dtype_on(self.root_device.type)

    def dtype_on(self, device_type: str) -> str:
        """`compute_dtype` on a device of this type."""
        if self._param_dtype != "auto":
            return self._param_dtype
        return "float32" if device_type == "cpu" else "bfloat16"

    @override
    def _configure_launcher(self) -> None:
        self._check()  # the first call at which the Trainer has set devices and precision
        super()._configure_launcher()

    def _get_process_group_backend(self) -> str:
        """On GPUs, too, tensors in host memory are reduced: metrics, norms of offloaded shards."""
        backend = super()._get_process_group_backend()
        if backend != "nccl":
            return backend
        atexit.register(destroy_dist_connection)  # as Lightning does for plain `nccl`
        return "cpu:gloo,cuda:nccl"

    @override
    def setup_environment(self) -> None:
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        if empty_init is None:
            empty_init = self.world_size > 1 and isinstance(self.lightning_module, Materializable)
        with super().tensor_init_context(empty_init):
            yield

    @override
    def setup(self, trainer: L.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        root = self._sharding_root()
        if not is_sharded(root):
            self.shard(root, self.cpu_offload)
        if any(p.is_meta for p in root.parameters()):
            self._materialize(root)
        self.model_to_device()
        self._check_outside(root)
        self.barrier()
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting and not self.cpu_offload:
            optimizers_to_device(self.optimizers, self.root_device)

    def shard(self, module: nn.Module, cpu_offload: bool) -> None:
        """Shard a module over the ranks, in this strategy's blocks and precision."""
        if self.world_size == 1 and self._reshard_after_forward is None and not cpu_offload:
            blocks = _find_blocks(module, self._blocks)
            compiled = bool(getattr(module, "compiled", False))
            WorkingCopy(module, _DTYPES[self.compute_dtype], blocks, compiled)
            return
        parallelize(
            module,
            self.device_mesh,
            blocks=self._blocks,
            param_dtype=self.compute_dtype,
            reduce_dtype=self.reduce_dtype,
            reshard_after_forward=self._reshard_after_forward,
            cpu_offload=cpu_offload,
            shard_size=self.shard_size,
            sequence_parallel_size=self.sequence_parallel_size,
        )

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.root_device)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        fresh = not inner.state
        with _stepping_without_loss([inner]):
            state = super().optimizer_state(optimizer)
        if fresh:  # torch made a step at rate 0 to learn the state's names: undo it, here and there
            inner.state.clear()
            for entry in state.get("state", {}).values():
                entry.update({key: value * 0 for key, value in entry.items() if key == "step"})
        return state

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        partial = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            remove(partial)
        self.barrier()
        error: BaseException | None = None
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            if self.is_global_zero:
                replace(partial, path)
        except (OSError, RuntimeError, CheckpointException) as found:
            error = found
        reason = first_error(error)
        if self.is_global_zero and reason:
            remove(partial)
        keeper = self.checkpoint_io
        if isinstance(keeper, AtomicCheckpointIO):
            keeper.failed(path, reason) if reason else keeper.succeeded()
        elif reason:
            raise CheckpointError(f"the checkpoint {str(path)!r} can't be written: {reason}")

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        require_checkpoint(path)
        assert self.lightning_module is not None
        with reading(path):
            saved = saved_shapes(path)
        if self.lightning_module.strict_loading:
            require_same_model(saved, shapes(self.lightning_module.state_dict()))
        # Lightning passes None here whatever was asked for; checkpoints of ours are plain data.
        safe = True if weights_only is None else weights_only
        with _stepping_without_loss(self.optimizers), reading(path):
            if is_folder_of_shards(path):
                return self._load_shards(Path(path))
            assert self.model is not None
            if not any(isinstance(p, DTensor) for p in self.model.parameters()):
                return self._load_plain(path, safe)  # Lightning's own asks for shards
            return super().load_checkpoint(path, weights_only=safe)

    def _load_plain(self, path: str | Path, weights_only: bool) -> dict[str, Any]:
        """One file into a model that is not sharded."""
        assert self.model is not None
        assert self.lightning_module is not None
        found = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        strict = self.lightning_module.strict_loading
        self.model.load_state_dict(found.pop("state_dict"), strict=strict)
        for optimizer, state in zip(self.optimizers, found["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return dict(found)

    def _load_shards(self, path: Path) -> dict[str, Any]:
        """As Lightning does it, by readers that run no code of the checkpoint's."""
        assert self.model is not None
        assert self.lightning_module is not None
        weights = {"state_dict": get_model_state_dict(self.model)}
        load_shards(weights, path)
        strict = self.lightning_module.strict_loading
        self.model.load_state_dict(weights["state_dict"], strict=strict)
        for index, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{index}"
            state = {name: get_optimizer_state_dict(self.model, optimizer)}
            load_shards(state, path)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(
                self.model, optimizer, optim_state_dict=state[name], options=options
            )
        return read_plain(path / METADATA)

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS) and self.world_size > 1:
                raise ConfigError(_NOT_SHARDED.format("LBFGS", "it lays all of them end to end"))

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        try:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        except RuntimeError as error:
            if "DTensor" not in str(error) and "Sharding propagation" not in str(error):
                raise
            name, said = type(optimizer).__name__, str(error).splitlines()[0]
            raise ConfigError(_NOT_SHARDED.format(name, said)) from error

    def _sharding_root(self) -> nn.Module:
        module = self.lightning_module
        if not isinstance(module, Shardable):
            raise ConfigError(
                f"`{type(module).__name__}` must have a method `sharding_root()` that returns the "
                "module to shard (all trainable parameters, used from inside its forward)."
            )
        return module.sharding_root()

    def _materialize(self, root: nn.Module) -> None:
        module = self.lightning_module
        if not isinstance(module, Materializable):
            raise ConfigError(
                f"`{type(module).__name__}` was built on the meta device and has no method "
                "`materialize(module, device)` to fill it. Build it with its values."
            )
        module.materialize(root, torch.device("cpu") if self.cpu_offload else self.root_device)
        left = [name for name, p in root.named_parameters() if p.is_meta]
        left += [name for name, b in root.named_buffers() if b.is_meta]
        if left:
            raise ConfigError(
                f"`{type(module).__name__}.materialize` must fill every parameter and buffer, "
                f"{len(left)} are still on the meta device: {', '.join(left[:3])}."
            )

    def _check_outside(self, root: nn.Module) -> None:
        assert self.lightning_module is not None
        inside = {id(p) for p in root.parameters()}
        named = self.lightning_module.named_parameters()
        outside = [name for name, p in named if p.requires_grad and id(p) not in inside]
        if outside:
            raise ConfigError(
                "`sharding_root()` must hold every trainable parameter (others would differ "
                f"between ranks), not in it: {', '.join(outside[:3])}."
            )

    def check_ranks(self, per_machine: int, machines: int) -> None:
        """Refuse rows of ranks that would not come out even."""
        if self.shard_size is not None:
            _require_even("shard_size", self.shard_size, per_machine * machines)
        _require_even("sequence_parallel_size", self.sequence_parallel_size, per_machine)

    def _check(self) -> None:
        precision = self.precision_plugin.precision
        if precision != "32-true":
            raise ConfigError(
                f"`precision` must be 32-true with FSDP2Strategy, got {precision}. The strategy "
                "sets it: master weights stay fp32, `param_dtype` is what is computed in."
            )
        size = self.num_nodes * self.num_processes
        if self._requested_size not in ("auto", size):
            raise ConfigError(
                f"`data_parallel_size` must be auto or the number of ranks ({size}), got "
                f"{self._requested_size}."
            )
        self.check_ranks(self.num_processes, self.num_nodes)
        if self.cpu_offload and self.root_device.type == "cpu":
            raise ConfigError("`cpu_offload` needs a GPU to offload from. Leave it out on the CPU.")


_NOT_SHARDED = (
    "`optimizer` must work on sharded parameters under fsdp2, {} doesn't: {}. Set "
    "`trainer.strategy: ddp`, or use an optimizer that takes each parameter by itself."
)


@contextmanager
def _stepping_without_loss(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Torch takes a step on gradients of 0 to learn an optimizer's state; some want a loss, too."""
    before = [vars(optimizer).get("step") for optimizer in optimizers]  # a schedule's wrapper
    for optimizer in optimizers:
        vars(optimizer)["step"] = functools.partial(_step, optimizer.step)
    try:
        yield
    finally:
        for optimizer, own in zip(optimizers, before, strict=True):
            del vars(optimizer)["step"]
            if own is not None:
                vars(optimizer)["step"] = own


def _step(step: Callable[[Any], Any], closure: Callable[[], Any] | None = None) -> Any:
    return step(closure or (lambda: torch.zeros(())))


def register() -> str:
    """Make the strategy known by name; returns the name."""
    name = FSDP2Strategy.strategy_name
    owner = StrategyRegistry[name]["strategy"] if name in StrategyRegistry else None
    if owner is not None and owner.__module__ != __name__:
        warnings.warn(
            f"the strategy name {name!r} is taken by {owner.__module__}; FSDP2Strategy of "
            f"lightning_grpo is registered as 'grpo_{name}'.",
            stacklevel=2,
        )
        name = f"grpo_{name}"
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, FSDP2Strategy, description=FSDP2Strategy.__name__)
    return name


REGISTERED_NAME = register()
