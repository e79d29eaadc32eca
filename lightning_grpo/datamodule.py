"""RolloutDataModule, and ReplayDataModule for recorded trajectories.

RolloutDataModule: rollouts as Lightning's data source; the machinery lives in `session/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_grpo import contract
from lightning_grpo.contract import Trained, describe_sampling
from lightning_grpo.distributed import RankChannel
from lightning_grpo.errors import ConfigError, require_part
from lightning_grpo.loader import Prepare, RolloutLoader, Shape
from lightning_grpo.policy.size import ModelSize, training_memory
from lightning_grpo.rewards.sandbox import boundary
from lightning_grpo.rollout.admission import Curriculum
from lightning_grpo.rollout.chat import Tokenizer
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.prompts import Asked, Prompts, by_name
from lightning_grpo.rollout.workflow import RolloutWorkflow, require_workflow
from lightning_grpo.servers.base import Address, Servers, servers_of
from lightning_grpo.session import assembly as states
from lightning_grpo.session.folder import FolderLock, hold_folder, hold_run_folder
from lightning_grpo.session.material import RolloutsIn, SessionSettings
from lightning_grpo.session.session import ReplaySession, Session, connect_ranks, open_session
from lightning_grpo.shipped import resolve_path
from lightning_grpo.strategies.checkpoints import use_atomic_checkpoints
from lightning_grpo.strategies.fsdp2 import row_ranks_of
from lightning_grpo.types import Group, Prompt, RolloutProgress, ServerActivity
from lightning_grpo.validation import (
    Evaluation,
    EvaluationLoader,
    EvaluationRecord,
    evaluation_loaders,
)
from lightning_grpo.weights.publisher import PublishReport

LIGHTNINGS_INTERVAL = 50
"""Steps between two rows of a logger, where nobody says how many."""


class _TrainerElsewhere:
    """The trainer, for hooks that are called in another process."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies and pickles ask for
            raise AttributeError(name)
        raise ConfigError(
            "rollouts_in",
            f"must be `thread` for hooks that use the trainer (here `trainer.{name}`): in a "
            "process of their own rollouts have none",
        )


class RolloutDataModule(L.LightningDataModule):
    """Rollouts as a data source: each batch is one optimizer step on freshly sampled groups.

    Rank 0 owns prompts, servers and the queue, on one background event loop. The model is not
    stated here: it is the module's (`trainer.lightning_module`), or `start`'s for Fabric users.

    Args:
        prompts: What is asked in training: one dataset, or several by name, each with its weight.
            What `Prompts` takes may stand alone: rows, columns, a DataFrame, a file's name.
        workflow: How one prompt becomes one trajectory.
        servers: Where the inference servers come from; the URL of one that runs, or a list of
            them, is `RunningServers`.
        val_prompts: Held-out prompts, or several sets by name.
        batch_size: Prompts (groups) of one rollout batch, over all ranks.
        group_size: Trajectories of each prompt, at least 2.
        minibatches_per_batch: Optimizer steps of one pass over a rollout batch.
        passes_per_batch: Passes over each rollout batch.
        max_staleness: How many weight versions older than the trainer's a group may be; 0 is
            exactly on-policy.
        keep_group: Which groups are worth training on (`lightning_grpo.rollout.producer`
            `.has_variance` for dynamic sampling); the others are replaced by the next prompts.
        curriculum: Leaves prompts out of a pass by their past success; None asks them all.
        evaluation: What validation samples for each held-out prompt.
        limits: Time-outs, attempts and concurrency.
        test_prompts: What `trainer.test` asks, for once in the end: one set or several by name,
            logged as `test/...`. None: the held-out prompts.
        rollouts_in: Where rank 0's prompts, requests and rewards are seen to: in a `process` of
            their own, or in a `thread` of the trainer's, which they take the interpreter from. What
            a process can't import or unpickle keeps them in the thread, and what they change of the
            program's own objects stays in it. `auto`: the process where there is a GPU.

    Attributes:
        on_event: Told of every fetch, admission, take, publish and advance, from the loop's thread
            or the main one: `on_event(name, **data)`.
        evaluations: Every finished validation.
        log_every_step: Whether a Trainer that logs every 50 steps, which is Lightning's default,
            logs every one: each takes seconds to minutes. False leaves the 50.
        session: The rollouts, from `setup` to the end.
        run_dir: The run's folder, from `setup` on; no other process may have it until the end.
    """

    _asks = True  # a policy; not in a replay, which has no servers

    def __init__(
        self,
        prompts: Asked | dict[str, Asked],
        workflow: RolloutWorkflow,
        servers: Servers | Address | list[Address],
        val_prompts: Asked | dict[str, Asked] | None = None,
        batch_size: int = 16,
        group_size: int = 8,
        minibatches_per_batch: int = 1,
        passes_per_batch: int = 1,
        max_staleness: int = 1,
        keep_group: Callable[[Group], bool] | None = None,
        curriculum: Curriculum | None = None,
        evaluation: Evaluation = Evaluation(),
        limits: RolloutLimits = RolloutLimits(),
        test_prompts: Asked | dict[str, Asked] | None = None,
        rollouts_in: RolloutsIn = "auto",
    ) -> None:
        super().__init__()
        self.prompts = by_name(prompts, required=self._asks)
        self.workflow = require_workflow(workflow) if self._asks else workflow
        found = servers_of(servers) if self._asks else servers
        self.servers = cast("Servers", found)  # none in a replay
        self.val_prompts = by_name(val_prompts, "val_prompts")
        self.test_prompts = by_name(test_prompts, "test_prompts")
        self.batch_size = batch_size
        self.group_size = group_size
        self.minibatches_per_batch = minibatches_per_batch
        self.passes_per_batch = passes_per_batch
        self.max_staleness = max_staleness
        self.evaluation = evaluation
        self.limits = limits
        self._keep_group = keep_group
        self.curriculum = curriculum
        require_part("evaluation", evaluation, "Evaluation(num_samples=4)", Evaluation)
        require_part("limits", limits, "RolloutLimits(max_attempts=3)", RolloutLimits)
        require_part("keep_group", keep_group, "has_variance")
        require_part("curriculum", curriculum, "Curriculum()", Curriculum)
        contract.check_sizes(
            batch_size, group_size, minibatches_per_batch, passes_per_batch, max_staleness
        )
        self.rollouts_in = rollouts_in
        contract.check_rollouts_in(rollouts_in)
        self.log_every_step = True
        self.on_event: Callable[..., None] | None = None
        self.evaluations: list[EvaluationRecord] = []
        self.session: Session | None = None
        self.run_dir: Path | None = None
        self._folder: FolderLock | None = None  # rank 0 only
        self._limit_val_batches: float | None = None
        self._steps_before: int | None = None  # of the trainer, at version 0; None: not training

    # -- hooks of a subclass --------------------------------------------------------------------

    def make_prompt(self, row: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
        """One row of the dataset (after `transform`) as a prompt."""
        if len(self.prompts) > 1:
            raise ConfigError(
                "`make_prompt` has no default for several datasets, each of which makes its own. "
                "Way out: their `transform`."
            )
        (prompts,) = self.prompts.values()
        return prompts.make_prompt(row, tokenizer)

    def keep_group(self, group: Group) -> bool:
        """Whether a finished group is worth training on; the default asks the constructor's."""
        return self._keep_group is None or self._keep_group(group)

    # -- Lightning ------------------------------------------------------------------------------

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout batch: the weights are published after the last."""
        return self.minibatches_per_batch * self.passes_per_batch

    def setup(self, stage: str) -> None:
        """Check everything that can be checked, then start the servers in the background."""
        trainer = self._attached
        contract.check_trainer(trainer)
        contract.check_devices(trainer, self.servers)
        module: Trained = trainer.lightning_module  # type: ignore[assignment]
        module.check_model()
        contract.check_engine(self.servers, module.model_path)
        channel = self._own_folder(lambda: hold_run_folder(trainer))
        self.session = session = self._make_session(trainer, channel)
        epoch_steps = self._epoch_batches(session.num_prompts) * self.steps_per_rollout
        if stage == TrainerFn.FITTING:
            contract.check_intervals(trainer, self.steps_per_rollout, epoch_steps)
        self.check_ranks(trainer)
        self._adapt(trainer, stage)
        self._steps_before = None
        if stage != TrainerFn.FITTING:
            session.remaining_batches = 0
        session.start()

    def check_ranks(self, trainer: L.Trainer) -> None:
        """Refuse more ranks than a minibatch has sequences."""
        sequences = self.batch_size // self.minibatches_per_batch * self.group_size
        contract.check_ranks(trainer.world_size, sequences, row_ranks_of(trainer.strategy))

    def _adapt(self, trainer: L.Trainer, stage: str) -> None:
        settings: Any = trainer  # Lightning sets these in helpers, unseen by type checkers
        # The step-0 baseline takes the place of Lightning's sanity check, which logs nothing.
        settings.num_sanity_val_steps = 0
        use_atomic_checkpoints(trainer)
        if self.log_every_step and settings.log_every_n_steps == LIGHTNINGS_INTERVAL:
            settings.log_every_n_steps = 1
        if self._held_out:
            return
        if stage != TrainerFn.FITTING:
            name = "test_prompts" if stage == TrainerFn.TESTING else "val_prompts"
            raise ConfigError(
                f"`{name}` must be given for `trainer.{TrainerFn(stage).value}`: there is "
                f"nothing to answer. Set `data.{name}`."
            )
        # Lightning would warn of an empty loader, or of a missing one.
        self._limit_val_batches = settings.limit_val_batches
        settings.limit_val_batches = 0

    @property
    def _held_out(self) -> dict[str, Prompts]:
        """The prompts that are asked besides those of training, by set."""
        testing = self.trainer is not None and self.trainer.state.fn == TrainerFn.TESTING
        return self.test_prompts if testing and self.test_prompts else self.val_prompts

    def train_dataloader(self) -> RolloutLoader:
        """Minibatches of rollouts; sized, so that Lightning fetches none ahead."""
        trainer = self._attached
        module: Trained = trainer.lightning_module  # type: ignore[assignment]
        row_ranks = row_ranks_of(trainer.strategy)
        return self.batches(module.prepare_rollout, module.max_tokens_per_microbatch, row_ranks)

    def val_dataloader(self) -> list[EvaluationLoader]:
        """One loader for each set of held-out prompts, answered by the servers."""
        limit = self.trainer.limit_val_batches if self.trainer is not None else 1.0
        return self._evaluation_loaders(limit)

    def test_dataloader(self) -> list[EvaluationLoader]:
        """One loader for each set of test prompts; without any, for those of validation."""
        return self._evaluation_loaders(self._attached.limit_test_batches)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Nothing moves here: each micro-batch moves by itself when its turn comes."""
        return batch

    def teardown(self, stage: str) -> None:
        """Stop everything that `setup` started."""
        settings: Any = self._attached
        if self._limit_val_batches is not None:
            settings.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        """Lightning calls no teardown on this path."""
        self.teardown("fit")

    def state_dict(self) -> dict[str, Any]:
        """Where the rollouts stand, at the boundary between two rollout batches."""
        if self.session is None:
            return {}
        state = self.session.state_dict(self._num_unpublished(self.session.version))
        held_out = [{"step": each.step, "metrics": each.metrics} for each in self.evaluations]
        return states.to_checkpoint({**state, "settings": self._pinned, "evaluations": held_out})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state_dict and self.session is not None:
            state = states.from_checkpoint(state_dict)
            if contract.is_fitting(self.trainer):
                states.require_same(state.get("settings", {}), self._pinned)
                # With the baseline, which a run that goes on does not measure again.
                self.evaluations = [EvaluationRecord(**e) for e in state.get("evaluations", ())]
            self.session.load_state_dict(state)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to train on from a checkpoint that doesn't say where these rollouts stood."""
        states.require_own(checkpoint, type(self).__qualname__)

    # -- without a Trainer (Fabric) -------------------------------------------------------------

    def start(
        self, model_path: str, run_dir: str | Path = "runs/fabric", router_replay: bool = False
    ) -> None:
        """Check, then start servers and rollouts; for programs that have no Trainer.

        Args:
            model_path: Hub id, folder or `shipped:NAME`, the same that is trained.
            run_dir: Where logs and weights go.
            router_replay: Whether completions come with the experts that their tokens went
                through, for a `PackedPolicy(router_replay=True)`.
        """
        model_path = resolve_path(model_path)
        contract.check_engine(self.servers, model_path)
        channel = self._own_folder(lambda: hold_folder(Path(run_dir)))
        try:
            self.session = open_session(self.settings_for(model_path, router_replay), channel)
        except BaseException:
            self.close()
            raise
        self.session.start()

    def batches(
        self,
        prepare: Prepare,
        max_tokens_per_microbatch: int = 16384,
        sequence_parallel_size: int = 1,
    ) -> RolloutLoader:
        """The sized loader of minibatches.

        Args:
            prepare: Scalars of a rollout batch to advantages and which trajectories are trained.
            max_tokens_per_microbatch: Token budget of a micro-batch.
            sequence_parallel_size: Ranks that get the same tokens, as `parallelize` was told.
        """
        session = self._open_session
        shape = Shape(
            self.minibatches_per_batch,
            self.passes_per_batch,
            max_tokens_per_microbatch,
            session.channel.world_size,
            sequence_parallel_size,
        )
        return RolloutLoader(session, prepare, shape, self._epoch_batches(session.num_prompts))

    def publish(self, policy: nn.Module, *, trained: bool = True) -> PublishReport | None:
        """Bring the policy's weights to the servers; admits the next rollouts.

        Args:
            policy: The `PackedPolicy` that is trained.
            trained: Whether a rollout batch was trained on since the last publish. Call it once
                with False before the first batch.
        """
        session = self._open_session
        if self._steps_before is None and contract.is_fitting(self.trainer):
            self._begin_to_count(session)
        return session.publish(policy, trained=trained)

    def close(self) -> None:
        """End servers, reward processes and the event loop; may be called twice."""
        if self.session is not None:
            self.session.close()
            self.session.channel.close()
        if self._folder is not None:
            self._folder.release()
            self._folder = None

    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is; rank 0 only, from any thread."""
        return None if self.session is None else self.session.progress()

    def health(self) -> dict[str, float]:
        """`health/...` of rank 0's event loop; empty elsewhere."""
        return {} if self.session is None else self.session.health()

    def server_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        """What each server has done since the last call; rank 0 only, empty elsewhere.

        Args:
            ongoing: Whether what it does now is added, as far as it has lasted.
        """
        return [] if self.session is None else self.session.server_activities(ongoing=ongoing)

    def describe(self) -> dict[str, str]:
        """What is rolled out, as resolved: lines for the summary at the start."""
        session = self._open_session
        held_out = session.num_val_prompts
        return describe_data(self, session.num_prompts, held_out) | session.describe()

    # -- inside ---------------------------------------------------------------------------------

    def _make_session(self, trainer: L.Trainer, channel: RankChannel) -> Session:
        """Where rollouts come from under a Trainer; a collective."""
        module: Trained = trainer.lightning_module  # type: ignore[assignment]
        module.truncation.check(self.workflow.sampling)
        replays = module.router_replay and contract.is_fitting(trainer)
        return open_session(self.settings_for(module.model_path, replays), channel)

    def _own_folder(self, hold: Callable[[], FolderLock]) -> RankChannel:
        """Join the ranks, and have rank 0 take the run's folder; a collective."""

        def take() -> str:
            self._folder = hold()
            return str(self._folder.folder)

        channel = connect_ranks(self.trainer, self.limits.rank_timeout_s)
        try:
            folder = channel.on_rank_zero(take, what="taking the run's folder")
            self.run_dir = Path(channel.broadcast(folder))
        except BaseException:
            channel.close()
            raise
        return channel

    def _begin_to_count(self, session: Session) -> None:
        """At the start of training: `train_dataloader` may be called before steps are restored."""
        remaining, steps = contract.remaining_steps(self._attached), self.steps_per_rollout
        session.remaining_batches = None if remaining is None else -(-remaining // steps)
        self._steps_before = self._attached.global_step - session.version * steps

    def _evaluation_loaders(self, limit: float | None) -> list[EvaluationLoader]:
        chunk = max(1, self.batch_size * self.group_size * (self.max_staleness + 1))
        return evaluation_loaders(self._open_session, chunk, limit, self.evaluation.num_answers)

    @property
    def _open_session(self) -> Session:
        if self.session is None:
            raise ConfigError(
                "the data module was not set up. Pass it to `trainer.fit(module, data)`, or call "
                "`data.start(model)` in a program without a Trainer."
            )
        return self.session

    def settings_for(self, model_path: str, router_replay: bool = False) -> SessionSettings:
        """What a session of this model needs to know; `run_dir` must be set.

        Args:
            model_path: Hub id or folder.
            router_replay: Whether servers must say which experts tokens went through.
        """
        assert self.run_dir is not None
        own = type(self)
        makes = own.make_prompt is not RolloutDataModule.make_prompt
        keeps = own.keep_group is not RolloutDataModule.keep_group
        return SessionSettings(
            model_path=model_path,
            run_dir=self.run_dir,
            prompts=self.prompts,
            val_prompts=self._held_out,
            workflow=self.workflow,
            servers=self.servers,
            batch_size=self.batch_size,
            group_size=self.group_size,
            max_staleness=self.max_staleness,
            limits=self.limits,
            evaluation=self.evaluation,
            keep_group=self.keep_group if keeps else self._keep_group,
            curriculum=self.curriculum,
            make_prompt=self.make_prompt if makes else None,
            seed=next(iter(self.prompts.values())).seed,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            training_bytes=self._training_bytes if contract.is_fitting(self.trainer) else None,
            router_replay=router_replay,
            on_event=self.on_event,
            rollouts_in=self.rollouts_in,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For another process, whose hooks of a subclass are called: nothing of a run."""
        of_this_run = ("session", "on_event", "_folder")
        other: dict[str, Any] = {"evaluations": [], "trainer": self.trainer and _TrainerElsewhere()}
        return self.__dict__ | dict.fromkeys(of_this_run) | other

    def _training_bytes(self, size: ModelSize, longest: int | None) -> int:
        """What training takes of a GPU, for servers that share it."""
        trainer = self._attached
        module: Trained = trainer.lightning_module  # type: ignore[assignment]
        device = trainer.strategy.root_device.type
        setup = contract.training_setup(module, trainer, trainer.world_size, device)
        sequences = self.batch_size * self.group_size // self.minibatches_per_batch
        return training_memory(size, setup.bounded(sequences, longest)).total

    @property
    def _pinned(self) -> dict[str, Any]:
        """Settings that a checkpoint's positions depend on."""
        cut = ("minibatches_per_batch", "passes_per_batch")
        return {name: vars(self)[name] for name in cut} | self._open_session.pinned

    @property
    def _attached(self) -> L.Trainer:
        if self.trainer is None:
            raise ConfigError("the data module has no trainer. Call `trainer.fit(module, data)`.")
        return self.trainer

    def _num_unpublished(self, version: int) -> int:
        """Rollout batches that the weights have learnt from and the servers don't know of yet.

        Not 0 while the callbacks of the last step run, before WeightSync's turn.
        """
        if self._steps_before is None:
            return 0
        trained = (self._attached.global_step - self._steps_before) // self.steps_per_rollout
        return max(0, trained - version)

    def _epoch_batches(self, num_prompts: int) -> int:
        return max(1, num_prompts // self.batch_size)


class ReplayDataModule(RolloutDataModule):
    """The rollout batches that a run consumed, as it consumed them: same batches, same losses.

    Takes RolloutDataModule's arguments too, so that a run's own config works; only
    `minibatches_per_batch` and `passes_per_batch` matter. There is no validation: nobody answers.
    Training ends with the recording, or earlier by the Trainer's limits.

    Args:
        trajectories: A run's folder, its `trajectories/`, or one `.parquet` file.
        prompts: Not used.
        workflow: Not used.
        servers: Not used.
        settings: RolloutDataModule's other arguments.
    """

    _asks = False

    def __init__(
        self,
        trajectories: str,
        prompts: Prompts | None = None,
        workflow: RolloutWorkflow | None = None,
        servers: Servers | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            cast("Prompts", prompts),
            cast("RolloutWorkflow", workflow),
            cast("Servers", servers),
            **settings,
        )
        self.trajectories = trajectories
        self.val_prompts = self.test_prompts = {}

    def train_dataloader(self) -> RolloutLoader:
        """Minibatches of the recording; the Trainer stops where it ends."""
        trainer = self._attached
        # A checkpoint of the run itself holds the state of another class of data module, which
        # Lightning does not hand to this one; how many batches were trained on says it all.
        done = trainer.global_step // self.steps_per_rollout
        self._replay.version = max(self._replay.version, done)
        loader = super().train_dataloader()
        end = trainer.global_step + self._replay.num_left() * self.steps_per_rollout
        if not 0 < trainer.max_steps < end:
            trainer.fit_loop.epoch_loop.max_steps = end
        return loader

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Any will do: how many steps were taken says where to go on."""

    def describe(self) -> dict[str, str]:
        """What is replayed: lines for the summary at the start."""
        return self._replay.describe()

    def _make_session(self, trainer: L.Trainer, channel: RankChannel) -> ReplaySession:
        return ReplaySession(Path(self.trajectories), channel)

    @property
    def _replay(self) -> ReplaySession:
        assert isinstance(self.session, ReplaySession)
        return self.session

    def _epoch_batches(self, num_prompts: int) -> int:
        # Longer than any recording: where an epoch of the recorded run ended is not known, and
        # `max_steps` ends the replay.
        return 10**9


def describe_data(
    data: RolloutDataModule, num_prompts: int, held_out: Mapping[str, int]
) -> dict[str, str]:
    """Prompts, the rollout batch and what its staleness means."""
    steps = f"{data.steps_per_rollout} optimizer step"
    if data.steps_per_rollout > 1:
        steps += f"s ({data.minibatches_per_batch} x {data.passes_per_batch} passes)"
    stale = "exactly on-policy: rollouts wait for the weights of every step"
    if data.max_staleness:
        stale = (
            f"{data.max_staleness}: groups are sampled by weights at most {data.max_staleness} "
            f"version{'s' * (data.max_staleness > 1)} older than those that train on them"
        )
    counts = ", ".join(f"{n} {name}".strip() for name, n in held_out.items())
    if counts and data.evaluation.sampling is not None:
        counts += f" ({describe_sampling(data.evaluation.sampling)})"
    few = ""
    if num_prompts < data.batch_size:
        few = f" (fewer than a batch of {data.batch_size}: some are asked several times in each)"
    said = {"programs": f"held by {boundary()}"} if data.workflow.runs_programs else {}
    return {
        "prompts": f"{num_prompts}{few}, and held out {counts or 'none'}",
        "batch": f"{data.batch_size} prompts x {data.group_size} samples, {steps}",
        "staleness": stale,
        **said,
    }
