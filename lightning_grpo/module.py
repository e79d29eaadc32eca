"""GRPOModule: the model, its loss and its optimizer, as Lightning trains them."""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PreTrainedModel

from lightning_grpo import hparams
from lightning_grpo._compat_lightning import given_hyperparameters, is_compiled, log_values
from lightning_grpo.algorithm.advantages import Advantage, GroupAdvantage, Truncation
from lightning_grpo.algorithm.batch import MicroBatch, RolloutBatch
from lightning_grpo.algorithm.corrections import Correction
from lightning_grpo.algorithm.losses import GRPOLoss, KLPenalty, PolicyLoss
from lightning_grpo.algorithm.metrics import Metrics, merge, values
from lightning_grpo.callbacks.recording import missing_callbacks
from lightning_grpo.callbacks.weight_sync import first_values, same_values, strangers
from lightning_grpo.contract import (
    KEEP_BEST,
    check_callers,
    check_sized,
    describe_dtypes,
    is_fitting,
    with_one_optimizer,
)
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.distributed.channel import reduced
from lightning_grpo.errors import (
    MOST,
    ConfigError,
    require_builder,
    require_count,
    require_number,
    require_part,
)
from lightning_grpo.loader import Minibatch, Prepared
from lightning_grpo.objective import Objective, ReferencePolicy
from lightning_grpo.policy.attention import longest_steady
from lightning_grpo.policy.check import check_architecture, check_rows_apart, check_two_passes
from lightning_grpo.policy.load import (
    checkpoint_activations,
    export_policy,
    load_policy,
    load_tokenizer,
    materialize_from_folder,
)
from lightning_grpo.policy.lora import LoRA, export_adapter
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.shipped import resolve_path
from lightning_grpo.strategies.checkpoints import forget_foreign_paths, require_own_weights
from lightning_grpo.strategies.fsdp2 import gradient_sync, reshard, row_ranks_of
from lightning_grpo.validation import EvaluatedModule
from lightning_grpo.weights.gather import gather_weights

_FINAL: Mapping[str, str] = {
    "training_step": "token_loss",
    "optimizer_zero_grad": "configure_optimizers",
    "on_train_batch_start": "on_train_batch_end",
}
_HELD_OUT = "eval/"
"""What the names of metrics of held-out prompts begin with."""


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW at the usual RL learning rate (1e-6), betas 0.9 and 0.95, no weight decay."""
    return torch.optim.AdamW(params, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)


class GRPOModule(EvaluatedModule):
    """A language model trained by group-relative policy optimization.

    Subclasses may override `build_policy`, `shape_rewards`, `advantages`, `token_loss`,
    `configure_optimizers` and Lightning's `on_*` hooks. `training_step`, `optimizer_zero_grad` and
    `on_train_batch_start` are final: one batch of the loader is one optimizer step whose packed
    micro-batches run inside it.

    Args:
        model: Hub id, folder, or `shipped:NAME`. The only place where the model is stated.
        loss: The policy loss: any callable `(policy_logprobs, batch) -> ([tokens], metrics)`;
            None is `GRPOLoss()`.
        advantage: Turns rewards into advantages: `(rewards, group_ids) -> [trajectories]`; None is
            `GroupAdvantage()`.
        correction: Weighs tokens by how far the trainer's policy is from the one that sampled
            them. Without one the clip is anchored at the behavior policy, with one at the
            proximal policy (decoupled PPO, arXiv 2505.24298).
        kl: Penalty towards a reference policy; without one no reference model is built.
        entropy_coefficient: Weight of the entropy bonus.
        truncation: What a completion that ran into the length limit gets, and whether it counts
            in its group.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the learning-rate schedule from the optimizer; counts optimizer steps.
        lora: Train a low-rank adapter instead of all weights (needs the extra `lora`). Servers get
            the merged weights; a KL penalty's reference is the model without the adapter.
        max_tokens_per_microbatch: Token budget of one forward and backward pass.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the decoder's blocks, and on GPUs the head, by torch.compile. It
            saves memory and may save time: compare `time/step_s`, after the first steps, which
            take a minute more. Needs a C compiler.
        router_replay: Send each token of a mixture of experts through the experts that the server
            chose for it (rollout routing replay, arXiv 2510.11370), where it is known. Its own
            choice differs for a few tokens, whose logprobs then differ by far more than rounding.
        model_kwargs: Passed to `from_pretrained` (`revision`, `attn_implementation`, ...).
    """

    _is_evaluated = False  # the loss, in this optimizer step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an override of a final method, naming the hook to use."""
        super().__init_subclass__(**kwargs)
        for name, instead in _FINAL.items():
            if name in vars(cls):
                raise ConfigError(
                    f"`{cls.__name__}.{name}` can't be overridden: one batch is one optimizer step "
                    f"with its micro-batches inside. Override `{instead}`."
                )
        own = vars(cls).get("configure_optimizers")
        if own is not None:
            setattr(cls, "configure_optimizers", with_one_optimizer(own))  # noqa: B010 - mypy
        saves = vars(cls).get("on_save_checkpoint")
        if saves is not None:
            setattr(cls, "on_save_checkpoint", _with_own_weights(saves))  # noqa: B010 - mypy

    def __init__(
        self,
        model: str,
        # What a `Callable` is said to return would be listed among the losses of a config.
        loss: PolicyLoss | Callable[..., Any] | None = None,
        advantage: Advantage | None = None,
        correction: Correction | None = None,
        kl: KLPenalty | None = None,
        entropy_coefficient: float = 0.0,
        truncation: Truncation = Truncation(),
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: LoRA | None = None,
        max_tokens_per_microbatch: int = 16384,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        router_replay: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        model = arguments["model"] = _name_of_model(model)
        self._remember(arguments)
        require_count("max_tokens_per_microbatch", max_tokens_per_microbatch)
        require_number("entropy_coefficient", entropy_coefficient, least=-MOST)
        self.model_name = model
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        # A default object would hand its settings to the class that a config names instead.
        self.loss = hparams.from_plain(loss) or GRPOLoss()
        self.advantage = hparams.from_plain(advantage) or GroupAdvantage()
        self.correction = hparams.from_plain(correction)
        self.kl = hparams.from_plain(kl)
        self.lora: LoRA | None = hparams.from_plain(lora)
        self.entropy_coefficient = entropy_coefficient
        self.truncation: Truncation = hparams.from_plain(truncation)
        self._optimizer = hparams.factory(optimizer) or default_optimizer
        self._lr_scheduler = hparams.factory(lr_scheduler)
        self._check_parts()
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile  # `compile` is a method of modules
        self.router_replay = router_replay
        self._model_kwargs = model_kwargs or {}
        self.policy: PackedPolicy | None = None
        self._step_metrics: set[str] = set()  # that the last step, and rollout batch, logged
        self._rollout_metrics: set[str] = set()
        self._to_log: tuple[Minibatch, Callable[[], Metrics]] | None = None
        self._reference = ReferencePolicy(self.kl, model, self._model_kwargs, self.lora is not None)

    def _check_parts(self) -> None:
        """Refuse what is none of the parts that the arguments name."""
        require_part("loss", self.loss, "GRPOLoss()")
        require_part("advantage", self.advantage, "GroupAdvantage()")
        require_part("correction", self.correction, "TokenTIS()", Correction)
        require_part("kl", self.kl, "KLPenalty(0.001)", KLPenalty)
        require_part("truncation", self.truncation, 'Truncation(handling="mask")', Truncation)
        require_part("lora", self.lora, "LoRA(rank=16)", LoRA)
        require_builder("optimizer", self._optimizer, "lambda params: AdamW(params, lr=1e-6)")
        require_builder(
            "lr_scheduler", self._lr_scheduler, "lambda optimizer: StepLR(optimizer, 9)"
        )

    # -- what is refused before it costs anything -----------------------------------------------

    def check_model(self) -> None:
        """Refuse a model that can't be trained, before anything is started.

        Raises:
            ConfigError: Why not, and the way out.
        """
        if not self.automatic_optimization:
            raise ConfigError(
                f"`{type(self).__name__}.automatic_optimization` must be true: one batch is one "
                "optimizer step, whose micro-batches run inside it. Leave it out; what an own "
                "loop would do goes into an optimizer class, or into a program with Fabric."
            )
        if is_compiled(self):
            raise ConfigError(
                "`torch.compile` can't be given the whole module: a step trains packed "
                "micro-batches of every length and waits for servers. Set "
                f"`{type(self).__name__}(compile=True)`: it compiles the decoder's blocks."
            )
        if self.compiles and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            raise ConfigError(
                "`compile` needs a C compiler, and there is no cc, gcc or clang on the PATH. "
                "Install one (`apt install gcc`), or leave `compile` out."
            )
        row_ranks = row_ranks_of(self._trainer and self._trainer.strategy)
        builds_own = type(self).build_policy is not GRPOModule.build_policy
        if not builds_own and self.policy is None:
            kwargs, replays = self._model_kwargs, self.router_replay
            check_architecture(self.model_path, kwargs, self._try_out, replays, row_ranks)
        self._reference.check(row_ranks)

    def _try_out(self, model: PreTrainedModel) -> None:
        """Prepare a model without values, and build optimizer and schedule for its shapes."""
        self._prepare(model)
        known = self._optimizer is default_optimizer or not inspect.isfunction(self._optimizer)
        if type(self).configure_optimizers is not GRPOModule.configure_optimizers or not known:
            return  # a function may look for parameters that it has seen, and would find none
        shapes = [p.shape for p in model.parameters() if p.requires_grad]
        with suppress(RuntimeError, AttributeError, LookupError):  # it wants the real ones
            # Of one stored value each, on a device that every optimizer takes.
            self._optimizers_of([nn.Parameter(torch.zeros(()).expand(shape)) for shape in shapes])

    def check_passes(self) -> None:
        """Refuse a policy that gives equal tokens unequal logprobs; on every rank.

        Raises:
            ConfigError: Where its noise comes from, or that rows of a pack see each other.
        """
        policy = self.sharding_root()
        assert isinstance(policy, PackedPolicy)
        check_two_passes(policy)
        check_rows_apart(policy)
        reshard(policy)  # the optimizer and callbacks look at the shards
        policy.train()  # each pass sees to its mode; Lightning would warn of another one

    # -- the policy -----------------------------------------------------------------------------

    @property
    def model_path(self) -> str:
        """Where the model is loaded from: `shipped:` names resolved, others as given."""
        return resolve_path(self.model_name)

    def build_policy(self) -> PreTrainedModel:
        """The language model to train, fp32; called once on each rank (on meta under fsdp2)."""
        on_meta = torch.get_default_device().type == "meta"
        return load_policy(self.model_path, meta=on_meta, model_kwargs=self._model_kwargs)

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        """Bring the model's values to a sharding root that was built on the meta device."""
        assert isinstance(module, PackedPolicy)
        adapt = self.lora.add_to if self.lora else None
        materialize_from_folder(
            module.model,
            self.model_path,
            device=device,
            model_kwargs=self._model_kwargs,
            adapt=adapt,
        )

    def configure_model(self) -> None:
        """Lightning's hook: build the policy, once."""
        if self.policy is None:
            model = self.build_policy()
            self._prepare(model)
            replays = self.router_replay
            self.policy = PackedPolicy(model, compiled=self.compiles, router_replay=replays)

    def _prepare(self, model: PreTrainedModel) -> None:
        """What is done to the model once it is built."""
        if self.lora is not None:
            self.lora.add_to(model)
        if self.gradient_checkpointing:
            checkpoint_activations(model)

    def sharding_root(self) -> nn.Module:
        """What a sharded strategy shards: every parameter is used from inside its forward."""
        if self.policy is None:
            self.configure_model()
        assert self.policy is not None
        return self.policy

    def export(self, folder: str | Path) -> Path:
        """Write the policy as a Hugging Face folder that transformers loads; LoRA is merged."""
        root = self.sharding_root()
        assert isinstance(root, PackedPolicy)
        weights = gather_weights(root) if self.lora is not None else None
        return export_policy(root.model, load_tokenizer(self.model_path), folder, weights)

    def export_adapter(self, folder: str | Path) -> Path:
        """Write the LoRA adapter alone, as a folder that PEFT loads."""
        root = self.sharding_root()
        assert isinstance(root, PackedPolicy)
        if self.lora is None:
            raise ConfigError("`lora` must be set for an adapter to export. Export the policy.")
        return export_adapter(root.model, self.model_path, folder)

    # -- hooks of a subclass --------------------------------------------------------------------

    def shape_rewards(self, batch: RolloutBatch) -> Tensor:
        """Rewards that advantages are computed from, `[trajectories]`; by default `truncation`'s.

        Called once per rollout batch, on every rank, on the CPU, with the whole batch.
        """
        return self.truncation.rewards(batch)

    def advantages(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantages of the whole rollout batch, the same on every rank.

        Args:
            rewards: fp64 `[trajectories]`, in whole groups.
            group_ids: int64 `[trajectories]`.

        Returns:
            `[trajectories]`, or `[tokens]` over all sequences of the batch in order; finite in
            fp32, in which they are used.
        """
        return self.advantage(rewards, group_ids)

    def token_loss(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """The unreduced loss of each token.

        Args:
            policy_logprobs: `[tokens]`, with gradient.
            batch: Everything else that is known per token.

        Returns:
            Loss `[tokens]` and metrics that know how they reduce.
        """
        return self.loss(policy_logprobs, batch)

    # -- the step -------------------------------------------------------------------------------

    def prepare_rollout(self, batch: RolloutBatch) -> Prepared:
        """Advantages of a whole rollout batch, and which trajectories carry a gradient."""
        self._check_lengths(batch)
        rewards = self.shape_rewards(batch)
        advantages = self.truncation.advantages(self.advantages, rewards, batch).detach()
        in_loss = self.truncation.in_loss(batch)
        trained = in_loss
        ours = type(self).token_loss is GRPOModule.token_loss
        if ours and self.objective.skips_zero_advantages and advantages.numel() == len(batch):
            trained = in_loss & (advantages != 0)
        shaped = {} if rewards is batch.rewards else {"reward/shaped_mean": float(rewards.mean())}
        return Prepared(advantages, trained, in_loss, shaped)

    @functools.cached_property
    def objective(self) -> Objective:
        """What is minimized, as resolved from the arguments."""
        return Objective(self.loss, self.correction, self.kl, self.entropy_coefficient)

    def _check_lengths(self, batch: RolloutBatch) -> None:
        """Refuse sequences that grew, over several turns, beyond what servers compute rightly."""
        limit = None if self.policy is None else longest_steady(self.policy.model.config)
        longest = int(batch.sequence_lengths.max())
        if limit is not None and longest > limit:
            raise ConfigError(
                f"sequences must have at most {limit} tokens, at which {self.model_name!r} changes "
                f"the factors of RoPE for all that came before, got one of {longest}. Lower "
                "`max_new_tokens`, or the workflow's `max_tokens`."
            )

    def on_train_batch_start(self, batch: Minibatch, batch_idx: int) -> None:
        """Begin an optimizer step, which may evaluate the loss several times."""
        check_sized(self.trainer)
        if self._to_log is not None:
            raise ConfigError(
                self._overridden("on_before_optimizer_step"),
                "must call `super().on_before_optimizer_step(optimizer)`, which logs the metrics of"
                " a step: those of the last one are nowhere",
            )
        if self.router_replay and batch.rollout.sequences.routes is None:
            raise ConfigError(
                "router_replay",
                "needs trajectories with `routes`, and none of the batch has any",
                way_out="Give those of the completions on in the workflow, as `EpisodeRecord` does;"
                " a recording has them where its run had `router_replay`. Or leave it out.",
            )
        self._is_evaluated = False

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Lightning's place for it, after `training_step`, would wipe micro-batches'."""

    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        """Run the micro-batches of one optimizer step; Lightning does the last one's backward.

        Some optimizers ask for loss and gradient several times in a step, at other weights. What
        belongs to the weights before the step is taken at the first time.
        """
        policy = self.sharding_root()
        first_time, self._is_evaluated = not self._is_evaluated, True
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        if batch.is_first and first_time:
            steps = self._data.steps_per_rollout
            with self._reference.on(policy, self.device, self.trainer.strategy) as reference:
                self.objective.anchor(policy, batch.rollout, steps, self.device, reference)
        metrics: Metrics = {}
        loss = torch.zeros(())
        for k in range(batch.num_micro_batches):
            last = k == batch.num_micro_batches - 1
            with gradient_sync(self, enabled=last):
                loss, more = self.objective.micro_batch_loss(
                    policy, batch, k, self.device, self.token_loss
                )
                # Strategies average gradients over ranks; the denominators are already global.
                # Ranks that compute a row together have one loss, and each a part of its gradient.
                loss = loss * self.trainer.world_size
                if not last:
                    self.trainer.strategy.backward(loss, None)
            metrics = merge(metrics, more)
        if first_time:
            copies = row_ranks_of(self.trainer.strategy)
            self._to_log = batch, reduced(metrics, self.device, copies)
        return loss

    def _log_step(self, batch: Minibatch, metrics: Metrics) -> None:
        logged = values(metrics)
        # A step that trains on nothing (all rewards of its groups are equal) has none of most.
        gone, self._step_metrics = self._step_metrics - logged.keys(), set(logged)
        if batch.is_first:
            gone |= self._rollout_metrics - batch.rollout.metrics.keys()
            self._rollout_metrics = set(batch.rollout.metrics)
            logged.update(batch.rollout.metrics)
        # Lightning counts from 0: `step` is what loggers take in its place, one number everywhere.
        log_values(self, logged | {"step": float(self.global_step + 1)}, gone)
        self._step_plateau(logged, held_out=False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's metrics, and the norm of the gradient before it is clipped.

        Here and not in `training_step`, where reading them would keep the last backward from being
        launched: now a GPU works on that.
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        full = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._to_log is not None:
            (batch, metrics), self._to_log = self._to_log, None
            self._log_step(batch, metrics())
        # The step's one wait for the GPU. What follows runs beside the optimizer.
        log_values(self, {"policy/grad_norm": float(full)})

    # -- optimizer ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters; a schedule steps with it."""
        return self._optimizers_of([p for p in self.parameters() if p.requires_grad])

    def _optimizers_of(self, trained: list[nn.Parameter]) -> OptimizerLRScheduler:
        optimizer = hparams.build("optimizer", self._optimizer, trained, torch.optim.Optimizer)
        if self._lr_scheduler is None:
            return optimizer
        scheduler = hparams.build("lr_scheduler", self._lr_scheduler, optimizer, LRScheduler)
        schedule: Any = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            self._check_monitor(scheduler)
            # Lightning would step it by an interval, also while its metric is an old one.
            never = {"interval": "epoch", "frequency": sys.maxsize, "reduce_on_plateau": False}
            schedule |= never
        elif type(scheduler).__module__ == torch.optim.lr_scheduler.__name__:
            hparams.require_schedule(self._lr_scheduler, optimizer, self._num_steps_known())
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _num_steps_known(self) -> int:
        """How many optimizer steps the run certainly means to make."""
        if self._trainer is None or self._trainer.max_epochs != -1:
            return 1
        return max(1, self._trainer.max_steps)

    def on_validation_epoch_end(self) -> None:
        """Log the means, and let a schedule see those that it waits for."""
        super().on_validation_epoch_end()
        self._step_plateau(self._data.evaluations[-1].metrics, held_out=True)

    def _check_monitor(self, scheduler: ReduceLROnPlateau) -> None:
        monitor = vars(scheduler).get("monitor")
        if monitor is None:
            raise ConfigError(
                "`lr_scheduler` must name the metric whose plateau it waits for, and torch's "
                "ReduceLROnPlateau can't. Use `lightning.pytorch.cli.ReduceLROnPlateau(optimizer, "
                "monitor='eval/avg_at_1', mode='max')`."
            )
        validates = self._trainer is None or self._trainer.enable_validation
        if monitor.startswith(_HELD_OUT) and not validates:
            raise ConfigError(
                f"`lr_scheduler.monitor` must be a metric of this run, got {monitor!r}, and no "
                "held-out prompts are answered. Set `data.val_prompts`, or monitor `reward/mean`."
            )

    def _step_plateau(self, metrics: Mapping[str, Any], *, held_out: bool) -> None:
        """Step a schedule that waits for a plateau, when its metric is there anew."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if not isinstance(scheduler, ReduceLROnPlateau) or config.reduce_on_plateau:
                continue  # another kind, or one that Lightning steps for a subclass
            monitor = vars(scheduler)["monitor"]
            if monitor in metrics:
                scheduler.step(float(metrics[monitor]))
            elif monitor.startswith(_HELD_OUT) == held_out:
                raise ConfigError(
                    "lr_scheduler.monitor",
                    "must be a metric of this run",
                    monitor,
                    f"There are: {', '.join(sorted(metrics))}.",
                )

    @property
    def _data(self) -> RolloutDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # -- what Lightning asks of a module --------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that a run can't do without, unless the trainer has one of the kind."""
        check_callers(self.trainer)
        self._to_log = None  # of a run before, which was stopped within a step
        return missing_callbacks(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model, and a default where the checkpoint's run had an own object."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        # Without a trainer nothing is optimized: loading for inference or export is fine.
        unused = set() if self._trainer else {"optimizer", "lr_scheduler"}
        hparams.require_restored(saved, self._given | unused, type(self).__name__)
        require_own_weights(self, checkpoint)
        kept = self.trainer.checkpoint_callbacks if self._trainer else ()
        forget_foreign_paths(checkpoint, [str(getattr(c, "dirpath", "")) for c in kept])
        if is_fitting(self._trainer):
            self._data.check_checkpoint(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save other weights than those that are trained, published and validated."""
        self._check_saved(checkpoint)

    def _check_saved(self, checkpoint: Mapping[str, Any]) -> None:
        suspects = strangers(self.trainer, self)
        if not suspects:
            return
        own = dict(self.named_parameters())
        saved = {n: value for n, value in checkpoint.get("state_dict", {}).items() if n in own}
        changed = not same_values(first_values(saved), first_values(own))
        if self.trainer.strategy.reduce_boolean_decision(changed, all=False):
            raise ConfigError(
                "a checkpoint must hold the weights that are trained (servers answer held-out "
                f"prompts with those), and {' or '.join(suspects)} puts others into it. Remove "
                f"what does and {KEEP_BEST}, or save them under a key of their own."
            )

    def describe(self) -> dict[str, str]:
        """Model, loss, anchor of the clip, advantage, correction, KL penalty and every precision.

        Lines for the summary at the start, as resolved.
        """
        parameters = list(self.sharding_root().parameters())
        count = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        served = self._data.session.dtypes() if self._data.session is not None else {}
        anchor = "the behavior policy"
        if self.correction is not None:
            anchor = "the proximal policy"
            if self._data.steps_per_rollout == 1:
                anchor += " (the policy itself: one optimizer step per rollout batch)"
        model = f"{self.model_name} ({count / 1e6:.2f}M parameters)"
        if self.lora is not None:
            model += f", of which {self.lora} trains {trained / 1e6:.2f}M"
        passes = f"micro-batches of at most {self.max_tokens_per_microbatch:,} tokens"
        if (row_ranks := row_ranks_of(self.trainer.strategy)) > 1:
            passes += f", each on {row_ranks} ranks together"
        if self.gradient_checkpointing:
            passes += ", activations computed again in the backward pass"
        if self.compiles:
            passes += ", blocks compiled in the first steps"
        if self.router_replay:
            passes += ", through the experts that servers chose"
        return {
            "model": model,
            "loss": f"{self._overridden('token_loss') or self.loss}, clip anchored at {anchor}",
            "advantage": self._overridden("advantages") or str(self.advantage),
            "truncated": str(self.truncation),
            "correction": str(self.correction or "none"),
            "kl": str(self.kl or "none"),
            "dtypes": describe_dtypes(self.trainer, self.sharding_root(), served),
            "passes": passes,
        }

    def _overridden(self, hook: str) -> str:
        """`Class.hook` where a subclass of the user's overrides it, else nothing."""
        owner = next(cls for cls in type(self).__mro__ if hook in vars(cls))
        own = owner.__module__.startswith("lightning_grpo.")
        return "" if own else f"{owner.__name__}.{hook}"

    def _remember(self, arguments: dict[str, Any]) -> None:
        """Keep the arguments as plain data; the CLI knows those that were built from a config."""
        defaults = inspect.signature(GRPOModule.__init__).parameters
        self._given = {n for n, v in arguments.items() if v is not defaults[n].default}
        self.hparams.update(hparams.to_plain(arguments, given_hyperparameters()))


def _name_of_model(given: Any) -> str:
    """What a model is loaded by, on each rank and by the servers; refuses one in memory."""
    if isinstance(given, str | Path) and str(given):
        return str(given)
    way_out = ""
    if isinstance(given, nn.Module):
        way_out = (
            "Save model and tokenizer with `save_pretrained(FOLDER)` and give the folder, or load "
            "the model in a subclass's `build_policy`."
        )
    raise ConfigError(
        "model",
        "must be a hub id, a folder or `shipped:NAME`, since servers and each rank load it "
        f"themselves, got {type(given).__name__}",
        way_out=way_out,
    )


def _with_own_weights(save: Callable[[Any, dict[str, Any]], None]) -> Callable[..., None]:
    """A subclass's `on_save_checkpoint`, refused where it puts other weights into a checkpoint."""

    @functools.wraps(save)
    def saved(self: GRPOModule, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        self._check_saved(checkpoint)

    return saved
