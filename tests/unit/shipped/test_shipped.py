"""`shipped:` names and the shipped configs, as they resolve in a checkout."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

from lightning_grpo.errors import ConfigError
from lightning_grpo.shipped import resolve_config, resolve_path, shipped_configs, shipped_names


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(resolve_path(name)).read_text().splitlines()]


def test_the_quickstart_model_is_a_folder_that_transformers_can_load():
    folder = Path(resolve_path("shipped:quickstart"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    with safe_open(folder / "model.safetensors", "np") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight")
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    assert embedding.dtype == "float32"
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "./model", "/tmp/x", "", "shipped"])
def test_other_strings_come_back_unchanged(name):
    assert resolve_path(name) == name


@pytest.mark.parametrize("name", ["shipped:quickstrat", "shipped:", "shipped:quickstart/../x"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(ConfigError, match=r"shipped:quickstart, .*shipped:quickstart/test\.jsonl"):
        resolve_path(name)


def test_every_listed_name_resolves_to_something_that_exists():
    assert {"shipped:quickstart", "shipped:quickstart/train.jsonl"} <= set(shipped_names())
    for name in shipped_names():
        assert Path(resolve_path(name)).exists()


def test_the_test_split_is_a_thousand_distinct_problems_that_training_never_sees():
    train, test = (read_rows(f"shipped:quickstart/{name}.jsonl") for name in ("train", "test"))
    asked = {row["question"] for row in test}
    assert len(test) == len(asked) == 1000
    assert not asked & {row["question"] for row in train}
    for row in train + test:
        assert set(row) == {"question", "answer"}
        assert row["answer"].splitlines()[-1].removeprefix("#### ").isdigit()


def test_a_config_file_that_exists_wins_over_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = resolve_config("quickstart.yaml")
    assert Path(shipped).is_absolute()
    Path("quickstart.yaml").write_text("trainer: {}\n")
    assert resolve_config("quickstart.yaml") == "quickstart.yaml"


def test_an_unknown_config_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"gsm8k\.yaml, quickstart\.yaml"):
        resolve_config(str(tmp_path / "gsm9k.yaml"))


def test_every_shipped_config_is_yaml_and_names_shipped_files_that_exist():
    assert {"gsm8k.yaml", "quickstart.yaml"} <= set(shipped_configs())
    for name in shipped_configs():
        config = yaml.safe_load(Path(resolve_config(name)).read_text())
        assert {"model", "data", "trainer"} <= set(config)
        for key in ("prompts", "val_prompts"):
            assert resolve_path(config["data"][key]["path"])


# ---- the generator of the quickstart's problems -------------------------------------------------

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generator():
    path = REPOSITORY / "examples/quickstart/problems.py"
    spec = importlib.util.spec_from_file_location("quickstart_problems", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def take(generator, seed, count, held_out=False):
    return list(itertools.islice(generator.problems(seed, held_out=held_out), count))


def test_a_step_is_written_with_gsm8k_calculator_mark(generator):
    assert str(generator.Step(9, "*", 5)) == "9 * 5 = <<9*5=45>>45"


def test_the_same_seed_gives_the_same_problems_and_another_seed_others(generator):
    assert take(generator, 3, 50) == take(generator, 3, 50)
    assert take(generator, 3, 50) != take(generator, 4, 50)


def test_the_shipped_rows_are_the_generators(generator):
    for split, held_out in (("train", False), ("test", True)):
        path = REPOSITORY / f"examples/quickstart/data/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        distinct = {}
        for problem in generator.problems(0, held_out=held_out):
            distinct.setdefault(problem.question, problem.answer)
            if len(distinct) == len(rows):
                break
        assert [(row["question"], row["answer"]) for row in rows] == list(distinct.items())


def test_no_problem_needs_a_negative_number(generator):
    for problem in take(generator, 5, 2000):
        assert all(step.result > 0 for step in problem.steps)


def test_a_second_step_starts_from_the_first_result(generator):
    for problem in take(generator, 6, 500):
        for before, after in itertools.pairwise(problem.steps):
            assert after.left == before.result


def test_over_a_third_of_the_mixed_demonstrations_is_careful_and_the_rest_has_three_habits(
    generator,
):
    rng = random.Random(0)
    drawn = take(generator, 7, 4000)
    shown = [generator.mixed_demonstration(problem, rng) for problem in drawn]
    careful = sum(s == p.answer for s, p in zip(shown, drawn, strict=True)) / len(drawn)
    guesses = sum(s.startswith("####") for s in shown) / len(drawn)
    unmarked = sum("####" not in s for s in shown) / len(drawn)
    assert careful == pytest.approx(0.385, abs=0.03)
    assert guesses == pytest.approx(0.39, abs=0.03)
    assert unmarked == pytest.approx(0.065, abs=0.02)


def test_a_wrong_step_is_carried_on_consistently(generator):
    rng = random.Random(1)
    seen = 0
    for problem in take(generator, 8, 2000):
        shown = generator.mixed_demonstration(problem, rng)
        if shown.startswith("####") or "####" not in shown or shown == problem.answer:
            continue
        seen += 1
        last = shown.splitlines()[-2].rpartition(">>")[2]
        assert shown.endswith(f"#### {last}")
    assert seen > 200


# ---- the shipped tokenizer belongs to the shipped model, and fits the generator's problems ------

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
