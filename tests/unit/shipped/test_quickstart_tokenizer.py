"""The shipped tokenizer belongs to the shipped model, and fits the generator's problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_grpo.shipped import resolve_path

EXAMPLE = Path(__file__).parents[3] / "examples/quickstart"
MAX_NEW_TOKENS = 56


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_path("shipped:quickstart"))


def render(tokenizer, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_the_script_makes_the_shipped_tokenizer_again(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make_base

    made = json.loads(make_base.make_tokenizer(seed=0).backend_tokenizer.to_str())
    shipped = json.loads((EXAMPLE / "model/tokenizer.json").read_text())
    assert made["model"] == shipped["model"]
    assert made["added_tokens"] == shipped["added_tokens"]


def test_the_chat_template_opens_the_answer(tokenizer):
    assert render(tokenizer, "How many?") == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_numbers_are_split_into_digits(tokenizer):
    assert tokenizer.tokenize("120") == ["1", "2", "0"]


def test_text_survives_encoding_and_decoding(tokenizer):
    text = "Mia has 12 apples.\n12 + 3 = <<12+3=15>>15\n#### 15"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_careful_answer_fits_the_length_that_the_config_allows(tokenizer):
    rows = (EXAMPLE / "data/test.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert len(tokenizer.encode(row["answer"])) + 1 <= MAX_NEW_TOKENS


def test_the_end_token_is_the_models(tokenizer):
    config = json.loads((EXAMPLE / "model/config.json").read_text())
    generation = json.loads((EXAMPLE / "model/generation_config.json").read_text())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id == end
