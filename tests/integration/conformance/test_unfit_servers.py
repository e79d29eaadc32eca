"""Servers that can't serve a run are refused at its start, by name, with what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lightning_grpo.errors import ConfigError
from tests.fakes.loops import make_data, make_module, make_trainer
from tests.fakes.proxy import FaultyProxy, in_a_thread
from tests.fakes.tiny_model import make_tiny_model
from tests.sglang.server import Server


def fit(model: Path, url: str, folder: Path, **settings: int) -> None:
    trainer = make_trainer(folder, **{"max_steps": 1, **settings})
    data = make_data(url)
    trainer.fit(make_module(model), data)
    assert data.session.report.probe_diff < 1e-4


def refusal(model: Path, url: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        fit(model, url, folder)
    assert url in str(refused.value)
    return str(refused.value)


@pytest.fixture
def foreign(server: Server) -> Iterator[Server]:
    """The server, carrying another run's weights."""
    server.post("/update_weight_version", new_version="0a1b2c3d:17", abort_all_requests=False)
    yield server
    server.post("/update_weight_version", new_version="default", abort_all_requests=False)


def test_a_fit_server_is_taken_and_left_free_for_the_next_run(
    server: Server, model_folder: Path, tmp_path: Path
) -> None:
    fit(model_folder, server.url, tmp_path / "1")
    assert server.get("/model_info")["weight_version"] == "default"
    fit(model_folder, server.url, tmp_path / "2")


def test_other_weights_of_the_same_model_are_replaced_before_anything_is_sampled(
    server: Server, model_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    server.post("/update_weights_from_disk", model_path=str(other_folder))
    fit(model_folder, server.url, tmp_path)


def test_one_that_belongs_to_another_run_is_refused(
    foreign: Server, model_folder: Path, tmp_path: Path
) -> None:
    message = refusal(model_folder, foreign.url, tmp_path)
    assert "carries the weights '0a1b2c3d:17' of another run" in message
    assert "End that run, or restart the server" in message


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 32}, "hidden_size 64 instead of 32, intermediate_size 192 instead of 96"),
        ({"num_layers": 1}, "num_hidden_layers 2 instead of 1"),
        ({"vocab": 300}, "a vocabulary of 512, the trainer's model has 300"),
    ],
)
def test_another_model_is_refused(
    server: Server, tmp_path: Path, sizes: dict[str, int], said: str
) -> None:
    trained = make_tiny_model(tmp_path / "trained", **sizes)
    message = refusal(trained, server.url, tmp_path)
    assert said in message
    assert str(server.model) in message
    assert message.endswith("Start the server with the model that is trained.")


def test_another_class_of_model_is_refused_also_where_its_folder_cannot_be_read(
    server: Server, tmp_path: Path
) -> None:
    trained = make_tiny_model(tmp_path / "trained")
    path = trained / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    path.write_text(json.dumps(config))
    weights = load_file(trained / "model.safetensors")  # Llama has no norms in its attention
    kept = {n: v for n, v in weights.items() if "q_norm" not in n and "k_norm" not in n}
    save_file(kept, trained / "model.safetensors", metadata={"format": "pt"})
    proxy = FaultyProxy(server.url, claims={"/model_info": {"model_path": "/not/here"}})
    with in_a_thread(proxy):
        message = refusal(trained, proxy.url, tmp_path)
    assert "Qwen3ForCausalLM instead of LlamaForCausalLM" in message


def test_another_tokenizer_is_refused(server: Server, model_folder: Path, tmp_path: Path) -> None:
    trained = make_tiny_model(tmp_path / "trained")
    path = str(trained / "tokenizer.json")
    swapped = json.loads(Path(path).read_text())
    vocab = swapped["model"]["vocab"]
    vocab["i"], vocab["a"] = vocab["a"], vocab["i"]
    Path(path).write_text(json.dumps(swapped))
    assert Tokenizer.from_file(path).encode("ia").ids == [vocab["i"], vocab["a"]]
    message = refusal(trained, server.url, tmp_path)
    assert f"has another tokenizer ('{server.model}')" in message
    assert "Start the server with the model that is trained" in message


def test_a_version_before_the_first_that_works_is_refused(
    server: Server, model_folder: Path, tmp_path: Path
) -> None:
    proxy = FaultyProxy(server.url, claims={"/server_info": {"version": "0.5.9"}})
    with in_a_thread(proxy):
        message = refusal(model_folder, proxy.url, tmp_path)
    assert "runs SGLang 0.5.9; at least 0.5.17 is needed" in message
    assert "Upgrade the server's environment" in message


def test_a_version_without_a_needed_endpoint_is_refused(
    server: Server, model_folder: Path, tmp_path: Path
) -> None:
    proxy = FaultyProxy(server.url, missing=("/pause_generation", "/update_weight_version"))
    with in_a_thread(proxy):
        message = refusal(model_folder, proxy.url, tmp_path)
    version = re.escape(server.get("/server_info")["version"])
    assert re.search(
        rf"\(SGLang {version}\) has no /pause_generation, /update_weight_version", message
    )
    assert "Start it with a released SGLang of at least 0.5.17" in message


def test_the_paths_that_are_asked_for_are_there(server: Server) -> None:
    assert server.request("/tokenize", {"prompt": "Tom has 3", "add_special_tokens": False})[1][
        "tokens"
    ]
    for path in ("/pause_generation", "/flush_cache", "/update_weight_version"):
        assert server.request(path, method="OPTIONS")[0] == 405
    assert server.request("/nothing", method="OPTIONS")[0] == 404
