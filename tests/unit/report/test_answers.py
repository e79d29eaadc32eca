from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from lightning_grpo.errors import ConfigError
from lightning_grpo.report.answers import (
    HELD_OUT,
    TRAINED,
    choose_answers,
    find_tokenizer,
    light_rows,
    read_turns,
    spelled,
    spread,
    steps_wanted,
)
from lightning_grpo.report.run import read_run
from lightning_grpo.shipped import resolve_path
from tests.fakes.report_runs import answer, group, write_batch, write_run


def chosen(folder, *args):
    return choose_answers([read_run(folder, "run")], *args)


def test_a_small_run_is_shown_whole(tmp_path):
    answers = chosen(write_run(tmp_path))
    assert answers.num_trajectories == 6 * 4 + 2 * 4
    assert answers.notes == []
    first = answers.groups[0]
    assert (first["kind"], first["step"], first["row"]) == (TRAINED, 1, 2)
    assert first["prompt"] == [{"role": "user", "text": "What is 2 + 2?"}]
    assert first["columns"] == {"answer": "4"}, "the question stands in the prompt already"
    assert [each["reward"] for each in first["answers"]] == [1.0, 0.0]
    assert first["answers"][0]["rewards"] == {"right": 1.0, "form": 1.0}
    assert first["answers"][0]["versions"] == [3, 4]
    assert first["answers"][0]["length"] == 4


def test_of_a_large_run_whole_groups_are_taken_evenly_and_the_rest_is_told(tmp_path):
    for step in range(1, 21):
        members = [answer(), answer()]
        write_batch(tmp_path, step, [group(row, members) for row in range(10)])
    answers = chosen(tmp_path, 40)
    assert answers.num_trajectories == 40
    assert {len(each["answers"]) for each in answers.groups} == {2}
    assert [each["step"] for each in answers.groups] == list(range(1, 21))
    assert "40 of 400 trajectories are on this page" in answers.notes[0]
    assert "--limit N" in answers.notes[0]


def test_the_first_and_the_last_step_are_among_few(tmp_path):
    for step in range(1, 21):
        write_batch(tmp_path, step, [group(0, [answer(), answer()])])
    assert [each["step"] for each in chosen(tmp_path, 6).groups] == [1, 11, 20]
    assert [each["step"] for each in chosen(tmp_path, 2).groups] == [20]


def test_the_same_held_out_prompts_are_shown_at_every_validation(tmp_path):
    for step in (0, 10, 20):
        rows = range(20) if step else range(5, 20)  # the first validation asked fewer
        write_batch(tmp_path, step, [group(row, [answer()]) for row in rows], held_out=True)
    answers = chosen(tmp_path, 12)
    rows = {step: [g["row"] for g in answers.groups if g["step"] == step] for step in (0, 10, 20)}
    assert len(rows[0]) == 4
    assert rows[0] == rows[10] == rows[20]
    assert {each["kind"] for each in answers.groups} == {HELD_OUT}


def test_what_one_kind_does_not_need_is_the_other_s(tmp_path):
    write_batch(tmp_path, 1, [group(row, [answer()]) for row in range(4)])
    write_batch(tmp_path, 1, [group(row, [answer()]) for row in range(50)], held_out=True)
    kinds = [each["kind"] for each in chosen(tmp_path, 20).groups]
    assert (kinds.count(TRAINED), kinds.count(HELD_OUT)) == (4, 16)


def test_only_the_steps_that_are_asked_for_are_taken(tmp_path):
    answers = chosen(write_run(tmp_path), 100, steps_wanted("2, 4-5"))
    assert sorted({each["step"] for each in answers.groups}) == [2, 4, 5]


@pytest.mark.parametrize("text", ["", "last", "3-", "-3", "1,,2"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="`--steps` must be steps such as 12, 10-14 or 0,20,40"):
        steps_wanted(text)


def test_a_torn_file_is_named_and_the_others_are_shown(tmp_path):
    write_run(tmp_path)
    file = tmp_path / "trajectories" / "step_000002.parquet"
    file.write_bytes(file.read_bytes()[:100])
    answers = chosen(tmp_path)
    assert "step_000002.parquet' can't be read" in answers.notes[0]
    assert {1, 3} <= {each["step"] for each in answers.groups}


def test_items_are_spread_evenly():
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 5) == [0, 1, 2]
    assert spread(range(3), 1) == [2]
    assert spread([], 2) == []


def test_rows_are_read_without_what_there_is_for_each_token(tmp_path):
    write_batch(tmp_path, 1, [group(0, [answer()])])
    (row,) = light_rows(tmp_path / "trajectories" / "step_000001.parquet")
    assert row["length"] == 4
    assert not {"tokens", "logprobs", "versions", "response_mask"} & row.keys()


def test_rewards_that_are_no_numbers_keep_their_names(tmp_path):
    write_batch(tmp_path, 1, [group(0, [answer(reward=float("nan")), answer(reward=float("inf"))])])
    found = chosen(tmp_path).groups[0]["answers"]
    assert [each["reward"] for each in found] == ["nan", "inf"]


def test_a_file_of_which_the_tokens_are_torn_is_named(tmp_path):
    file = write_run(tmp_path) / "trajectories" / "step_000002.parquet"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2 - 200 : len(whole) // 2 + 200] = b"\xff" * 400
    file.write_bytes(bytes(whole))
    answers = chosen(tmp_path)
    assert any("step_000002.parquet" in note for note in answers.notes)
    assert {1, 3} <= {each["step"] for each in answers.groups}


# -- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(resolve_path("shipped:quickstart") + "/tokenizer.json")


def test_tokens_spell_the_text_that_they_encode(tokenizer):
    text = "3 + 4 = <<3+4=7>>7\n#### 7 \u00e9\u4f60\U0001f600!"
    pieces = spelled(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces), "a character of several tokens is whole"


def test_each_token_has_its_text_logprob_and_version(tmp_path, tokenizer):
    answers = chosen(write_run(tmp_path))
    tokens = answers.groups[0]["answers"][0]["tokens"]
    spelt = "".join(answers.pieces[place] for place in tokens["pieces"])
    assert spelt == tokenizer.decode([7, 8, 9, 10], skip_special_tokens=False)
    assert tokens["logprobs"] == [-10, -200, -50, 0]
    assert tokens["moved"] == [-20, 50, 0, 0], "since it was sampled, where it was trained on"
    assert "moved" not in answers.groups[0]["answers"][1]["tokens"]
    assert tokens["versions"] == [3, 2, 4, 2], "two tokens of version 3, two of version 4"


def test_of_more_tokens_than_a_page_may_have_groups_are_coloured_evenly(tmp_path):
    ids = (5,) * 40_000
    long = answer(
        input_ids=(5, 6, *ids),
        response_mask=(False, False, *[True] * len(ids)),
        logprobs=(0.0,) * (len(ids) + 2),
        versions=(-1, -1, *[0] * len(ids)),
    )
    write_batch(tmp_path, 1, [group(row, [long]) for row in range(50)])
    (tmp_path / "config.yaml").write_text("model: {model: shipped:quickstart}\n")
    answers = chosen(tmp_path)
    coloured = ["tokens" in each["answers"][0] for each in answers.groups]
    assert coloured == [False, True] * 25
    assert "Tokens of 50% of the groups can be coloured" in answers.notes[0]


def test_where_the_tokenizer_is_not_there_the_text_is(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {model: nobody/nothing}\n")
    answers = chosen(tmp_path)
    assert answers.groups[0]["answers"][0]["text"] == "#### 4"
    assert answers.groups[0]["answers"][0]["tokens"]["pieces"] == []
    assert "the tokenizer of nobody/nothing was not found" in answers.notes[0]


def test_a_model_s_relative_path_is_looked_for_above_the_run(tmp_path):
    (tmp_path / "build/model").mkdir(parents=True)
    shipped = resolve_path("shipped:quickstart") + "/tokenizer.json"
    (tmp_path / "build/model/tokenizer.json").symlink_to(shipped)
    run = tmp_path / "runs/mine/version_0"
    run.mkdir(parents=True)
    assert find_tokenizer("build/model", run) is not None
    assert find_tokenizer("build/other", run) is None
    assert find_tokenizer("", run) is None


def test_a_tokenizer_that_can_t_be_read_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    assert find_tokenizer(str(tmp_path), tmp_path) is None


# -- conversations --------------------------------------------------------------------------------

CHATML = (
    '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2 + 2"}}\n</tool_call>'
    "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nIt is 4.<|im_end|>"
)


def test_a_conversation_is_read_turn_by_turn_with_its_calls():
    assert read_turns(CHATML) == [
        {"role": "assistant", "text": "", "calls": ['calculator(expression="2 + 2")']},
        {"role": "tool", "text": "4", "calls": []},
        {"role": "assistant", "text": "It is 4.", "calls": []},
    ]


@pytest.mark.parametrize(
    "transcript",
    [
        "5<|im_end|>\n<|im_start|>user\nToo small.<|im_end|>\n<|im_start|>assistant\n7<|im_end|>",
        "5<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nToo small.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n7<|eot_id|>",
        "5<end_of_turn>\n<start_of_turn>user\nToo small.<end_of_turn>\n<start_of_turn>model\n7",
    ],
)
def test_templates_of_three_families_are_known(transcript):
    assert [(turn["role"], turn["text"]) for turn in read_turns(transcript)] == [
        ("assistant", "5"),
        ("user", "Too small."),
        ("assistant", "7"),
    ]


def test_of_another_template_the_text_stays_whole():
    text = "5</s>[INST] Too small. [/INST] 7</s>"
    assert read_turns(text) == [{"role": "assistant", "text": text, "calls": []}]


@pytest.mark.parametrize(
    "call", ["not JSON", '["list"]', '{"arguments": {}}', '{"name": "f", "arguments": "x"}']
)
def test_a_call_that_can_t_be_read_stands_as_it_is(call):
    assert read_turns(f"<tool_call>{call}</tool_call>")[0]["calls"] == [call]


def test_a_single_answer_is_no_conversation():
    assert read_turns("") == []
