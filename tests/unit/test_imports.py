"""What imports where torch is not installed, and what an import may do."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_grpo.hparams import import_object
from lightning_grpo.moved import MOVED

PACKAGE = Path(__file__).parents[2] / "lightning_grpo"
TORCH_FREE = ("types", "errors", "report", "rewards", "rollout", "servers", "shipped")
MAX_LINES = 600

BLOCKED_IMPORT = """
import importlib, sys

class Blocker:
    blocked = {"torch", "lightning", "pytorch_lightning", "transformers", "torchmetrics"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    importlib.import_module(name)
leaked = Blocker.blocked & {name.partition(".")[0] for name in sys.modules}
assert not leaked, leaked
"""


def modules_of(name: str) -> list[str]:
    folder = PACKAGE / name
    full = f"lightning_grpo.{name}"
    if not folder.is_dir():
        return [full]
    found = pkgutil.walk_packages([str(folder)], prefix=f"{full}.")
    return [full, *(module.name for module in found)]


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("name", TORCH_FREE)
def test_it_imports_where_torch_and_lightning_are_not_installed(name):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT, "lightning_grpo", *modules_of(name)],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_blocker_of_the_test_above_does_block():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT, "torch"], capture_output=True, text=True, check=False
    )
    assert "torch is blocked" in done.stderr


@pytest.mark.parametrize("path", python_files(), ids=named)
def test_a_module_is_ascii_and_stays_readable_in_one_go(path):
    text = path.read_text(encoding="ascii")
    # Blank lines are no reading; past the limit a concept waits to be named.
    assert len([line for line in text.splitlines() if line.strip()]) <= MAX_LINES


@pytest.mark.parametrize("path", python_files(), ids=named)
def test_a_protocol_is_checked_the_same_on_every_python(path):
    # From 3.12 on typing's own check does not see what a module finds by __getattr__.
    assert not re.search(r"^from typing import .*\bruntime_checkable\b", path.read_text(), re.M)


@pytest.mark.parametrize(
    "path",
    [p for p in python_files() if p.name == "__init__.py" and p.parent.parent == PACKAGE],
    ids=named,
)
def test_the_init_of_a_folder_is_a_docstring_and_at_most_names_of_its_own_modules(path):
    if path.parent.name == "shipped":
        pytest.skip("the folder has no other module")
    own = f"lightning_grpo.{path.parent.name}."
    docstring, *rest = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    for statement in rest:
        names_own_module = isinstance(statement, ast.ImportFrom) and (
            (statement.module or "").startswith(own)
        )
        is_all = isinstance(statement, ast.Assign) and ast.unparse(statement.targets) == "__all__"
        assert names_own_module or is_all, ast.unparse(statement)


def test_a_module_and_its_data_load_where_no_extra_is_installed():
    code = "import sys\nfor extra in ('peft', 'ray', 'math_verify', 'openai', 'tensorboard'):\n"
    code += "    sys.modules[extra] = None\n"
    code += (
        "import lightning_grpo.module, lightning_grpo.datamodule, lightning_grpo.cli.trainer_cli"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- paths of modules that moved ----------------------------------------------------------------


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_of_today(old):
    today = importlib.import_module(f"lightning_grpo.{MOVED[old]}")
    assert importlib.import_module(f"lightning_grpo.{old}") is today


def test_a_class_by_its_old_path_is_the_class_of_today():
    from lightning_grpo import SAPOLoss

    assert import_object("lightning_grpo.algorithm.trust_losses.SAPOLoss") is SAPOLoss


def test_a_path_that_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_grpo.rollout.never_was")
