"""What a good configuration does, with stand-ins for the module and the data module."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from lightning_grpo.cli.fit import find_config, split_configs, split_recording
from lightning_grpo.cli.main import main
from lightning_grpo.cli.runs import last_checkpoint, version_of
from lightning_grpo.cli.sources import ConfigProblem, collect
from lightning_grpo.cli.trainer_cli import is_news, require_same, run_cli
from lightning_grpo.errors import ConfigError
from tests.fakes.cli_stubs import GRPOModule, RolloutDataModule

SMALL = """\
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  enable_progress_bar: false
model:
  model: shipped:quickstart
  loss:
    class_path: tests.fakes.cli_stubs.GRPOLoss
    init_args: {clip_high: 0.28}
  correction: tests.fakes.cli_stubs.TokenTIS
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {lr: 1e-4}
data:
  prompts: &prompts {path: train.jsonl, column: question}
  val_prompts: {<<: *prompts, path: test.jsonl, limit: 500}
  workflow:
    class_path: tests.fakes.cli_stubs.RLVRWorkflow
    init_args:
      reward: [tests.fakes.cli_stubs.reward]
      sampling: {max_new_tokens: 56}
  servers: tests.fakes.cli_stubs.EmbeddedServers
  group_size: 4
"""


class Recorder(RolloutDataModule):
    """Keeps what was built."""

    built: list[tuple[GRPOModule, RolloutDataModule]] = []  # noqa: RUF012 - shared on purpose

    def setup(self, stage: str) -> None:
        self.built.append((self.trainer.lightning_module, self))


@pytest.fixture
def run(tmp_path):
    """Run a command with SMALL as `small.yaml`; what was built comes back."""
    (tmp_path / "small.yaml").write_text(SMALL)

    def run_command(
        *arguments: str, command: str = "fit", kind: Sequence[str] = ()
    ) -> tuple[GRPOModule, RolloutDataModule]:
        Recorder.built.clear()
        configs, options = split_configs(list(arguments) or ["--config", "small.yaml"])
        settings = collect(configs, options)
        run_cli(command, configs, options, settings, GRPOModule, Recorder, *kind)
        return Recorder.built[-1]

    return run_command


def test_a_config_becomes_the_objects_that_it_names(run):
    module, data = run()
    assert module.model == "shipped:quickstart"
    assert (module.loss.clip_low, module.loss.clip_high) == (0.2, 0.28)
    assert module.correction.cap == 2.0
    assert module.optimizer([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 1e-4
    assert data.group_size == 4
    assert data.workflow.sampling.max_new_tokens == 56


def test_the_command_line_wins_over_the_file_in_either_order(run):
    module, data = run(
        "--data.group_size", "6", "--config", "small.yaml", "--model.loss.clip_high=0.3"
    )
    assert data.group_size == 6
    assert module.loss.clip_high == 0.3


def test_a_later_file_wins_over_an_earlier_one(run, tmp_path):
    (tmp_path / "more.yaml").write_text("data: {group_size: 5}\n")
    _, data = run("--config=small.yaml", "--config=more.yaml")
    assert data.group_size == 5


def test_a_file_whose_lines_are_all_comments_changes_nothing(run, tmp_path):
    (tmp_path / "more.yaml").write_text("# data: {group_size: 5}\n")
    _, data = run("--config=small.yaml", "--config=more.yaml")
    assert data.group_size == 4


def test_a_subclass_in_the_current_folder_keeps_the_files_arguments(run, tmp_path, monkeypatch):
    (tmp_path / "mymaxrl.py").write_text(
        "from tests.fakes.cli_stubs import GRPOModule\n\nclass MaxRL(GRPOModule):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module, _ = run("--config", "small.yaml", "--model", "mymaxrl.MaxRL")
    assert type(module).__name__ == "MaxRL"
    assert module.loss.clip_high == 0.28
    assert module.model == "shipped:quickstart"


def test_a_run_leaves_its_config_and_metrics_in_one_folder(run, tmp_path):
    run()
    folder = tmp_path / "runs" / "small" / "version_0"
    with (folder / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1"]
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "config.yaml").exists()
    assert list((folder / "checkpoints").glob("*.ckpt"))


class Refusing(Recorder):
    def setup(self, stage: str) -> None:
        raise ConfigError("`group_size` must be something else, got 4. Way out.")


def test_a_run_that_is_refused_leaves_no_folder_and_no_other_run_s(run, tmp_path):
    run()
    configs, options = split_configs(["--config", "small.yaml"])
    with pytest.raises(ConfigProblem, match="must be something else"):
        run_cli("fit", configs, options, collect(configs, options), GRPOModule, Refusing)
    assert [path.name for path in (tmp_path / "runs" / "small").iterdir()] == ["version_0"]
    assert (tmp_path / "runs" / "small" / "version_0" / "config.yaml").exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    "options", [[], ["--trainer.strategy=ddp_spawn"], ["--trainer.logger=false"]]
)
def test_a_refusal_leaves_no_empty_folder(command, options, run, tmp_path):
    del run  # writes the config
    before = os.listdir(tmp_path)
    configs, options = split_configs(["--config=small.yaml", *options])
    with pytest.raises(ConfigProblem):
        run_cli(command, configs, options, collect(configs, options), GRPOModule, Refusing)
    assert os.listdir(tmp_path) == before


def test_a_run_folder_that_is_a_file_is_refused_in_one_message(run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/small").touch()
    with pytest.raises(ConfigProblem, match="a file is in its place"):
        run()


def test_a_second_run_gets_a_folder_of_its_own(run, tmp_path):
    run()
    run()
    folders = sorted(path.name for path in (tmp_path / "runs" / "small").iterdir())
    assert folders == ["version_0", "version_1"]


def test_the_saved_config_builds_the_same_run_again(run, tmp_path):
    run("--config", "small.yaml", "--data.group_size", "6")
    saved = tmp_path / "runs" / "small" / "version_0" / "config.yaml"
    module, data = run("--config", str(saved))
    assert data.group_size == 6
    assert module.loss.clip_high == 0.28
    assert module.correction.cap == 2.0
    again = tmp_path / "runs" / "small" / "version_1" / "config.yaml"
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(saved.read_text())


def test_our_trainer_defaults_are_in_the_saved_config(run, tmp_path):
    run()
    saved = yaml.safe_load((tmp_path / "runs/small/version_0/config.yaml").read_text())
    assert saved["trainer"]["num_sanity_val_steps"] == 0
    assert saved["trainer"]["log_every_n_steps"] == 1
    assert saved["trainer"]["default_root_dir"] == str(Path("runs") / "small")


def test_a_run_goes_on_from_its_last_checkpoint_in_its_own_folder(run, tmp_path):
    run()
    module, _ = run(
        "--config", "small.yaml", "--ckpt_path", "last", "--trainer.max_steps", "4",
        "--data.group_size", "6",
    )  # fmt: skip
    assert module.trainer.global_step == 4
    folder = tmp_path / "runs" / "small" / "version_0"
    # A replay of this folder, or a run of its config, begins at the beginning.
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert curve(folder) == ["0", "1", "2", "3"]
    assert not list(folder.glob("metrics-*.csv"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as a new version's does
def test_however_often_a_run_goes_on_it_keeps_as_many_checkpoints(run, tmp_path):
    each = {"every_n_train_steps": 1, "save_top_k": 2, "monitor": "step", "mode": "max"}
    each["filename"] = "at-{step}"
    keeps = [f"--trainer.callbacks.{name}={value}" for name, value in each.items()]
    options = ["--config=small.yaml", "--trainer.callbacks=ModelCheckpoint", *keeps]
    kept = "runs/small/version_0/checkpoints/*.ckpt"
    for steps in (3, 6, 9):  # more than are kept, so that the one it came from has its turn
        run(*options, "--ckpt_path=last-or-none", f"--trainer.max_steps={steps}")
        names = {path.name for path in tmp_path.glob(kept)}
        assert names == {f"at-step={step}.ckpt" for step in (steps - 1, steps)}
    # One that somebody named is theirs to remove.
    (newest,) = tmp_path.glob(kept.replace("*", "*step=9"))
    run(*options, f"--ckpt_path={newest}", "--trainer.max_steps=12")
    assert newest.exists()


ENDS = """\
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 2, save_top_k: 1, filename: "{step}", save_last: SAVE_LAST}
    - lightning_grpo.callbacks.recording.FinalCheckpoint
    - lightning_grpo.callbacks.signals.SignalHandling
"""


@pytest.mark.parametrize("save_last", ["null", "link"])
def test_what_the_end_of_training_saved_goes_once_the_run_went_on_from_it(run, tmp_path, save_last):
    (tmp_path / "saves.yaml").write_text(ENDS.replace("SAVE_LAST", save_last))
    options = ["--config=small.yaml", "--config=saves.yaml"]
    for steps in (3, 5, 7):
        run(*options, "--ckpt_path=last-or-none", f"--trainer.max_steps={steps}")
        found = {path.resolve().name for path in tmp_path.glob("runs/small/*/checkpoints/*.ckpt")}
        assert found == {f"final-step={steps}.ckpt", f"step={steps - 1}.ckpt"}


def test_the_checkpoint_that_a_stopped_run_names_is_its_last_one_too(run, tmp_path):
    run()
    (checkpoint,) = (tmp_path / "runs/small/version_0/checkpoints").glob("*.ckpt")
    run("--config=small.yaml", f"--ckpt_path={checkpoint}", "--trainer.max_steps=3")
    assert os.listdir(tmp_path / "runs/small") == ["version_0"]
    assert curve(tmp_path / "runs/small/version_0") == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as a new version's does
def test_from_an_earlier_checkpoint_begins_another_curve(run, tmp_path):
    every = "--trainer.callbacks.every_n_train_steps=1"
    saves = ["--trainer.callbacks=ModelCheckpoint", every, "--trainer.callbacks.save_top_k=-1"]
    run("--config=small.yaml", *saves)
    before = snapshot(tmp_path / "runs/small/version_0")
    (earlier,) = (tmp_path / "runs/small/version_0/checkpoints").glob("*step=1.ckpt")
    run("--config=small.yaml", *saves, f"--ckpt_path={earlier}", "--trainer.max_steps=3")
    assert snapshot(tmp_path / "runs/small/version_0") == before
    assert curve(tmp_path / "runs/small/version_1") == ["1", "2"]


def test_a_replay_goes_on_with_its_own_last_checkpoint(run, tmp_path):
    run()
    with pytest.raises(ConfigProblem, match="`last` finds none of this run"):
        run("--config=small.yaml", "--ckpt_path=last", kind=["replay"])
    run("--config=small.yaml", "--trainer.max_steps=1", kind=["replay"])
    module, _ = run(
        "--config=small.yaml", "--ckpt_path=last", "--trainer.max_steps=3", kind=["replay"]
    )
    assert module.trainer.global_step == 3
    assert curve(tmp_path / "runs/small-replay/version_0") == ["0", "1", "2"]


def test_what_reads_a_run_of_the_current_folder_writes_below_it(run, tmp_path):
    run("--config=small.yaml", "--trainer.default_root_dir=.")
    run("--config=small.yaml", "--trainer.default_root_dir=.", command="validate")
    assert (tmp_path / "version_0/metrics.csv").exists()
    assert (tmp_path / "validate/version_0/config.yaml").exists()
    assert not (tmp_path / "version_1").exists()


def curve(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """What every file of a folder holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


SAVES = ["--trainer.callbacks=ModelCheckpoint"]
CSV = "lightning.pytorch.loggers.CSVLogger"
PLACES = {
    "a metric with a slash in the name": [
        *SAVES, "--trainer.callbacks.filename={step}-{eval/avg_at_1:.2f}",
    ],
    "a folder of the user's": [*SAVES, "--trainer.callbacks.dirpath=elsewhere"],
    "two folders": [
        *SAVES, "--trainer.callbacks.dirpath=elsewhere", "--trainer.callbacks.save_last=true",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=a/b/{step}",
        "--trainer.callbacks.every_n_train_steps=1",
    ],
    "a link": [*SAVES, "--trainer.callbacks.save_last=link"],
    "no logger": ["--trainer.logger=false"],
    "a logger of the user's": [
        f"--trainer.logger={CSV}", "--trainer.logger.save_dir=logs", "--trainer.logger.name=mine",
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as a new version's does
@pytest.mark.parametrize("place", PLACES)
def test_last_finds_a_run_s_checkpoint_wherever_it_was_put(place, run, caplog):
    first, _ = run("--config", "small.yaml", *PLACES[place])
    assert first.trainer.global_step == 2
    more = ["--ckpt_path=last", "--trainer.max_steps=4"]
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    module, _ = run("--config", "small.yaml", *PLACES[place], *more)
    assert "Restored all states from the checkpoint at" in caplog.text
    assert module.trainer.global_step == 4


READERS = {"validate": ["validate"], "test": ["test"], "replay": ["fit", "replay"]}
READINGS = [(reader, "nothing of the user's") for reader in READERS]
READINGS += [("validate", "two folders"), ("validate", "a logger of the user's")]
READINGS += [("replay", place) for place in PLACES if place != "a link"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("reader", "place"), READINGS)
def test_a_command_that_reads_a_run_writes_nothing_into_it(reader, place, run, tmp_path):
    own = ["--config=small.yaml", *PLACES.get(place, ())]
    run(*own)
    run(*own, "--ckpt_path=last", "--trainer.max_steps=3")
    before = snapshot(tmp_path)
    command, *kind = READERS[reader]
    run(*own, "--trainer.limit_val_batches=1", "--data.group_size=6", command=command, kind=kind)
    if reader != "replay":
        run(*own, "--ckpt_path=last", command=command, kind=kind)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    new = set(after) - set(before)
    assert new
    assert all(f"-{reader}/" in name for name in new)
    # And the next one goes on with the training, not with what was read.
    module, _ = run(*own, "--ckpt_path=last", "--trainer.max_steps=4")
    assert module.trainer.global_step == 4


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_last_is_refused_where_there_is_no_checkpoint_unless_that_is_said(command, run, tmp_path):
    stray = tmp_path / "runs/small/version_0/checkpoints/step=1.ckpt"
    stray.mkdir(parents=True)  # a folder of shards that was not finished
    with pytest.raises(ConfigProblem, match=r"(?s)`last` finds none.*`last-or-none`, which"):
        run("--config=small.yaml", "--ckpt_path=last", command=command)
    module, _ = run("--config=small.yaml", "--ckpt_path=last-or-none", command="fit")
    assert module.trainer.global_step == 2
    module, _ = run(
        "--config=small.yaml", "--ckpt_path=last-or-none", "--trainer.max_steps=3", command="fit"
    )
    assert module.trainer.global_step == 3


def test_the_newest_checkpoint_is_the_last_one(tmp_path):
    for version, age_s in ((0, 5), (1, 50)):
        checkpoint = tmp_path / f"version_{version}" / "checkpoints" / "x.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        os.utime(checkpoint, (1e9 - age_s, 1e9 - age_s))
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "version_0" / "checkpoints" / "x.ckpt"
    assert version_of(found) == 0
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_checkpoints_own_settings_do_not_override_the_command_line(run, tmp_path):
    run()
    (checkpoint,) = (tmp_path / "runs/small/version_0/checkpoints").glob("*.ckpt")
    module, _ = run(
        "--config", "small.yaml", "--ckpt_path", str(checkpoint), "--model.loss.clip_high", "0.4"
    )
    assert module.loss.clip_high == 0.4


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated_with_the_config_of_its_run(command, run, tmp_path, capsys):
    run()
    (checkpoint,) = (tmp_path / "runs/small/version_0/checkpoints").glob("*.ckpt")
    arguments = ["--config=small.yaml", f"--ckpt_path={checkpoint}"]
    module, _ = run(*arguments, "--trainer.limit_val_batches=1", command=command)
    assert float(module.trainer.callback_metrics["eval/avg_at_1"]) == 0.25


def test_print_config_prints_a_config_that_parses(run, capsys):
    with pytest.raises(SystemExit) as left:
        run("--config", "small.yaml", "--print_config")
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["group_size"] == 4


def test_a_shipped_config_is_found_by_its_name():
    ((name, path),), options = split_configs(["--config", "quickstart.yaml", "--a", "1"])
    assert name == "quickstart.yaml"
    assert path.is_file()
    assert options == ["--a", "1"]


def test_a_file_of_the_current_folder_hides_the_shipped_one(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("trainer: {}\n")
    ((_, path),), _ = split_configs(["-c", "quickstart.yaml"])
    assert path.read_text() == "trainer: {}\n"


@pytest.mark.parametrize("name", ["quickstart.yaml", "gsm8k.yaml"])
def test_shipped_configs_have_only_known_sections(name):
    configs, _ = split_configs(["--config", name])
    assert {"trainer", "model", "data"} <= set(collect(configs, []).value)


def test_a_refusal_while_setting_up_is_reported_at_its_setting(tmp_path):
    class Refusing(RolloutDataModule):
        def setup(self, stage):
            raise ConfigError(
                "`trainer.max_steps` must be a multiple of 4, got 2 steps. The nearest is 4."
            )

    (tmp_path / "small.yaml").write_text(SMALL)
    configs, options = split_configs(["--config", "small.yaml"])
    settings = collect(configs, options)
    with pytest.raises(ConfigProblem) as caught:
        run_cli("fit", configs, options, settings, GRPOModule, Refusing)
    assert str(caught.value).splitlines() == [
        "trainer.max_steps (small.yaml, line 4)",
        "  `trainer.max_steps` must be a multiple of 4, got 2 steps",
        "  The nearest is 4.",
    ]


def test_one_thread_is_used_on_cpus_unless_the_user_chose(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("line", "news"),
    [
        ("You are using a CUDA device ('NVIDIA H200') that has Tensor Cores. To ...", False),
        ("Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/1", False),
        ("----\ndistributed_backend=nccl\nAll distributed processes registered.", False),
        ("TPU available: False, using: 0 TPU cores", False),
        ("Restored all states from the checkpoint at step=4.ckpt", True),
    ],
)
def test_of_lightnings_lines_those_are_shown_that_say_something_new(line, news):
    assert is_news(logging.makeLogRecord({"msg": line})) is news


def test_the_help_lists_losses_of_this_package_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--model.help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "lightning_grpo.M2POLoss" in said
    assert "torch.sparse" not in said


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--data.help"], "--data.max_staleness"),
        (
            ["--config", "quickstart.yaml", "--data.batch_size", "2", "--data.help"],
            "--data.prompts",
        ),
        (["--data.help", "lightning_grpo.ReplayDataModule"], "--data.trajectories"),
        (["--data.help=lightning_grpo.ReplayDataModule"], "--data.trajectories"),
    ],
)
def test_the_help_of_data_needs_no_class_to_be_named(options, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options])
    assert ended.value.code == 0
    assert shown in capsys.readouterr().out


def test_a_key_is_not_printed_with_the_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "data:\n  servers:\n    class_path: lightning_grpo.RunningServers\n"
        "    init_args: {urls: ['http://a:1'], api_key: s3cret}\n"
    )
    with pytest.raises(SystemExit):
        main("fit --config quickstart.yaml --config mine.yaml --print_config".split())
    printed = capsys.readouterr().out
    assert "http://a:1" in printed
    assert "s3cret" not in printed


# ---- `lightning-grpo replay` before anything heavy is imported ----------------------------------


@pytest.mark.parametrize("words", [["--from", "{}"], ["--from={}"]])
def test_the_recording_is_taken_out_of_the_options(tmp_path, words):
    options = ["--trainer.max_steps", "3", *(word.format(tmp_path) for word in words)]
    assert split_recording(options) == (tmp_path, ["--trainer.max_steps", "3"])


@pytest.mark.parametrize("options", [["--trainer.max_steps", "3"], ["--from"]])
def test_a_missing_recording_is_asked_for(options):
    with pytest.raises(ConfigProblem, match="needs the folder of a run"):
        split_recording(options)


def test_a_recording_that_does_not_exist_is_named(capsys, tmp_path):
    assert main(["replay", "--from", str(tmp_path / "none")]) == 2
    assert "must exist, got" in capsys.readouterr().err


def test_the_config_of_the_run_is_found_from_its_folder_its_trajectories_and_a_file(tmp_path):
    folder = tmp_path / "trajectories"
    folder.mkdir()
    (folder / "step_1.parquet").touch()
    with pytest.raises(ConfigProblem, match=r"no config\.yaml"):
        find_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    for recording in (tmp_path, folder, folder / "step_1.parquet"):
        assert find_config(recording) == tmp_path / "config.yaml"


def test_of_a_run_of_several_versions_the_config_of_the_last_is_taken(tmp_path):
    folder = tmp_path / "version_3/trajectories"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigProblem, match="No trajectories at"):
        find_config(tmp_path)
    (folder / "step_1.parquet").touch()
    (tmp_path / "version_3/config.yaml").touch()
    assert find_config(tmp_path) == tmp_path / "version_3/config.yaml"


def test_a_class_of_the_run_that_is_no_longer_found_is_named_in_its_replay(tmp_path, capsys):
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories/step_1.parquet").touch()
    (tmp_path / "config.yaml").write_text("data: {class_path: not_there.Data}\nmodel: {model: m}\n")
    assert main(["replay", "--from", str(tmp_path)]) == 2
    assert "`not_there.Data` can't be imported" in capsys.readouterr().err


def test_help_needs_no_recording(capsys):
    assert main(["replay", "--help"]) == 0
    assert "lightning-grpo replay --from RUN" in capsys.readouterr().out


def test_a_rank_that_has_read_other_settings_than_the_first_is_refused():
    first = {"trainer": {"max_steps": 3, "devices": [0, 1]}, "data": {"batch_size": 4}}
    other = {**first, "trainer": {"max_steps": 3, "devices": [2, 3]}}
    require_same([first, other])
    other["trainer"]["max_steps"] = 2
    said = r"`trainer.max_steps` must be what rank 0 has read, 3 .* got 2. Rank 1 differs."
    with pytest.raises(ConfigError, match=said):
        require_same([first, other])
