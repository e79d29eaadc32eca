"""Tiny models that several folders share, and one engine process for all tests of the loop."""

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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that tests of the loop train."""
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", num_layers=1, hidden_size=32)


@pytest.fixture(scope="session")
def loop_engine(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Serves it; each run brings it to its own weights first."""
    process = EngineProcess(tiny_model, tmp_path_factory.mktemp("engine") / "log")
    yield process
    process.close()


@pytest.fixture
def server(loop_engine: EngineProcess) -> str:
    """The URL of the shared engine."""
    assert loop_engine.process.poll() is None, loop_engine.log.read_text()[-2000:]
    return loop_engine.url
