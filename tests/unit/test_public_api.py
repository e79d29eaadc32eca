"""The public API, pinned in one text file: a change to it is a change to that file.

python tests/unit/test_public_api.py      # writes the file anew
"""

from __future__ import annotations

import ast
import enum
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_grpo

FILE = Path(__file__).with_name("public_api.txt")
HOOKS = {
    "GRPOModule": (
        "build_policy", "shape_rewards", "advantages", "token_loss", "configure_optimizers",
        "configure_model", "export", "load_from_checkpoint",
    ),
    "RolloutDataModule": (
        "make_prompt", "keep_group", "start", "batches", "publish", "close", "state_dict",
        "load_state_dict",
    ),
}  # fmt: skip
"""What a subclass may override, and what programs without a Trainer call."""


def describe(name: str) -> list[str]:
    value = getattr(lightning_grpo, name)
    if not callable(value):
        return [name]
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return [f"{name}: {', '.join(value.__members__)}"]
    lines = [f"{name}{signature(value)}"]
    lines += [f"    .{hook}{signature(getattr(value, hook))}" for hook in HOOKS.get(name, ())]
    return lines


def signature(function: object) -> str:
    """Names, kinds and defaults; annotations stand in the code, where a type checker reads them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return "(...)"
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    # A default that is a function shows its address.
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.Signature(shown)))


def current() -> str:
    names = [name for name in lightning_grpo.__all__ if name != "__version__"]
    return "\n".join(line for name in sorted(names) for line in describe(name)) + "\n"


def test_the_public_api_is_what_the_file_says():
    assert current() == FILE.read_text(), (
        "the public API changed. If that is meant: python tests/unit/test_public_api.py"
    )


def test_every_public_name_is_listed_and_resolves():
    assert sorted(lightning_grpo.__all__) == dir(lightning_grpo)
    for name in lightning_grpo.__all__:
        assert getattr(lightning_grpo, name) is not None


def test_type_checkers_are_told_of_every_public_name_where_it_is_defined():
    tree = ast.parse(Path(lightning_grpo.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        (each.module, alias.name, alias.asname)
        for each in block.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    home = lightning_grpo._MODULE_OF
    assert told == {(module, name, name) for name, module in home.items()}
    # With a `__getattr__` in sight they would believe any name.
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert defined == ["__dir__"]


def check_types(program: Path) -> str:
    repository = Path(lightning_grpo.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", str(program)],
        cwd=repository,
        env={**os.environ, "MYPYPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_type_checker_knows_each_public_name_and_refuses_others(tmp_path):
    pytest.importorskip("mypy", reason="needs the extra [dev]")
    names = [name for name in lightning_grpo.__all__ if name != "__version__"]
    lines = ["import lightning_grpo", "from lightning_grpo import DoesNotExist"]
    lines += [f"reveal_type(lightning_grpo.{name})" for name in names]
    snippet = tmp_path / "snippet.py"
    snippet.write_text("\n".join(lines))
    said = check_types(snippet)
    assert 'has no attribute "DoesNotExist"' in said
    revealed = re.findall(r"Revealed type is \"(.*)\"$", said, re.M)
    assert len(revealed) == len(names)
    assert "Any" not in revealed


PROGRAM = """
from lightning_grpo import (
    Completion, EmbeddedServers, EpisodeContext, Prompt, Prompts, RLVRWorkflow, RolloutDataModule,
    RolloutWorkflow, Trajectory, load_tokenizer, next_ids)


def right(completion: str, answer: str) -> float:
    return float(completion == answer)


async def short(completion: str) -> float:
    return float(len(completion) < 9)


class Own(RolloutWorkflow):
    async def run(self, prompt: Prompt, context: EpisodeContext) -> Trajectory | None:
        said: Completion = await context.generate(prompt.input_ids, {"max_new_tokens": 3})
        next_ids(load_tokenizer("model"), said, [{"role": "user", "content": "Go on."}])
        return None


rows = [{"prompt": "What is 3 times 4?", "answer": "12"}]
workflow = RLVRWorkflow({"right": right, "short": short}, {"max_new_tokens": 48})
RolloutDataModule(rows, workflow, "http://localhost:30000")
RolloutDataModule("prompts.csv", Own(), EmbeddedServers(), val_prompts={"a": Prompts(rows)})
RolloutDataModule({"a": rows, "b": "b.csv"}, workflow, ["http://a:1"])
"""


@pytest.mark.slow
def test_a_type_checker_takes_what_a_program_may_write(tmp_path):
    pytest.importorskip("mypy", reason="needs the extra [dev]")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert check_types(program) == ""


if __name__ == "__main__":
    FILE.write_text(current())
