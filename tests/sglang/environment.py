"""Makes the environment of `make test-sglang`: `python -m tests.sglang.environment FOLDER`.

The project's own `install-server`, and then what the real SGLang lacks on a CPU (`shims/`), by way
of a `.pth` file. It is not remembered as the user's environment for servers.
"""

import sys
from pathlib import Path

from lightning_grpo.servers.sglang import ServerPython, install_server

SHIMS = Path(__file__).parent / "shims"
DEFAULT_FOLDER = Path(__file__).parents[2] / ".venv-sglang"


def add_shims(folder: Path) -> None:
    """Puts the stand-ins on the path of every interpreter of the environment."""
    (site,) = folder.glob("lib/python3.*/site-packages")
    (site / "sglang_cpu_shims.pth").write_text(f"{SHIMS}\nimport sglang_cpu_shims\n")


def ready_python(folder: Path) -> ServerPython | None:
    """The environment's interpreter, if it is complete."""
    python = folder / "bin" / "python"
    shimmed = list(folder.glob("lib/python3.*/site-packages/sglang_cpu_shims.pth"))
    return ServerPython(str(python), device="cpu") if python.exists() and shimmed else None


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    if ready_python(folder) is None:
        install_server(folder, device="cpu", pip_arguments=sys.argv[2:], say=print)
        add_shims(folder)


if __name__ == "__main__":
    main()
