from __future__ import annotations

from inspect import signature

import pytest
from lightning import Trainer

from lightning_grpo.cli.sources import (
    OFTEN_SET,
    ConfigProblem,
    Setting,
    arguments_in,
    collect,
    nearest,
    read_options,
    read_yaml,
    with_helped,
)
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.module import GRPOModule


def places(setting):
    return {key: child.where for key, child in setting.walk()}


def test_every_key_of_a_file_has_its_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("trainer:\n  max_steps: 3\n  callbacks:\n  - {monitor: x}\ndata: {a: 1}\n")
    assert places(read_yaml(file, "a.yaml")) == {
        "trainer": "a.yaml, line 1",
        "trainer.max_steps": "a.yaml, line 2",
        "trainer.callbacks": "a.yaml, line 3",
        "trainer.callbacks.0": "a.yaml, line 4",
        "trainer.callbacks.0.monitor": "a.yaml, line 4",
        "data": "a.yaml, line 5",
        "data.a": "a.yaml, line 5",
    }


def test_an_anchor_is_merged_and_may_be_overridden(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  a: &a {path: x, split: train}\n  b: {<<: *a, split: test}\n")
    assert read_yaml(file, "a").plain()["data"]["b"] == {"path": "x", "split": "test"}


def test_numbers_are_read_as_the_parser_reads_them(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1e-4\nb: 1.0e-4\nc: 16\nd: true\ne: '16'\n")
    assert read_yaml(file, "a").plain() == {"a": 1e-4, "b": 1e-4, "c": 16, "d": True, "e": "16"}


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml", "a").plain() == {}


def test_a_list_at_the_top_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigProblem, match="must hold `key: value` pairs"):
        read_yaml(tmp_path / "a.yaml", "a")


def test_broken_yaml_names_its_line(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(ConfigProblem, match=r"\(a, line 3\)\n  is not valid YAML"):
        read_yaml(tmp_path / "a.yaml", "a")


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(ConfigProblem, match=r"can't read `there\.yaml`: No such file"):
        read_yaml(tmp_path / "there.yaml", "there.yaml")


def test_options_are_read_with_equals_signs_and_without():
    assert read_options(["--a.b=1", "--c", "2", "--d", "--e", "-1"]) == [
        ("a.b", "1"),
        ("c", "2"),
        ("d", None),
        ("e", "-1"),
    ]


def test_the_command_line_lies_over_the_files(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {a: 1, b: 2}\n")
    settings = collect([("a.yaml", tmp_path / "a.yaml")], ["--data.b", "3", "--data.c.d", "[4]"])
    assert settings.plain() == {"data": {"a": 1, "b": 3, "c": {"d": [4]}}}
    assert places(settings)["data.a"] == "a.yaml, line 1"
    assert places(settings)["data.b"] == "command line"


def test_a_class_path_on_the_command_line_keeps_the_files_arguments(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {loss: {class_path: a.B, init_args: {c: 1}}}\n")
    settings = collect([("a", tmp_path / "a.yaml")], ["--model.loss", "x.Y"])
    assert settings.plain()["model"]["loss"] == {"class_path": "x.Y", "init_args": {"c": 1}}


def test_an_argument_beside_its_class_is_the_one_below_init_args_whichever_comes_later(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {prompts: {path: old, column: q}, batch_size: 4}\n")
    named = "{class_path: a.B, init_args: {prompts: {path: new}}}"
    (tmp_path / "b.yaml").write_text(f"data: {named}\n")
    both = [(name, tmp_path / f"{name}.yaml") for name in "ab"]

    def prompts(configs):
        return arguments_in(collect(configs, []).plain()["data"])["prompts"]

    assert prompts(both) == {"path": "new", "column": "q"}
    assert prompts(both[::-1])["path"] == "old"


@pytest.mark.parametrize(
    "text", ["rows.csv", "/data/ROWS.JSONL", "shipped:a/b.jsonl", "http://a:30000", "a:30000"]
)
def test_a_file_or_an_address_takes_the_place_of_the_arguments_given_before(tmp_path, text):
    config = tmp_path / "a.yaml"
    config.write_text("data:\n  prompts: {path: old, column: question}\n")
    merged = collect([("a.yaml", config)], ["--data.prompts", text])
    assert merged.plain() == {"data": {"prompts": text}}


def test_datasets_by_name_take_the_place_of_one_and_settings_of_one_are_joined(tmp_path):
    one, named, more = (tmp_path / name for name in ("one.yaml", "named.yaml", "more.yaml"))
    one.write_text("data:\n  val_prompts: {path: old, column: question}\n")
    named.write_text("data:\n  val_prompts: {a: {path: x}, b: {path: y}}\n")
    more.write_text("data:\n  val_prompts: {limit: 3, template_kwargs: {k: 1}}\n")

    def merged(*paths):
        return collect([(path.name, path) for path in paths], []).plain()["data"]["val_prompts"]

    assert merged(one, named) == {"a": {"path": "x"}, "b": {"path": "y"}}
    joined = {"path": "old", "column": "question", "limit": 3, "template_kwargs": {"k": 1}}
    assert merged(one, more) == joined


def test_arguments_after_a_class_path_given_alone_are_its_own(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {servers: a.B}\n")
    settings = collect([("a", tmp_path / "a.yaml")], ["--data.servers.num_servers", "2"])
    assert settings.plain()["data"]["servers"] == {"class_path": "a.B", "num_servers": 2}


def test_help_and_print_config_are_no_settings():
    assert collect([], ["--help"]).plain() == {}
    assert collect([], ["--print_config=skip_null", "--model.help"]).plain() == {}


@pytest.mark.parametrize(
    ("written", "valid", "said"),
    [
        ("max_stal", ["max_staleness", "batch_size"], "did you mean `data.max_staleness`?"),
        ("btach_size", ["max_staleness", "batch_size"], "did you mean `data.batch_size`?"),
        ("zzz", ["max_staleness", "batch_size"], "valid here: max_staleness, batch_size"),
        ("zzz", [], ""),
    ],
)
def test_the_nearest_key_is_suggested(written, valid, said):
    assert nearest(written, valid, "data.") == said


def test_a_setting_without_a_value_is_a_flag():
    assert Setting(None, "command line").plain() is None


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("trainer: &a [*a]\n", "must not stand in what it names"),
        ("trainer: &a {b: {c: *a}}\n", "must not stand in what it names"),
    ],
)
def test_aliases_that_would_fill_the_memory_are_refused(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigProblem, match=words):
        read_yaml(tmp_path / "a.yaml", "a.yaml")


def test_aliases_that_are_used_a_few_times_are_what_they_name(tmp_path):
    (tmp_path / "a.yaml").write_text("model: &m {loss: [1, 2]}\ndata: {<<: *m, more: *m}\n")
    read = read_yaml(tmp_path / "a.yaml", "a.yaml").plain()
    assert read["data"] == {"loss": [1, 2], "more": {"loss": [1, 2]}}


def test_settings_that_are_suggested_with_their_section_are_settings_of_it():
    classes = {"trainer": Trainer, "model": GRPOModule, "data": RolloutDataModule}
    for section, names in OFTEN_SET.items():
        assert set(names) <= signature(classes[section]).parameters.keys()


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--data", "mine.X", "--data.help"], "--data.help=mine.X"),
        (["--data.class_path=mine.X", "--data.help"], "--data.help=mine.X"),
        (["--data.batch_size", "2", "--data.help"], "--data.help"),
        (["--data", "mine.X", "--data.servers.help"], "--data.servers.help"),
    ],
)
def test_the_help_of_a_section_is_that_of_the_class_that_it_names(options, asked):
    assert with_helped(options, collect([], options)) == [*options[:-1], asked]
