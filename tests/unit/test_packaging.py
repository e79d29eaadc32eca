"""The package as it is installed: what the wheel carries, and that an empty folder suffices."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from lightning_grpo.hparams import import_object
from lightning_grpo.moved import MOVED

REPOSITORY = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 4_000_000


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs hatchling, the build backend")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The python of an empty environment in which only the wheel is installed."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel],
        check=True,
        capture_output=True,
    )
    return python


def run(python: Path, code: str, cwd: Path) -> str:
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [python, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_small_and_carries_the_quickstart_the_configs_and_the_type_marker(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = "lightning_grpo/shipped"
    assert {
        "lightning_grpo/py.typed",
        "lightning_grpo/report/static/page.html.j2",
        "lightning_grpo/report/static/uPlot.LICENSE",
        "lightning_grpo/report/static/uPlot.iife.min.js",
        f"{shipped}/docs/metrics.md",
        f"{shipped}/configs/quickstart.yaml",
        f"{shipped}/configs/gsm8k.yaml",
        f"{shipped}/examples/quickstart/data/train.jsonl",
        f"{shipped}/examples/quickstart/data/test.jsonl",
        f"{shipped}/examples/quickstart/model/config.json",
        f"{shipped}/examples/quickstart/model/model.safetensors",
        f"{shipped}/examples/quickstart/model/tokenizer.json",
        "lightning_grpo-0.2.0.dist-info/licenses/LICENSE",
    } <= names
    assert {name.partition("/")[0] for name in names} == {
        "lightning_grpo",
        "lightning_grpo-0.2.0.dist-info",
    }


def test_shipped_names_resolve_from_an_empty_folder_with_the_wheel_alone(installed, tmp_path):
    code = """
import json
from lightning_grpo.shipped import resolve_config, resolve_path, shipped_configs, shipped_names
print(json.dumps({name: resolve_path(name) for name in shipped_names()}
      | {name: resolve_config(name) for name in shipped_configs()}))
"""
    resolved = json.loads(run(installed, code, tmp_path))
    assert {"shipped:quickstart", "shipped:quickstart/train.jsonl", "quickstart.yaml"} <= set(
        resolved
    )
    for path in resolved.values():
        assert "site-packages/lightning_grpo/shipped/" in path
        assert Path(path).exists()


def test_the_console_script_is_installed(installed):
    assert (installed.parent / "lightning-grpo").is_file()


def test_the_constraints_pin_every_requirement_within_its_range():
    packaging = pytest.importorskip("packaging.requirements")
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for text in project()["dependencies"]:
        requirement = packaging.Requirement(text)
        name = requirement.name.lower()
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{text}: {pins[name]}"


def test_nothing_in_the_build_files_names_an_index_host():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        assert "://" not in (REPOSITORY / name).read_text(), name


def test_the_tests_that_the_security_page_names_are_there():
    page = (REPOSITORY / "SECURITY.md").read_text()
    named = set(re.findall(r"`((?:unit|integration)/[^`]*)`", page))
    assert len(named) > 10
    assert [name for name in named if not (REPOSITORY / "tests" / name).exists()] == []


# ---- benchmarks: run seldom, but what they use of the package must be there ----

ROOT = Path(__file__).parents[2]
OPTIONAL = {"matplotlib", "simpy", "trl"}  # of the extra `bench`
PROGRAMS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if file.stem != "__init__"
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_finds_all_that_it_imports(program):
    try:
        importlib.import_module(program)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")


def test_make_says_a_line_before_each_step_in_which_pip_is_silent():
    lines = (REPOSITORY / "Makefile").read_text().splitlines()
    steps = [at for at, line in enumerate(lines) if line.startswith("\t$(PIP) install -q")]
    told = [lines[at - 1].startswith("\t@echo ") for at in steps]
    # The package itself, without what it needs, takes a second.
    alone = ["--no-deps" in lines[at] for at in steps]
    assert steps
    assert all(a or b for a, b in zip(told, alone, strict=True))


# -- what imports where torch is not installed, and what an import may do --------------------------


PACKAGE = Path(__file__).parents[2] / "lightning_grpo"
TORCH_FREE = ("types", "errors", "report", "rewards", "rollout", "servers", "shipped")
MAX_LINES, MIN_LINES, MAX_FUNCTION_LINES = 600, 100, 60
MOST_MODULES, MOST_TEST_FILES = 126, 164
SMALL = {
    "callbacks/early_stop.py": "commands import it before torch",
    "keys.py": "commands import it before torch",
    "policy/adapted.py": "needs PEFT, which is an extra",
    "rewards/trl.py": "named by users",
    "servers/serve_sglang.py": "run as a program",
}
"""Modules under `MIN_LINES`, and why each is one."""

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
    num_lines = len([line for line in text.splitlines() if line.strip()])
    assert num_lines <= MAX_LINES
    if path.name != "__init__.py":  # a page torn out of a chapter is no module
        assert (num_lines < MIN_LINES) == (named(path) in SMALL)


@pytest.mark.parametrize("path", python_files(), ids=named)
def test_a_function_fits_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_a_new_file_is_made_only_where_no_chapter_has_room():
    assert sum(path.name != "__init__.py" for path in python_files()) <= MOST_MODULES
    assert len(list((PACKAGE.parent / "tests").rglob("test_*.py"))) <= MOST_TEST_FILES


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
