"""A tiny model and one engine process for all tests; each test starts from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.fakes.engine_process import EngineProcess
from tests.fakes.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that every test starts from."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shapes."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> PreTrainedModel:
    """The same weights in plain transformers."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def other_reference(other_folder: Path) -> PreTrainedModel:
    """The other weights in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(other_folder, dtype=torch.float32).eval()


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
