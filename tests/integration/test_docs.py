"""The pages of docs/: blocks run, links lead somewhere, the metrics are those that are logged.

A block that begins ```` ```python run ```` is run, after those before it on the page, in one
namespace; with `file=NAME` it is also a file of the current folder, as the page tells its readers
to save it. ```` ```yaml fit ```` is a config that `fit` takes on top of quickstart.yaml.
"""

from __future__ import annotations

import ast
import csv
import itertools
import re
from pathlib import Path

import pytest
import yaml

from lightning_grpo.cli.main import COMMANDS
from lightning_grpo.shipped import shipped_configs
from tests.fakes.programs import python

REPOSITORY = Path(__file__).parents[2]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [*DOCS, REPOSITORY / "README.md", *sorted(REPOSITORY.glob("examples/*/README.md"))]
BLOCK = re.compile(r"^```(?P<info>\w[^\n]*)\n(?P<text>.*?)^```", re.S | re.M)
METRIC = re.compile(r"^\| `(?P<name>[a-z]+/[a-z_<>/0-9]+)` \|(?P<cells>.*)\|$", re.M)

RUN_BLOCKS = """
import contextlib, io, pathlib, sys
from lightning_grpo.cli.main import main

sys.path.insert(0, ".")
names = {"__name__": "__main__"}
for block in sorted(pathlib.Path(".").glob("block-*")):
    if block.suffix == ".py":
        exec(compile(block.read_text(), str(block), "exec"), names)
        continue
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = main(["fit", "--config", "quickstart.yaml", "--config", str(block),
                         "--print_config"])
        except SystemExit as leaving:
            code = leaving.code
    assert code == 0 and printed.getvalue(), f"{block}:\\n{block.read_text()}"
    print("parsed", block)
"""

EVERY_METRIC = """
trainer: {max_steps: 4, val_check_interval: 4}
model:
  loss:
    class_path: lightning_grpo.GRPOLoss
    init_args: {dual_clip: 3.0}
  correction: lightning_grpo.TokenTIS
  kl: {coefficient: 0.01}
  truncation: {penalty_buffer: 8}
data:
  prompts:
    few: {path: shipped:quickstart/train.jsonl, column: question, limit: 8, weight: 3}
    many: {path: shipped:quickstart/train.jsonl, column: question}
  val_prompts: {limit: 4}
  evaluation: {num_samples: 2, greedy: true}
  minibatches_per_batch: 2
"""
"""A run that logs all it can: stale data, a correction, a KL penalty, a dual clip, samples."""


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(rest of the info string, text) of the page's blocks in a language."""
    found = [(m["info"].split(), m["text"]) for m in BLOCK.finditer(page.read_text())]
    return [(" ".join(info[1:]), text) for info, text in found if info[0] == language]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_blocks_of_a_page_are_sound(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
    for _, text in blocks(page, "python"):
        ast.parse(text)
    for _, text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_and_configs_of_a_page_exist(page):
    text = page.read_text()
    named = set(re.findall(r"(?:^|`)lightning-grpo ([a-z-]+)", text, re.M))
    assert named <= set(COMMANDS)
    for config in re.findall(r"--config ([\w-]+\.yaml)", text):
        beside = (page.parent / config).is_file()
        assert config == "mine.yaml" or beside or config in shipped_configs()


@pytest.mark.slow
def test_what_the_pages_say_to_write_can_be_run_in_order(tmp_path):
    num_configs = 0
    every_block = [match for page in DOCS for match in BLOCK.finditer(page.read_text())]
    for number, match in enumerate(every_block):
        language, *info = match["info"].split()
        if language == "python":
            if info == ["text-part"]:  # run where there is a model that also sees
                continue
            assert info[:1] == ["run"], "a Python block that is not run"
            (tmp_path / f"block-{number:02}.py").write_text(match["text"])
        elif language == "yaml":
            assert info == ["fit"], "a YAML block that `fit` does not parse"
            num_configs += 1
            (tmp_path / f"block-{number:02}.yaml").write_text(match["text"])
        for name in [part.removeprefix("file=") for part in info if part.startswith("file=")]:
            (tmp_path / name).write_text(match["text"])
    printed = python(tmp_path, "-c", RUN_BLOCKS)
    assert "held-out at step 2" in printed  # the last Python block trains two steps
    assert printed.count("parsed block") == num_configs > 0


ONLY_ON_GPUS = {"health/gpu_peak_gb", "throughput/mfu"}
ONLY_OF_MIXTURES = {"moe/replayed", "moe/rerouted"}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """Names of all metrics of a real run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "every.yaml").write_text(EVERY_METRIC)
    arguments = ("fit", "--config", "quickstart.yaml", "--config", "every.yaml")
    python(folder, "-m", "lightning_grpo.cli.main", *arguments)
    with (folder / "runs/quickstart/version_0/metrics.csv").open() as file:
        return {name for name in next(csv.reader(file)) if "/" in name}


def documented() -> dict[str, re.Pattern[str]]:
    """Metric of docs/metrics.md -> what the names that it stands for look like."""
    names = [m["name"] for m in METRIC.finditer((REPOSITORY / "docs/metrics.md").read_text())]
    assert len(names) == len(set(names)), "a metric stands in two lines"
    part = {"<name>": r"\w+", "<k>": r"\d+"}
    patterns = {}
    for name in names:
        pattern = re.escape(name)
        for placeholder, form in part.items():
            pattern = pattern.replace(re.escape(placeholder), form)
        patterns[name] = re.compile(pattern)
    return patterns


@pytest.mark.slow
def test_every_metric_that_a_run_logs_is_explained(logged):
    patterns = documented().values()
    unexplained = {name for name in logged if not any(p.fullmatch(name) for p in patterns)}
    assert not unexplained


@pytest.mark.slow
def test_every_metric_that_is_explained_is_logged(logged):
    never = {
        name for name, p in documented().items() if not any(p.fullmatch(each) for each in logged)
    }
    assert never == ONLY_ON_GPUS | ONLY_OF_MIXTURES  # neither of which the run has


def test_every_metric_has_a_meaning():
    for line in METRIC.finditer((REPOSITORY / "docs/metrics.md").read_text()):
        meaning, _healthy, _otherwise = line["cells"].split("|")
        assert meaning.strip(), line["name"]


def test_grpo_dapo_and_gspo_differ_in_at_most_four_lines():
    page = (REPOSITORY / "docs/algorithms.md").read_text()
    section = page.split("## From GRPO to DAPO to GSPO")[1].split("\n## ")[0]
    recipes = [m["text"].splitlines() for m in BLOCK.finditer(section)]
    assert len(recipes) == 3
    for before, after in itertools.pairwise(recipes):
        removed, added = set(before) - set(after), set(after) - set(before)
        assert 1 <= max(len(removed), len(added)) <= 4
    assert max(map(len, recipes)) <= 4
