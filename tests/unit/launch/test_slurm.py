"""The Slurm job script: what is asked of sbatch, and what each node runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from lightning_grpo.cli.main import main
from lightning_grpo.errors import ConfigError
from lightning_grpo.launch.slurm import SlurmJob, job_script

GSM8K = ("--config", "gsm8k.yaml", "--gpus-per-node", "8")
SERVERS = {"class_path": "lightning_grpo.EmbeddedServers", "init_args": {"num_servers": 2}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**kwargs) -> SlurmJob:
    return SlurmJob(("python", "-m", "x"), ("--config", "a b.yaml"), SERVERS, **kwargs)


def test_the_script_is_valid_shell_and_asks_for_what_was_given():
    directives = {"partition": "gpu", "time": "1:00:00"}
    script = job_script(job(train_nodes=2, server_nodes=3, gpus_per_node=8, directives=directives))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    head = script.partition("\n\n")[0]
    for line in ("--nodes=5", "--gpus-per-node=8", "--partition=gpu", "--time=1:00:00"):
        assert f"#SBATCH {line}\n" in head + "\n"
    assert "#SBATCH --requeue\n#SBATCH --signal=USR1@120\n" in head


def test_servers_and_ranks_are_on_different_nodes_and_the_configs_own_servers_start():
    script = job_script(job(train_nodes=2, server_nodes=1, ranks_per_node=4))
    servers, trainer = script.split("\n# servers\n")[1].split("\n# trainer\n")
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=2" in servers
    assert "--nodes=2 --ntasks=8 --ntasks-per-node=4 --relative=0" in trainer
    assert "fit --config 'a b.yaml' --trainer.num_nodes 2 --trainer.devices 4" in trainer
    assert '"class_path": "lightning_grpo.EmbeddedServers"' in trainer


def words_of(script: str, program: str) -> list[str]:
    """The command that the job's script runs, as the shell would read it."""
    joined = script.replace("\\\n", "")
    line = next(line for line in joined.splitlines() if program in shlex.split(line))
    return shlex.split(line)


def printed(capsys, *options: str) -> str:
    assert main(["launch", "slurm", *options]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


@pytest.mark.parametrize(
    "spelled",
    [
        ("--data.servers.tp", "2"),
        ("--data.servers.tp=2",),
        ("--data.servers.init_args.tp", "2"),
        ("--data.servers", "SGLangServers", "--data.servers.tp", "2"),
        (
            "--data.servers",
            '{"class_path": "lightning_grpo.SGLangServers", "init_args": {"tp": 2}}',
        ),
    ],
)
def test_settings_of_the_servers_reach_the_nodes_that_serve(capsys, folder, spelled):
    command = words_of(printed(capsys, *GSM8K, *spelled), "fit")
    given = [word for word in command if word.startswith("--data.servers")]
    assert given == [f"--data.servers{part}" for part in ("", ".folder", ".num_nodes", ".servers")]
    servers = json.loads(command[command.index("--data.servers.servers") + 1])
    assert servers == {"class_path": "lightning_grpo.SGLangServers", "init_args": {"tp": 2}}


def test_without_server_nodes_settings_of_the_servers_stay_with_the_run(capsys, folder):
    script = printed(capsys, *GSM8K, "--server-nodes", "0", "--data.servers.tp", "2")
    command = words_of(script, "fit")
    assert command[command.index("--data.servers.tp") + 1] == "2"
    assert command[command.index("--trainer.devices") + 1] == "4"  # the servers have the others


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--data.servers.tp=16", "`data.servers.tp` must be at most `--gpus-per-node` (8)"),
        ("--data.servers={class_path: SGLangServers, init_args: {tp: 4, num_servers: 3}}", "3 x 4"),
        ("--data.servers.devices=[6,7,8]", "must be GPUs 0 to 7 of a node"),
        ("--ranks-per-node=9", "`--ranks-per-node` must be at most `--gpus-per-node` (8)"),
        ("--data.servers={class_path: RunningServers}", "Use `--server-nodes 0`"),
    ],
)
def test_what_a_node_can_not_hold_is_refused_before_the_job(capsys, folder, option, said):
    assert main(["launch", "slurm", *GSM8K, option]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_number_of_gpus_may_come_from_gres(capsys, folder):
    options = ("--config", "gsm8k.yaml", "--", "--gres=gpu:h100:4,shard:2")
    script = printed(capsys, *options)
    assert "#SBATCH --gres=gpu:h100:4,shard:2\n" in script
    assert "gpus-per-node" not in script
    assert "--trainer.devices 4" in script
    assert main(["launch", "slurm", "--data.servers.tp", "8", *options]) == 2


def test_both_steps_ask_for_their_cores_which_srun_does_not_inherit(capsys, folder):
    script = printed(capsys, *GSM8K, "--cpus-per-task", "12")
    assert "--relative=0 --exact --cpus-per-task=12 " in script
    assert "--relative=1 --exact --cpus-per-task=96 " in script
    assert "#SBATCH --ntasks-per-node=8\n" in script
    script = printed(capsys, *GSM8K)
    assert "--relative=0 --exact --cpus-per-task=$((SLURM_CPUS_ON_NODE / 8)) " in script
    assert "--relative=1 --exact --cpus-per-task=$SLURM_CPUS_ON_NODE " in script


def test_any_option_of_sbatch_passes_and_takes_the_place_of_the_scripts_own(capsys, folder):
    passed = ["--exclusive", "-x", "n[3-4]", "-pgpu", "--comment", "a b", "--no-requeue"]
    script = printed(capsys, *GSM8K, "--time", "1:00", "--", *passed, "--output=logs/a/%x/%j.out")
    head = script.partition("\n\n")[0].splitlines()
    for line in ("exclusive", "exclude=n[3-4]", "partition=gpu", "comment='a b'", "no-requeue"):
        assert f"#SBATCH --{line}" in head
    assert "#SBATCH --requeue" not in head
    assert [line for line in head if "--output" in line] == ["#SBATCH --output=logs/a/%x/%j.out"]
    assert (folder / "logs" / "a").is_dir()


def test_what_runs_may_be_in_a_container(capsys, folder):
    program = "apptainer exec --nv image.sif lightning-grpo"
    container = ["--container-image=a.sqsh", "--container-writable"]
    script = printed(capsys, *GSM8K, "--program", program, "--", *container)
    assert script.count(f"\n  {program} ") == 2
    assert script.count(" --container-image=a.sqsh --container-writable \\\n") == 2
    assert "#SBATCH --container" not in script


def test_modules_may_be_in_a_container_alone(capsys, folder):
    reward = ("--data.workflow.reward", "in_the_image_alone.reward")
    assert reward[1] in printed(capsys, *GSM8K, *reward, "--program", "in_image lightning-grpo")
    assert main(["launch", "slurm", *GSM8K, *reward]) == 2
    assert "no module `in_the_image_alone`" in capsys.readouterr().err


def test_the_folder_of_the_log_is_there_before_the_job(capsys, folder):
    printed(capsys, *GSM8K, "--folder", "all/runs")
    assert (folder / "all" / "runs").is_dir()


def test_a_setup_may_read_unset_variables(capsys, folder):
    setup = ["--setup", 'echo "conda:$NOT_SET"', "--setup", "export HF_HUB_OFFLINE=1"]
    script = printed(capsys, *GSM8K, *setup)
    assert script.index("HF_HUB_OFFLINE") < script.index("set -u")
    begin = script.partition("run=$(")[0]
    assert subprocess.run(["bash", "-e"], input=begin, text=True, check=False).returncode == 0


def test_without_server_nodes_the_run_starts_its_servers_itself():
    script = job_script(job(server_nodes=0))
    assert "server-node" not in script
    assert "SlurmServers" not in script


@pytest.mark.parametrize(
    ("name", "value"), [("train_nodes", 0), ("server_nodes", -1), ("ranks_per_node", 0)]
)
def test_an_impossible_number_of_nodes_is_refused_by_its_option(name, value):
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"`--{option}` must be >= .*, got {value}"):
        job(**{name: value})


def test_a_refusal_of_slurm_s_is_told_in_its_own_words(capsys, monkeypatch, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: none' >&2; exit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    words = ["--config", "quickstart.yaml", "--partition", "none", "--submit"]
    assert main(["launch", "slurm", *words]) == 2
    said = "error: Slurm refused the job: sbatch: error: invalid partition: none\n"
    assert capsys.readouterr().err == said


def test_submitting_without_slurm_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", "--config", "quickstart.yaml", "--submit"]) == 2
    assert "`--submit` needs `sbatch`, which is not on this machine" in capsys.readouterr().err


def test_the_command_prints_the_script_of_a_shipped_config(capsys, folder):
    code = main(["launch", "slurm", "--config", "quickstart.yaml", "--trainer.max_steps", "4"])
    script = capsys.readouterr().out
    assert code == 0
    assert "#SBATCH --job-name=quickstart" in script
    assert "--trainer.max_steps 4" in script
    assert sys.executable in script


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slrum"], "did you mean `slurm`?"),
        (["slurm", "--config", "gsm8k.yaml", "--gres=gpu:8"], "options of sbatch stand at the end"),
        (["slurm", "--config", "gsm8k.yaml", "--", "gpu"], "begin with `-`, got `gpu`"),
        (["slurm", "--config", "gsm8k.yaml", "--", "-N", "3"], "Use `--train-nodes` and"),
        (
            ["slurm", "--config", "gsm8k.yaml", "--data.servers.tpp", "2"],
            "did you mean `data.servers.tp`?",
        ),
        (["slurm"], "needs the name of a file"),
        (["slurm", "--config", "quickstart.yaml", "--train-nodes", "0"], "must be >= 1, got 0"),
        (["slurm", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_a_mistake_is_told_in_a_line(capsys, words, said):
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
