"""One engine process for all tests; each test starts from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.engine_process import EngineProcess


@pytest.fixture(scope="session")
def engine_process(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """The process that the tests of a session share."""
    process = EngineProcess(model_folder, tmp_path_factory.mktemp("log") / "engine.log")
    yield process
    process.close()


@pytest.fixture
def engine(engine_process: EngineProcess) -> Iterator[EngineProcess]:
    """The engine, generating, with the first weights under their first name and nothing to do."""
    if engine_process.process.poll() is not None:
        pytest.fail(f"the engine died: {engine_process.log.read_text()[-2000:]}")
    yield engine_process
    engine_process.post("/abort_request", abort_all=True)
    engine_process.post("/continue_generation")
    engine_process.post(
        "/update_weights_from_disk",
        model_path=str(engine_process.model),
        weight_version="default",
    )
    assert engine_process.process.poll() is None
