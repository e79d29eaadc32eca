"""The Slurm job script: what is asked of sbatch, and what each node runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_grpo.cli.main import main
from lightning_grpo.errors import ConfigError
from lightning_grpo.launch.slurm import SlurmJob, job_script

SERVERS = {"class_path": "lightning_grpo.EmbeddedServers", "init_args": {"num_servers": 2}}


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


def test_the_command_prints_the_script_of_a_shipped_config(capsys):
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
        (["slurm"], "needs the name of a file"),
        (["slurm", "--config", "quickstart.yaml", "--train-nodes", "0"], "must be >= 1, got 0"),
        (["slurm", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_a_mistake_is_told_in_a_line(capsys, words, said):
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
