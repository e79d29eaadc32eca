"""What the site shows beside the pages of docs/: the API by its docstrings, and the repository.

Pages link to examples, programs and other pages outside of docs/ (`../examples/two_turn`), as they
must where they are read in the repository. Each of these gets a page of its own here, and links
lead there.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import lightning_grpo
from lightning_grpo import rewards

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^( *`{3})(\w*)(.*)$")
FILE = re.compile(r"file=(\S+)")
SHOWN = (".py", ".yaml", ".sh", ".toml", ".ipynb")
ROOMS = {
    "agents": "Several turns and tools",
    "algorithm": "Losses, advantages, corrections",
    "callbacks": "Callbacks",
    "policy": "Models",
    "rollout": "Prompts and workflows",
    "servers": "Servers",
    "strategies": "Strategies and checkpoints",
    "weights": "Weight transports",
}
OTHERS = "The run"
FIRST = ("module", "datamodule", "validation", "objective")
"""What people look for in it first."""


def api_pages() -> dict[str, str]:
    """Markdown by path: one page for each room of the package, and one of rewards."""
    named: dict[str, list[str]] = {}
    for name, module in sorted(lightning_grpo._MODULE_OF.items(), key=rank):
        named.setdefault(ROOMS.get(module.split(".")[1], OTHERS), []).append(f"{module}.{name}")
    here = [n for n, value in sorted(vars(rewards).items()) if callable(value)]
    named["Rewards"] = [f"{getattr(rewards, n).__module__}.{n}" for n in here]
    pages = {}
    for title, objects in sorted(named.items(), key=lambda item: (item[0] != OTHERS, item[0])):
        body = "\n\n".join(f"::: {each}" for each in objects)
        pages[f"api/{title.lower().replace(',', '').replace(' ', '_')}.md"] = (
            f"# {title}\n\n{body}\n"
        )
    return pages


def rank(item: tuple[str, str]) -> tuple[int, str]:
    """Where a name stands on its page."""
    name, room = item[0], item[1].split(".")[1]
    return FIRST.index(room) if room in FIRST else len(FIRST), name


def linked(origin: Path, text: str) -> set[Path]:
    """Files and folders of the repository outside of docs/ that a page links to."""
    found = set()
    for _, _, target, _ in LINK.findall(text):
        path = (origin.parent / target).resolve()
        if "://" not in target and path.is_relative_to(ROOT) and path.exists():
            found.add(path)
    return {path for path in found if not path.is_relative_to(ROOT / "docs")}


def name_of(path: Path) -> str:
    """Where a file or folder of the repository stands in the site."""
    inside = path.relative_to(ROOT).as_posix()
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    return f"repository/{inside.removesuffix('.md')}.md"


def shown(path: Path) -> str:
    """A file or folder as a page; its links stay as they are."""
    if path.suffix == ".md":
        return path.read_text()
    if path.is_file():
        return f"# {path.relative_to(ROOT)}\n\n```{path.suffix[1:]}\n{path.read_text()}\n```\n"
    readme = path / "README.md"
    parts = [readme.read_text() if readme.exists() else f"# {path.relative_to(ROOT)}"]
    for each in sorted(path.iterdir()):
        if each.suffix == ".ipynb":
            parts += cells(each)
        elif each.suffix in SHOWN:
            parts.append(f"## {each.name}\n\n```{each.suffix[1:]}\n{each.read_text()}\n```")
    return "\n\n".join(parts) + "\n"


def cells(notebook: Path) -> list[str]:
    """A notebook's cells as Markdown; its first heading one deeper."""
    found = json.loads(notebook.read_text())["cells"]
    texts = [(each["cell_type"], "".join(each["source"])) for each in found]
    return [
        f"```python\n{text}\n```" if kind == "code" else re.sub(r"^#", "##", text, count=1)
        for kind, text in texts
    ]


def origin_of(path: Path) -> Path:
    """What the links of a page are relative to."""
    return path / "README.md" if path.is_dir() else path


def with_links(text: str, origin: Path, here: str, known: set[str]) -> str:
    """The text with links to where things are in the site; what is not in it is no link."""

    def moved(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups()
        path = (origin.parent / target).resolve()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        if not path.is_relative_to(ROOT) or (name := name_of(path)) not in known:
            return words
        return f"{mark}[{words}]({posixpath.relpath(name, posixpath.dirname(here))}{anchor or ''})"

    lines, inside = [], False
    for line in text.splitlines():
        if fence := FENCE.match(line):
            inside = not inside
            lines.append(fenced(*fence.groups()))
        else:
            lines.append(line if inside else LINK.sub(moved, line))
    return "\n".join(lines) + "\n"


def fenced(ticks: str, language: str, more: str) -> str:
    """The line that opens or closes a block; what it says to the tests becomes its title."""
    file = FILE.search(more)
    return f'{ticks}{language} title="{file[1]}"' if file else f"{ticks}{language}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    own = {Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path}
    wanted: set[Path] = set()
    for path in own:
        wanted |= linked(path, path.read_text())
    api = api_pages()
    repository = {name_of(path): shown(path) for path in sorted(wanted)}
    for name, text in {**api, **repository}.items():
        files.append(File.generated(config, name, content=text))
    assert config.nav is not None
    config.nav += [{"API": list(api)}, {"Repository": list(repository)}]
    config.extra["origins"] = {name_of(path): os.fspath(origin_of(path)) for path in wanted}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to pages of the site."""
    here = page.file.src_uri
    origin = Path(config.extra["origins"].get(here, ROOT / "docs" / here))
    known = {file.src_uri for file in files}
    return with_links(markdown, origin, here, known)
