"""LightningCLI with this package's defaults, callbacks and error messages."""

from __future__ import annotations

import functools
import logging
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed

from lightning_grpo._compat_lightning import start_method
from lightning_grpo.callbacks.curve import going_on_without
from lightning_grpo.callbacks.signals import GoesOn
from lightning_grpo.cli.main import (
    is_first_rank,
    set_one_thread_default,
    silence_jsonargparse,
)
from lightning_grpo.cli.mistakes import (
    check,
    check_settings,
    condense,
    fault_of,
    import_object,
    locate,
    refused_build,
)
from lightning_grpo.cli.runs import (
    LAST,
    LAST_OR_NONE,
    RUNS,
    board_tells_itself,
    default_loggers,
    folder_beside,
    held_version,
    last_checkpoint,
    listed,
    move_beside,
    version_of,
)
from lightning_grpo.cli.sources import (
    ConfigProblem,
    Setting,
    asks_for_help,
    names_class,
    nearest,
    read_yaml,
)
from lightning_grpo.contract import run_folder
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import MOST_SERVERS, ConfigError, GRPOError, require_number
from lightning_grpo.keys import is_secret, masked
from lightning_grpo.servers.base import (
    Machine,
    present_devices,
    serving_devices,
    training_devices,
)
from lightning_grpo.strategies.checkpoints import (
    refuse_shards,
    require_checkpoint,
    require_readable,
)
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy

TRAINER_DEFAULTS: dict[str, Any] = {
    "num_sanity_val_steps": 0,  # the baseline at step 0 takes its place
    "log_every_n_steps": 1,  # a step is seconds to minutes: each one is worth a row
    "enable_model_summary": False,  # RunSummary says it
}

_SKIPPED = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
}


class StrictParser(LightningArgumentParser):
    """A parser that raises and takes no abbreviations, also for nested classes' arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # jsonargparse makes parsers of this class for nested constructors, without our settings.
        super().__init__(*args, **{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """The config as text, without keys and tokens: `--print_config`, and what a run keeps."""
        return super().dump(_without_secrets(cfg), *args, **kwargs)


class GRPOCLI(LightningCLI):
    """One subcommand of LightningCLI; the others' parsers are not built.

    Args:
        command: `fit`, `validate` or `test`.
        arguments: What to parse, config files first.
        settings: The same with places, for messages.
        run_name: Folder of this run under `runs/`, unless the config names one.
        kind: `fit`, or what else it is that reads a run, and writes beside it.
        held: Keeps the run's folder until the end.
        kwargs: LightningCLI's own.
    """

    def __init__(
        self,
        command: str,
        arguments: list[str],
        settings: Setting,
        run_name: str,
        kind: str,
        held: ExitStack,
        **kwargs: Any,
    ) -> None:
        self._command, self._arguments = command, arguments
        self._settings, self._run_name = settings, run_name
        self._kind, self._held = kind, held
        self._version: int | None = None
        self._found_last = False
        self._roots = {
            "trainer": Trainer,
            "model": kwargs["model_class"],
            "data": kwargs["datamodule_class"],
        }
        super().__init__(**kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one command that is run: the others' parsers would cost time."""
        return {self._command: _SKIPPED[self._command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what jsonargparse refuses becomes one located problem."""
        try:
            self.config = parser.parse_args([self._command, *self._arguments])
        except ArgumentError as error:
            check_settings(self._settings, self._roots)
            raise condense(str(error), self._settings) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, SystemExit) and asks_for_help(self._arguments):
                raise
            # What the user's files raised while they were imported.
            check_settings(self._settings, self._roots)
            raise refused_build(error, self._settings) from error
        seed = self.config[self._command].seed_everything
        if not isinstance(seed, bool | None):
            require_number("seed_everything", seed, least=0, most=2**32 - 1, whole=True)
        if any(setting.value is None for _, setting in self._settings.walk()):
            check_settings(self._settings, self._roots)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the config says what the model is, the checkpoint gives its weights.

        Lightning would lay the checkpoint's hyper-parameters over the command line.
        """

    def before_instantiate_classes(self) -> None:
        """Name the run's folder, share out the GPUs, find the checkpoint that `last` means."""
        config = self.config[self._command]
        self._share_gpus(config)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(Path(RUNS) / self._run_name)
        _require_local(str(config.trainer.default_root_dir))
        for name in ("max_steps", "max_epochs"):
            if self._command == "fit" and getattr(config.trainer, name) == 0:
                raise ConfigError(
                    f"`trainer.{name}` must be >= 1, or -1 for no limit, got 0: nothing would be "
                    "trained. To score a model use `validate`."
                )
        self._find_checkpoint(config)
        move_beside(config.trainer, self._kind)
        if config.ckpt_path in ("best", "hpc"):
            raise ConfigError(
                f"`ckpt_path` must be a path, `{LAST}` or `{LAST_OR_NONE}`, got "
                f"{config.ckpt_path!r}, which a Trainer knows of its own fit alone. `{LAST}` is "
                "the newest checkpoint, also that of a stop; the best one is named at the end of "
                "its run."
            )
        if not (config.ckpt_path is None or config.ckpt_path.startswith("registry")):
            require_checkpoint(config.ckpt_path)
            require_readable(config.ckpt_path)

    def _share_gpus(self, config: Any) -> None:
        given, present = config.trainer.devices, present_devices()
        share_gpus(config, present if torch.cuda.is_available() else [])
        training = config.trainer.devices
        if training != given:
            serving = _servers_of(config).init_args.devices or serving_devices(present)
            rank_zero_info(f"GPUs {serving} serve, {training} train")

    def _find_checkpoint(self, config: Any) -> None:
        """Put the newest checkpoint of the run in the place of `last`, and find its folder."""
        root = Path(config.trainer.default_root_dir)
        folders = _checkpoint_folders(config.trainer)
        if self._kind == "replay":  # goes on with a replay; elsewhere `last` is the training's
            root, *folders = (folder_beside(each, self._kind) for each in (root, *folders))
        newest = last_checkpoint(root, folders)
        if newest is None and config.ckpt_path == LAST:
            raise ConfigError(
                f"`ckpt_path` must name a checkpoint, and `{LAST}` finds none of this run (below "
                f"{str(root)!r}). Leave it out to begin, or give `{LAST_OR_NONE}`, which goes on "
                "where there is a checkpoint and begins where there is none."
            )
        if config.ckpt_path in (LAST, LAST_OR_NONE):
            config.ckpt_path = None if newest is None else str(newest)
            self._found_last = newest is not None
        if newest is None or config.ckpt_path is None or self._command != "fit":
            return
        # From an earlier one begins another curve, in a folder of its own.
        if Path(config.ckpt_path).resolve() == newest.resolve():
            self._version = version_of(newest, root)

    def instantiate_classes(self) -> None:
        """Build what the config names; what a constructor raises becomes one located problem."""
        try:
            super().instantiate_classes()
        except (ConfigError, MisconfigurationException, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise refused_build(error, self._settings) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with our loggers where the user named none."""
        config = self._get(self.config_init, "trainer")
        self.datamodule.log_every_step = False  # our default, or what the config says
        root = folder_beside(Path(config.default_root_dir), self._kind)
        kwargs["default_root_dir"] = str(root)
        if _is_default(config.logger) and not config.fast_dev_run:
            version = self._version
            if is_first_rank():
                version = self._held.enter_context(held_version(root, version))
            kwargs["logger"] = default_loggers(root, version)
        kwargs |= self._named_strategy(config.strategy)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            # Lightning's own for accelerators, strategies and precisions.
            raise locate(_explained(error), self._settings) from error
        path = self.config[self._command].ckpt_path
        if path is not None and not isinstance(trainer.strategy, FSDP2Strategy):
            refuse_shards(path)  # other strategies unpickle whatever the folder holds
        method = start_method(trainer)
        if method is not None:
            raise ConfigError(
                "trainer.strategy",
                f"must start each rank as a program of its own (those that are {method}ed hear of "
                "no signal to this one)",
                config.strategy,
                "Use `ddp` or `fsdp2`.",
            )
        if isinstance(trainer.accelerator, CPUAccelerator) and set_one_thread_default():
            torch.set_num_threads(1)
        if self._command != "fit":
            # True of training alone: which checkpoint was best is not asked here.
            warnings.filterwarnings("ignore", message="The dirpath has changed")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; to leave in the middle with status 0 is not to have trained."""
        if isinstance(self.datamodule, RolloutDataModule):
            # Before a process is started for each of them.
            self.datamodule.check_ranks(self.trainer)
        if self._found_last:
            self.trainer.callbacks.insert(0, GoesOn())  # type: ignore[attr-defined]
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as leaving:
            interrupted = isinstance(leaving.__context__, KeyboardInterrupt)
            if type(leaving) is not SystemExit or leaving.code or interrupted:
                raise
            raise GRPOError(f"the run did not come to its end: {fault_of(leaving)}") from leaving

    def _named_strategy(self, name: Any) -> dict[str, Strategy]:
        """A strategy whose class stands for itself, which the parser takes for a registered name.

        Lightning's own message lists no strategy that was registered.
        """
        known = ["auto", *StrategyRegistry.available_strategies()]
        if not isinstance(name, str) or name in known:
            return {}
        setting = self._settings.value["trainer"].value["strategy"]
        if "." in name:
            check("trainer.strategy", Strategy, setting)
            return {"strategy": import_object(name)()}
        rule = f"`{name}` is not a registered strategy"
        raise ConfigProblem("trainer.strategy", rule, setting.where, nearest(name, known))


class SaveConfig(SaveConfigCallback):
    """Keeps the run's config beside it, without keys and tokens.

    Nor is the checkpoint kept that one of its starts went on from.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        config.ckpt_path = None
        super().__init__(parser, _without_secrets(config), save_to_log_dir=False, **kwargs)
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold the ranks' settings together, and find the run's folder, which Lightning sends."""
        if trainer.world_size > 1:
            own = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            read = [own] * trainer.world_size
            distributed.all_gather_object(read, own)
            require_same(read)
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`; on rank 0."""
        file = self._folder / self.config_filename
        with going_on_without(file):
            self._folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, file, skip_none=False, overwrite=True, multifile=False)


def require_same(read: Sequence[dict[str, Any]]) -> None:
    """Refuse settings that ranks have read differently: one would wait for the others for ever.

    Each reads the files itself, and somebody may have changed one meanwhile.

    Args:
        read: By each rank, the first one's first.

    Raises:
        ConfigError: The first setting that differs; on all ranks alike.
    """
    for rank, other in enumerate(read):
        for key, here, there in _differences(other, read[0]):
            if key != "trainer.devices":  # of each machine, its own
                raise ConfigError(
                    key,
                    f"must be what rank 0 has read, {there!r} (was a file changed as they began?)",
                    here,
                    f"Rank {rank} differs. Start again.",
                )


def _differences(own: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What two plain configs set differently: the dotted key, and both values."""
    if not (isinstance(own, dict) and isinstance(other, dict)):
        if own != other:
            yield key, own, other
        return
    for name in {**own, **other}:
        inner = f"{key}.{name}" if key else str(name)
        yield from _differences(own.get(name), other.get(name), inner)


def _without_secrets(value: Any) -> Any:
    """A copy of a config, or of a part: null for every key and token, URLs without passwords."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Namespace):
        copy = value.clone()
        for key, child in list(value.items()):
            name = key.rpartition(".")[2]
            copy[key] = None if is_secret(name, child) else _without_secrets(child)
        return copy
    if isinstance(value, dict):
        return {k: None if is_secret(k, v) else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value


def _require_local(folder: str) -> None:
    """Refuse what can't be a run's folder: servers and curves write to files of this machine."""
    if not folder.strip() or "://" in folder:
        raise ConfigError(
            "trainer.default_root_dir",
            "must be a folder of this machine",
            folder,
            "Leave it out for `runs/NAME`, and copy elsewhere when the run has ended.",
        )


def _checkpoint_folders(trainer: Any) -> list[Path]:
    """Where a Trainer's own callbacks and loggers have checkpoints written, by its config."""
    folders: list[Path] = []
    for each in listed(trainer.callbacks):
        settings = each.get("init_args") or {}
        if settings.get("dirpath"):
            folders.append(Path(settings["dirpath"]))
    for each in listed(trainer.logger):
        settings = each.get("init_args") or {}
        place = Path(settings.get("save_dir") or trainer.default_root_dir)
        names = (settings.get("name"), settings.get("project"))
        folders += [place / name for name in names if name is not None]
    return folders


def _servers_of(config: Any) -> Any:
    """What is said of the servers, also where `data` names a class."""
    data = config.data
    return data.init_args.servers if "class_path" in data else data.servers


def share_gpus(config: Any, present: list[int]) -> None:
    """Let the Trainer have the GPUs that SGLangServers leave, where neither was told which.

    Args:
        config: Of the run; changed.
        present: The GPUs that can be used.
    """
    servers = _servers_of(config)
    class_path = str(servers.class_path) if "class_path" in servers else ""
    wants_gpus = config.trainer.accelerator in ("auto", "gpu", "cuda")
    if not class_path.endswith("SGLangServers") or not wants_gpus:
        return
    if config.trainer.devices != "auto" or not present:
        return
    serving = servers.init_args.devices or serving_devices(present)
    training = training_devices(present, serving)
    if not training:
        raise ConfigError(
            f"`data.servers.init_args.devices` must leave a GPU to train on, got {serving} of "
            f"{present}. Name fewer."
        )
    config.trainer.devices = training


def _explained(error: Exception) -> Exception:
    """Lightning's refusals that name no setting, with the setting and a way out."""
    if "No supported gpu backend found" in str(error):
        return ConfigError(
            "trainer.accelerator",
            "must be one that this machine has, and there is no GPU",
            "gpu",
            "Run on a machine with one, or set `cpu`, as `--config quickstart.yaml` does.",
        )
    return error


def _is_default(logger: Any) -> bool:
    return logger is None or logger is True


def run_cli(
    command: str,
    configs: Sequence[tuple[str, Path]],
    options: Sequence[str],
    settings: Setting,
    module_class: type[LightningModule],
    datamodule_class: type[LightningDataModule],
    kind: str = "",
) -> None:
    """Parse, build and run one command of the Trainer.

    Args:
        command: `fit`, `validate` or `test`.
        configs: (name as given, path) of each config file.
        options: The command line's other options.
        settings: Both, with places.
        module_class: What the config's `model` may be.
        datamodule_class: What its `data` describes.
        kind: What it is called where it is not training (`replay`).

    Raises:
        ConfigProblem: A setting was refused: by the parser, a constructor, or while setting up.
    """
    make = functools.partial(GRPOCLI, command, kind=kind or command)
    with _built(make, configs, options, settings, module_class, datamodule_class):
        pass  # it has run


class UnrunCLI(GRPOCLI):
    """Builds what a command would run, and leaves it at that."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


_OF_ONE_RANK = {"shard_size": None, "sequence_parallel_size": 1, "cpu_offload": False}
"""Settings of `FSDP2Strategy` that need ranks or GPUs, as a single CPU has them."""


class PlannedCLI(UnrunCLI):
    """Builds, on this machine's CPU, what a command would run on a machine with its GPUs.

    Args:
        machine: Where it would run.
        others: Of GRPOCLI.

    Attributes:
        training: The GPUs that would train; none where the CPU does.
        ranks: How many processes would train, on all nodes.
    """

    def __init__(self, *others: Any, machine: Machine, **more: Any) -> None:
        self.machine = machine
        self.training: list[int] = []
        self.ranks = self._per_machine = 1
        self._of_strategy: dict[str, Any] = {}  # settings that need the ranks, or the GPUs
        super().__init__(*others, **more)

    def _share_gpus(self, config: Any) -> None:
        """As `fit` does there, before the Trainer is told to make do with this CPU."""
        trainer, present = config.trainer, self.machine.present
        share_gpus(config, present)
        wants = trainer.accelerator
        if wants in ("gpu", "cuda") and not present:
            raise ConfigError(
                "trainer.accelerator",
                "must be one that the machine has, and there is no GPU",
                wants,
                "Name the machine that is planned for: `--gpus 1 --gpu h200`.",
            )
        if wants == "cpu" or not present:
            processes = _devices(trainer.devices, range(MOST_SERVERS), [0])
        else:
            processes = self.training = _devices(trainer.devices, present, present)
        self._per_machine, self.ranks = len(processes), len(processes) * trainer.num_nodes
        trainer.accelerator, trainer.devices, trainer.num_nodes = "cpu", 1, 1
        settings = trainer.strategy.get("init_args") if "class_path" in trainer.strategy else None
        if settings is not None and "data_parallel_size" in settings:  # of a number of GPUs
            settings.data_parallel_size = "auto"
            for name, alone in _OF_ONE_RANK.items():
                self._of_strategy[name], settings[name] = settings[name], alone

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build it, and give the strategy back what a CPU must not be told."""
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.strategy, FSDP2Strategy):
            vars(trainer.strategy).update(self._of_strategy)
            trainer.strategy.check_ranks(self._per_machine, self.ranks // self._per_machine)
        return trainer


def _devices(given: Any, present: Sequence[int], default: list[int]) -> list[int]:
    """The devices that `trainer.devices` means; `default` where it names none."""
    words = given if isinstance(given, list) else str(given).split(",")
    if words in (["auto"], ["-1"]):
        return default
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        raise ConfigError("trainer.devices", "must be `auto` or numbers", given) from None
    several = isinstance(given, list) or len(numbers) > 1
    devices = numbers if several else list(range(numbers[0]))
    if not devices or not set(devices) <= set(present):
        count = len(present)
        way_out = "Name fewer, or plan for a machine with more: `--gpus N`."
        raise ConfigError(
            "trainer.devices", f"must be of the {count} that there are", given, way_out
        )
    return devices


@contextmanager
def build_run(
    configs: Sequence[tuple[str, Path]],
    options: Sequence[str],
    settings: Setting,
    module_class: type[LightningModule],
    datamodule_class: type[LightningDataModule],
    make: Callable[..., GRPOCLI] = UnrunCLI,
) -> Iterator[GRPOCLI]:
    """Build what `fit` would run, for somebody to look at.

    Its `trainer`, `model` and `datamodule` are what was built; arguments are those of `run_cli`,
    and `make` is what builds it.
    """
    make = functools.partial(make, "fit", kind="fit")
    with (
        _logged_if(is_no_seed),
        _built(make, configs, options, settings, module_class, datamodule_class) as built,
    ):
        yield built


@contextmanager
def _built(
    make: Callable[..., GRPOCLI],
    configs: Sequence[tuple[str, Path]],
    options: Sequence[str],
    settings: Setting,
    module_class: type[LightningModule],
    datamodule_class: type[LightningDataModule],
) -> Iterator[GRPOCLI]:
    silence_jsonargparse()
    # The parser refuses a file that says nothing, such as one whose lines are all comments.
    said = [path for name, path in configs if read_yaml(path, name).value]
    arguments = [part for path in said for part in ("--config", str(path))]
    with _quiet_lightning(), board_tells_itself(), _located(settings), ExitStack() as held:
        yield make(
            [*arguments, *options],
            settings,
            run_name=configs[0][1].stem if configs else "run",
            held=held,
            model_class=module_class,
            datamodule_class=datamodule_class,
            subclass_mode_model=True,
            subclass_mode_data=names_class(settings.value.get("data")),
            auto_configure_optimizers=False,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            save_config_callback=SaveConfig,
            parser_class=StrictParser,
        )


@contextmanager
def _located(settings: Setting) -> Iterator[None]:
    """Report a refused value at the place where it was written."""
    try:
        yield
    except ConfigProblem:
        raise
    except (ConfigError, MisconfigurationException) as error:
        raise locate(error, settings) from error


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Drop what says nothing about a run from Lightning's log, for the time of the run."""
    # Of Lightning's own code, about nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system")
    # Lightning makes DDP's gradients on a stream of its own; the two wait for each other.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    # What is resumed has a folder with checkpoints.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    with _logged_if(is_news):
        yield


@contextmanager
def _logged_if(is_logged: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Drop other lines of Lightning's log."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(is_logged)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_logged)


_NO_NEWS = (
    "Tip: ",
    " available: False",  # hardware that is not there
    "Initializing distributed: GLOBAL_RANK",
    "distributed_backend=",
    "that has Tensor Cores",  # matrix products are bf16 where that matters
    "LOCAL_RANK: ",
)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's says something of this run that its user doesn't know."""
    message = record.getMessage()
    return not any(words in message for words in _NO_NEWS)


def is_no_seed(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is another than that of the seed, of which no run comes."""
    return "Seed set to " not in record.getMessage()
