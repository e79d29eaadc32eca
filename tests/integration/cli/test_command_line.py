"""The command line as its users have it: in a process of its own, from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
HEAVY = "[m for m in ('torch', 'lightning', 'transformers', 'jsonargparse') if m in sys.modules]"


def python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder, with the package importable and nothing else of ours."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def lightning_grpo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(["-m", "lightning_grpo.cli.main", *arguments], folder)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fitt"]])
def test_help_and_typing_errors_cost_no_heavy_import(arguments, tmp_path):
    code = f"import sys\nfrom lightning_grpo.cli.main import main\nmain({arguments})\n"
    done = python(["-c", f"{code}print({HEAVY})"], tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def test_broken_yaml_is_refused_before_any_heavy_import(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer:\n  max_steps: 3\n model: x\n")
    code = "import sys\nfrom lightning_grpo.cli.main import main\n"
    done = python(["-c", f"{code}print(main(['fit', '--config', 'a.yaml']), {HEAVY})"], tmp_path)
    assert done.stdout == "2 []\n"
    assert done.stderr.splitlines()[0] == "error: (a.yaml, line 3)"


@pytest.mark.slow
def test_a_misspelt_option_of_a_shipped_config_is_three_lines_and_code_2(tmp_path):
    done = lightning_grpo(tmp_path, "fit", "--config", "quickstart.yaml", "--data.max_stal", "7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: data.max_stal (command line)",
        "  is not a setting of RolloutDataModule, got 7",
        "  did you mean `data.max_staleness`?",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_reward_with_a_fault_of_its_own_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("import nonexistent_library\n")
    done = lightning_grpo(
        tmp_path, "fit", "--config", "quickstart.yaml", "--data.workflow.reward", "mine.reward"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: data.workflow.reward (command line)",
        "  `mine.reward` can't be imported: there is no module `nonexistent_library`",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["quickstart.yaml", "gsm8k.yaml"])
def test_a_shipped_config_parses_with_a_module_of_the_current_folder(config, tmp_path):
    (tmp_path / "maxrl.py").write_text(
        "from lightning_grpo import GRPOModule, group_mean\n\n"
        "class MaxRL(GRPOModule):\n"
        "    def advantages(self, rewards, group_ids):\n"
        "        mean = group_mean(rewards, group_ids)\n"
        "        return (rewards - mean) / mean.clamp_min(1e-6)\n"
    )
    done = lightning_grpo(
        tmp_path, "fit", "--config", config, "--model", "maxrl.MaxRL", "--print_config"
    )
    assert done.returncode == 0, done.stderr
    given = yaml.safe_load((REPOSITORY / "configs" / config).read_text())
    parsed = yaml.safe_load(done.stdout)
    assert parsed["model"]["class_path"] == "maxrl.MaxRL"
    assert parsed["model"]["init_args"]["model"] == given["model"]["model"]
    assert parsed["data"]["group_size"] == given["data"]["group_size"]


@pytest.mark.slow
def test_a_data_module_of_ones_own_is_trained_with_and_its_run_replayed(tmp_path):
    (tmp_path / "own.py").write_text(
        "from lightning_grpo import RolloutDataModule\n\n"
        "class Mine(RolloutDataModule):\n"
        "    def __init__(self, *args, hint: str = '', **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.hint = hint\n"
        "    def make_prompt(self, row, tokenizer):\n"
        "        asked = {**row, 'question': row['question'] + self.hint}\n"
        "        return super().make_prompt(asked, tokenizer)\n"
    )
    short = ("--trainer.max_steps", "2", "--data.batch_size", "2", "--data.group_size", "2")
    own = ("--data", "own.Mine", "--data.hint", " Quickly!", "--data.val_prompts", "null")
    done = lightning_grpo(tmp_path, "fit", "--config", "quickstart.yaml", *own, *short)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/quickstart"
    kept = yaml.safe_load((run / "version_0/config.yaml").read_text())["data"]
    assert (kept["class_path"], kept["init_args"]["hint"]) == ("own.Mine", " Quickly!")
    shown = lightning_grpo(tmp_path, "show", str(run), "--limit", "1")
    assert " Quickly!" in shown.stdout
    again = lightning_grpo(tmp_path, "replay", "--from", str(run))
    assert again.returncode == 0, again.stderr
    assert "step 2/2" in again.stdout
