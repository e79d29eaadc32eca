"""The notebooks of examples/ run from the first cell to the last, in a kernel as Jupyter's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.ranks import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs the extra [test]")
NotebookClient = pytest.importorskip("nbclient").NotebookClient
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "save it without outputs"
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 20", "STEPS = 2").replace("limit=100", "limit=8")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = "".join(each.get("text") or each["data"]["text/plain"] for each in outputs)
    assert "step 2/2" in shown
    assert "Traceback" not in shown
    assert "error:" not in shown
