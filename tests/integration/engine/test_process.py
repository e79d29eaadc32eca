"""The process: how it starts and ends, its key, and bits that repeat."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine_process import EngineProcess
from tests.fakes.rank_forkserver import python_with_imports
from tests.fakes.tiny_model import make_tiny_model

PROMPTS = [[10 + i, 40, 99, 7] for i in range(12)]


def test_it_asks_for_its_key_except_for_its_health(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o600)
    engine = EngineProcess(model_folder, tmp_path / "log", ["--api-key", f"file:{file}"], "secret")
    try:
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        assert engine.request("/generate", body)[0] == 200
        for key in (None, "other"):
            engine.api_key = key
            status, reply = engine.request("/generate", body)
            assert (status, reply["error"]["message"]) == (401, "Unauthorized")
            assert engine.request("/model_info", method="GET")[0] == 401
            assert engine.request("/health", method="GET")[0] == 200
    finally:
        assert engine.close() == 0


def test_a_signal_answers_what_is_in_flight_and_ends_it(model_folder: Path, tmp_path: Path) -> None:
    engine = EngineProcess(model_folder, tmp_path / "log")
    running = engine.start(
        engine.generate, [1, 2], sampling={"max_new_tokens": 2000, "ignore_eos": True}
    )
    engine.wait_until(lambda s: s["num_running_reqs"] == 1)
    assert engine.close() == 0
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert (tmp_path / "log").read_text() == ""


def test_it_ends_when_its_parent_closes_its_input(model_folder: Path, tmp_path: Path) -> None:
    engine = EngineProcess(model_folder, tmp_path / "log", forked=False)
    assert engine.process.stdin is not None
    assert engine.process.poll() is None
    engine.process.stdin.close()
    assert engine.process.wait(timeout=20) == 0
    engine.close()


@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path, quantized: bool) -> None:
    if quantized:  # whose packages are not installed
        config = json.loads((make_tiny_model(tmp_path) / "config.json").read_text())
        quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps({**config, **quantization}))
    done = subprocess.run(
        python_with_imports("-m", "lightning_grpo.engine", "--model", str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: `--model` must be a causal language model" in done.stderr
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def submit_while_paused(engine: EngineProcess, order: list[int]) -> list[Any]:
    """Send one request for each prompt, in some order, before anything runs."""
    engine.post("/pause_generation")
    futures = {}
    for position, index in enumerate(order):
        futures[index] = engine.start(
            engine.generate,
            PROMPTS[index],
            sampling={
                "max_new_tokens": 20 + 7 * index,
                "ignore_eos": True,
                "sampling_seed": index,
                "n": 3,
                "temperature": 0.9,
            },
        )
        expected = 3 * (position + 1)
        engine.wait_until(lambda s, expected=expected: s["num_waiting_reqs"] == expected)
    engine.post("/continue_generation")
    replies = [futures[index].result() for index in range(len(order))]
    # Floats as they came over the wire: equal text is equal bits.
    return [
        json.dumps([(r["output_ids"], r["meta_info"]["output_token_logprobs"]) for r in group])
        for group in replies
    ]


@pytest.mark.slow
def test_the_deterministic_mode_repeats_bit_for_bit(model_folder: Path, tmp_path: Path) -> None:
    engine = EngineProcess(
        model_folder, tmp_path / "log", ["--deterministic", "--max-running-requests", "16"]
    )
    try:
        forwards = list(range(len(PROMPTS)))
        first = submit_while_paused(engine, forwards)
        # Growing caches and cached prompts from other work must not show.
        engine.generate([1] * 600, sampling={"max_new_tokens": 900, "n": 2, "ignore_eos": True})
        assert submit_while_paused(engine, forwards) == first
        assert submit_while_paused(engine, forwards[::-1]) == first
        engine.post("/flush_cache")
        assert submit_while_paused(engine, forwards) == first
    finally:
        engine.close()
    other = EngineProcess(
        model_folder, tmp_path / "log", ["--deterministic", "--max-running-requests", "16"]
    )
    try:
        assert submit_while_paused(other, forwards) == first
    finally:
        other.close()


def test_in_deterministic_mode_an_answer_does_not_depend_on_who_else_runs(
    model_folder: Path, tmp_path: Path
) -> None:
    engine = EngineProcess(model_folder, tmp_path / "log", ["--deterministic"])

    def ask(index: int) -> str:
        sampling = {"max_new_tokens": 9 + 5 * index, "ignore_eos": True, "sampling_seed": index}
        reply = engine.generate(PROMPTS[index % len(PROMPTS)], sampling=sampling)
        return json.dumps((reply["output_ids"], reply["meta_info"]["output_token_logprobs"]))

    try:
        alone = [ask(index) for index in range(8)]
        together = [engine.start(ask, index) for index in reversed(range(8))]
        assert [future.result() for future in reversed(together)] == alone
    finally:
        engine.close()


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_any_tying_and_several_key_value_heads_are_served(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(
        tmp_path / "model", tie_word_embeddings=tied, hidden_size=32, num_layers=1, vocab=300
    )
    engine = EngineProcess(folder, tmp_path / "log", ["--weight-version", "v0"])
    try:
        reply = engine.generate([1, 2], sampling={"max_new_tokens": 3, "ignore_eos": True})
        assert reply["meta_info"]["weight_version"] == "v0"
        other = make_tiny_model(
            tmp_path / "other",
            seed=1,
            tie_word_embeddings=tied,
            hidden_size=32,
            num_layers=1,
            vocab=300,
        )
        engine.post("/update_weights_from_disk", model_path=str(other), weight_version="v1")
    finally:
        engine.close()
