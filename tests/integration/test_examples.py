"""The examples as their users start them: a process of its own, an empty folder, few steps."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.fakes.programs import EXAMPLES, REPOSITORY, python
from tests.fakes.ranks import ROOT

MAX_FABRIC_LINES = 120


def shortened(script: Path, folder: Path, **values: int) -> Path:
    """A copy of a script with other numbers: `name=value` for each keyword."""
    text = script.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"\b{name}=\d+", f"{name}={value}", text)
        assert count == 1, f"{script} has {count} times {name}="
    copy = folder / script.name
    copy.write_text(text)
    return copy


def rewards(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"step +\d+.*?reward ([\d.]+)", printed)]


@pytest.mark.slow
def test_a_reward_may_stand_in_a_script_that_has_no_main_guard(tmp_path):
    script = shortened(
        EXAMPLES / "custom_reward/train.py",
        tmp_path,
        **{"max_steps": 2, "val_check_interval": 2, "limit": 16, "batch_size": 4, "group_size": 4},
    )
    printed = python(tmp_path, script)
    assert len(rewards(printed)) == 2
    assert "held-out at step 2" in printed


@pytest.mark.slow
def test_a_module_of_the_current_folder_trains_from_the_command_line(tmp_path):
    (tmp_path / "maxrl.py").write_text((EXAMPLES / "custom_module/maxrl.py").read_text())
    printed = python(
        tmp_path,
        *("-m", "lightning_grpo.cli.main", "fit", "--config", "quickstart.yaml"),
        *("--model", "maxrl.MaxRL", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"),
        *("--data.batch_size", "4", "--data.group_size", "4"),
    )
    assert len(rewards(printed)) == 2
    saved = (tmp_path / "runs/quickstart/version_0/config.yaml").read_text()
    assert "class_path: maxrl.MaxRL" in saved


@pytest.mark.slow
def test_the_fabric_loop_learns_publishes_and_exports(tmp_path):
    script = EXAMPLES / "fabric/train.py"
    printed = python(tmp_path, script, "--steps", "6", "--held-out", "16", "--out", "model")
    reward = rewards(printed)
    assert len(reward) == 6
    assert sum(reward[3:]) > sum(reward[:3]) + 0.1
    assert "held-out after" in printed
    assert (tmp_path / "model/model.safetensors").is_file()


def test_the_fabric_loop_can_be_read_in_one_sitting():
    lines = (EXAMPLES / "fabric/train.py").read_text().splitlines()
    assert len(lines) <= MAX_FABRIC_LINES


def test_the_front_page_shows_the_program_the_module_and_the_config_that_ship():
    page = (REPOSITORY / "README.md").read_text()
    program, module = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert structure(program) == structure((EXAMPLES / "custom_reward/train_gsm8k.py").read_text())
    assert structure(module) == structure((EXAMPLES / "custom_module/maxrl.py").read_text())
    assert len([line for line in program.splitlines() if line.strip()]) <= 16
    (config,) = re.findall(r"^```yaml\n(.*?)^```", page, re.S | re.M)
    shipped = (REPOSITORY / "configs/quickstart.yaml").read_text()
    assert config == shipped.split("\n", 1)[1]


def test_the_program_of_the_front_page_builds_without_a_gpu_or_the_hub(tmp_path):
    text = (EXAMPLES / "custom_reward/train_gsm8k.py").read_text()
    built = text.replace("trainer.fit(module, data)", "print(module.model_name, data.batch_size)")
    (tmp_path / "built.py").write_text(built)
    assert "Qwen/Qwen2.5-1.5B-Instruct 256" in python(tmp_path, "built.py")


def structure(source: str) -> str:
    """A program without its formatting and its docstring."""
    tree = ast.parse(source)
    if isinstance(tree.body[0], ast.Expr):
        tree.body.pop(0)
    return ast.dump(tree)


AREAL = EXAMPLES / "areal_gsm8k"
GSM8K_ROWS = [
    {"question": "Ann has 16 eggs and eats 7. How many are left?", "answer": "16-7=9\n#### 9"},
    {"question": "A robe takes 2 bolts, its belt 1,000. How many?", "answer": "...\n#### 1,002"},
]
"""GSM8K's two columns, and its mark."""

LOOK_AT_AREAL = """
import json, sys
from gsm8k import gsm8k_reward_fn, process_gsm8k_rl_dataset
from lightning_grpo.cli.main import main
from lightning_grpo import Prompts, RLVRWorkflow
from lightning_grpo.policy.load import load_tokenizer
from lightning_grpo.rollout.scoring import BoundReward
from lightning_grpo.shipped import resolve_path

rows = Prompts(sys.argv[1], column="messages", transform=process_gsm8k_rl_dataset)
loaded = rows.load(load_tokenizer(resolve_path("shipped:quickstart")))
RLVRWorkflow(gsm8k_reward_fn).validate(loaded.columns)
scores = []
for prompt in loaded:
    for said in (prompt.columns["answer"], "#### 9", "9"):
        arguments = BoundReward(gsm8k_reward_fn).arguments(prompt, said, [1])
        scores.append(gsm8k_reward_fn(**arguments))
print(json.dumps([loaded.columns, scores]), flush=True)
main(["fit", "--config", "gsm8k_grpo.yaml", "--print_config"])
"""


@pytest.fixture(scope="module")
def areal(tmp_path_factory) -> tuple[str, str]:
    """What the example's functions give, and its config as it is parsed."""
    rows = tmp_path_factory.mktemp("areal") / "gsm8k.jsonl"
    rows.write_text("\n".join(map(json.dumps, GSM8K_ROWS)))
    given, _, config = python(AREAL, "-c", LOOK_AT_AREAL, rows).partition("\n")
    return given, config


def test_areal_s_reward_and_dataset_function_take_gsm8k_s_columns(areal):
    columns, scores = json.loads(areal[0])
    assert columns == ["answer"]
    assert scores == [1, 1, 0, 1, 0, 0]


def test_areal_s_config_parses(areal):
    config = yaml.safe_load(areal[1])
    assert config["data"]["workflow"]["init_args"]["reward"] == "gsm8k.gsm8k_reward_fn"
    assert config["data"]["max_staleness"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--synchronous"]], ids=["asynchronous", "synchronous"])
def test_areal_s_program_trains_evaluates_and_exports(tmp_path, arguments):
    for file in ("gsm8k.py", "train.py"):
        shutil.copy(AREAL / file, tmp_path)
    printed = python(tmp_path, "train.py", "--steps", "3", "--held-out", "16", *arguments)
    assert len(rewards(printed)) == 3
    assert "held-out at step 3" in printed
    assert (tmp_path / "model/model.safetensors").is_file()
    staleness = re.findall(r"staleness (\d)", printed)
    assert staleness == (["0"] * 3 if arguments else ["0", "1", "2"])


# -- the notebooks of examples/ run from the first cell to the last, in a kernel as Jupyter's ------


FIRST, *OTHERS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NOTEBOOKS = [FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra [test]")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "save it without outputs"
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 20", "STEPS = 2").replace("limit=100", "limit=8")
    nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = "".join(each.get("text") or each["data"]["text/plain"] for each in outputs)
    assert "step 2/2" in shown
    assert "Traceback" not in shown
    assert "error:" not in shown
