from __future__ import annotations

import json
import subprocess
import sys

import datasets
import numpy
import pandas
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_grpo.errors import ConfigError, PromptError
from lightning_grpo.rollout.admission import PromptStream
from lightning_grpo.rollout.prompts import Prompts, Vocabulary
from lightning_grpo.types import Prompt
from tests.fakes.tokenizer import CharTokenizer

ROWS = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(6)]


def load(rows=ROWS, chat=True, **options):
    options.setdefault("column", "question")
    of_load = {"max_prompt_tokens": options.pop("max_prompt_tokens", None)}
    of_load["vocabulary"] = options.pop("vocabulary", None)
    return Prompts(rows, **options).load(CharTokenizer(chat), **of_load)


def test_text_becomes_one_user_message_of_the_chat_template():
    prompt = load().prompt(1)
    assert prompt.text == "<user>What is 1 + 1?</><assistant>"
    assert prompt.messages == ({"role": "user", "content": "What is 1 + 1?"},)
    assert prompt.input_ids == tuple(map(ord, prompt.text))
    assert prompt.columns == ROWS[1]


def test_without_a_chat_template_text_stays_text():
    prompt = load(chat=False, system="Be brief. ", suffix=" Answer:").prompt(0)
    assert prompt.text == "Be brief. What is 0 + 1? Answer:"
    assert prompt.messages == ()


def test_system_and_suffix_surround_the_question():
    prompt = load(system="Be brief.", suffix=" Use ####.").prompt(0)
    assert prompt.text == ("<system>Be brief.</><user>What is 0 + 1? Use ####.</><assistant>")


def test_a_list_of_messages_is_asked_as_it_is_and_stays_as_it_is():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [{"messages": [*messages, {"role": "user", "content": "Go"}]}]
    loaded = load(rows, column="messages", suffix="!")
    for _ in range(2):
        assert loaded.prompt(0).text == "<user>Hi</><assistant>Yes?</><user>Go!</><assistant>"
    assert rows[0]["messages"][-1]["content"] == "Go"


def test_messages_need_a_chat_template():
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}]
    with pytest.raises(ConfigError, match="no chat template"):
        load(rows, chat=False, column="messages").prompt(0)


def test_a_column_that_is_neither_text_nor_messages_is_refused():
    with pytest.raises(ConfigError, match="text or a list of chat messages, got int"):
        load(column="answer").prompt(0)


def test_a_prompt_column_named_prompt_does_not_shadow_the_rendered_prompt():
    prompt = load([{"prompt": "Hi", "answer": "x"}], column="prompt").prompt(0)
    assert prompt.columns == {"answer": "x"}


def test_a_missing_column_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"columns \['answer', 'question'\], got 'text'"):
        load(column="text")


def test_an_empty_set_is_refused():
    with pytest.raises(ConfigError, match="has no rows"):
        load([])


def test_transform_comes_before_everything_else():
    loaded = load(transform=lambda row: {"q": row["question"].upper()}, column="q")
    assert loaded.columns == ("q",)
    assert "WHAT IS 0" in loaded.prompt(0).text


def test_limit_uses_the_first_rows():
    assert len(load(limit=2)) == 2
    assert len(load(limit=100)) == 6
    with pytest.raises(ConfigError, match="`limit` must be >= 1"):
        Prompts(ROWS, limit=0)


def test_a_hook_may_make_the_prompt_itself():
    def make(row):
        return Prompt((1, 2), "made", columns={"n": row["answer"]})

    loaded = Prompts(ROWS, column="not there").load(CharTokenizer(), make_prompt=make)
    prompt = loaded.prompt(3, pass_index=2)
    assert (prompt.text, prompt.columns, prompt.key) == ("made", {"n": 4}, (2, 3))


def test_prompts_are_tokenized_when_they_are_asked_for():
    tokenizer = CharTokenizer()
    loaded = Prompts(ROWS * 1000, column="question").load(tokenizer, max_prompt_tokens=500)
    assert len(loaded) == 6000
    assert tokenizer.num_encoded <= 2


def test_prompts_that_leave_no_room_are_refused_by_name_before_the_run():
    rows = [*ROWS, {"question": "x" * 200, "answer": 0}]
    with pytest.raises(ConfigError, match=r"1 prompt\(s\).*row 6 \(220 tokens\).*too_long: skip"):
        load(rows, max_prompt_tokens=100)


def test_prompts_that_leave_no_room_can_be_left_out_and_counted():
    rows = [{"question": "x" * 200, "answer": 0}, *ROWS]
    loaded = load(rows, max_prompt_tokens=100, too_long="skip")
    assert (len(loaded), loaded.num_too_long) == (6, 1)
    assert loaded.prompt(0).columns["answer"] == 1


def test_json_lines_json_and_parquet_hold_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": "a\u2028b", "answer": 1}, {"question": "c", "answer": 2}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        loaded = load(str(tmp_path / name))
        assert [dict(prompt.columns) for prompt in loaded] == rows


@pytest.mark.parametrize("split", ["test", "train[:1]", ""])
@pytest.mark.parametrize("kind", ["file", "folder", "rows", "columns", "table", "dataset"])
def test_a_split_of_what_has_none_is_refused(tmp_path, kind, split):
    tqdm.monitor_interval = 0  # the monitor of progress bars is a thread that stays
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "folder")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    sources = {"file": tmp_path / "rows.jsonl", "folder": tmp_path / "folder", "rows": ROWS}
    sources |= {"columns": {"question": ["a", "b"]}, "table": pandas.DataFrame(ROWS)}
    source = {**sources, "dataset": dataset}[kind]
    assert len(load(source))
    with pytest.raises(ConfigError, match="`split` must be left out"):
        load(source, split=split)


def test_a_source_that_says_that_it_is_the_split_is_taken_for_it(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(ROWS[0]))
    assert len(load(tmp_path / "gsm8k_test.jsonl", split="test")) == 1
    with pytest.raises(ConfigError, match="`split` must be left out"):
        load(tmp_path / "gsm8k_test.jsonl", split="val")
    dataset = datasets.Dataset.from_list(ROWS, split="test")
    assert len(load(dataset, split="test")) == len(ROWS)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "x"}\n{"question": \n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2 is not JSON"):
        load(str(tmp_path / "a.jsonl"))


def test_a_file_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ConfigError, match="must name an existing file"):
        load(str(tmp_path / "none.jsonl"))


def test_a_folder_saved_by_datasets_and_a_dataset_itself(tmp_path):
    tqdm.monitor_interval = 0  # the monitor of progress bars is a thread that stays
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(
        tmp_path / "two"
    )
    assert load(dataset).prompt(2).columns == ROWS[2]
    assert len(load(str(tmp_path / "one"))) == 6
    assert len(load(str(tmp_path / "two"), split="test")) == 1
    with pytest.raises(ConfigError, match=r"`split` must be one of \['test', 'train'\], got 'val'"):
        load(str(tmp_path / "two"), split="val")


def test_reading_json_lines_does_not_import_datasets(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    code = (
        "import sys; from lightning_grpo.rollout.prompts import open_rows;"
        "rows = open_rows(sys.argv[1]); assert rows == [{'prompt': 'x'}];"
        "assert not {'datasets', 'pyarrow', 'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@given(
    num_rows=st.integers(1, 12),
    shuffle=st.booleans(),
    seed=st.integers(0, 9),
    start=st.integers(0, 50),
)
def test_every_pass_has_every_row_once_and_any_entry_can_be_had_at_any_time(
    num_rows, shuffle, seed, start
):
    def stream():
        rows = [{"question": str(i)} for i in range(num_rows)]
        return PromptStream(load(rows, shuffle=shuffle, seed=seed))

    keys = [stream().key(index) for index in range(4 * num_rows)]
    for pass_index in range(4):
        here = keys[pass_index * num_rows : (pass_index + 1) * num_rows]
        assert sorted(here) == [(pass_index, row) for row in range(num_rows)]
        if not shuffle:
            assert here == sorted(here)
    again = stream()
    for index in range(start % len(keys), len(keys)):
        assert again.key(index) == keys[index]
    pass_index, row = keys[start % len(keys)]
    assert again.prompts.prompt(row, pass_index).key == (pass_index, row)


def test_the_run_s_seed_is_the_prompts_where_they_name_none(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert Prompts([{"prompt": "a"}]).seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")  # what `seed_everything` leaves, also for children
    assert Prompts([{"prompt": "a"}]).seed == 7
    assert Prompts([{"prompt": "a"}], seed=3).seed == 3


def test_passes_and_seeds_have_orders_of_their_own():
    rows = [{"question": str(i)} for i in range(30)]
    orders = [
        [PromptStream(load(rows, seed=seed)).key(p * 30 + i)[1] for i in range(30)]
        for seed in (0, 1)
        for p in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


NO_ROWS = [
    (b'{"question": "a"}\n3\n', "row 1 of .* must have columns by name, got 3"),
    (b'{"question": "a"}\n{"quest": "b"}\n', r"columns \['quest'\] in row 1, got 'question'"),
    (b"\xff\xfe{}", "must name a file in UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), NO_ROWS)
def test_a_file_that_is_no_list_of_rows_is_refused_with_the_place(content, message, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path / "rows.jsonl"), max_prompt_tokens=100)


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a"}')
    assert load(str(tmp_path / "rows.jsonl")).columns == ("question",)


def test_a_broken_parquet_file_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"hello")
    with pytest.raises(ConfigError, match="must name a Parquet file"):
        load(str(tmp_path / "rows.parquet"))


def test_a_missing_csv_file_is_not_looked_for_on_the_hub():
    with pytest.raises(ConfigError, match="must name an existing file"):
        load("gone.csv")


@pytest.mark.parametrize(
    ("name", "comma"), [("rows.csv", ","), ("rows.tsv", "\t"), ("ROWS.CSV", ",")]
)
def test_cells_of_a_table_stay_the_text_that_they_are(tmp_path, name, comma):
    lines = [["question", "answer"], ['"a, ""b""\nand c"', "007"], ["NA", '"1,000"']]
    text = "\r\n".join(comma.join(cells) for cells in lines)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = load(str(tmp_path / name), chat=False)
    assert [prompt.text for prompt in found] == ['a, "b"\nand c', "NA"]
    assert [prompt.columns["answer"] for prompt in found] == ["007", "1,000"]


@pytest.mark.parametrize("line", ["a,b,c", "a", '"a'])
def test_a_broken_row_of_a_table_is_named(tmp_path, line):
    (tmp_path / "rows.csv").write_text(f"question,answer\nx,y\n{line}\n")
    with pytest.raises(ConfigError, match=r"rows.csv:\d is no row of a table"):
        load(str(tmp_path / "rows.csv"))


COLUMNS = {"question": ["a", "b"], "answer": [1, 2]}


@pytest.mark.parametrize(
    "make",
    [
        dict,
        pandas.DataFrame,
        pyarrow.table,
        datasets.Dataset.from_dict,
        lambda columns: pandas.DataFrame(columns, index=[7, 3]),
        lambda columns: {name: numpy.array(column) for name, column in columns.items()},
        lambda columns: {"train": datasets.Dataset.from_dict(columns), "test": []},
        lambda columns: datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}),
        lambda columns: tuple(pandas.DataFrame(columns).to_dict("records")),
    ],
)
def test_rows_may_come_as_whatever_holds_them_in_memory(make):
    found = load(make(COLUMNS))
    assert [prompt.text for prompt in found] == [
        f"<user>{name}</><assistant>" for name in COLUMNS["question"]
    ]
    assert [prompt.columns["answer"] for prompt in found] == [1, 2]


def test_columns_of_messages_and_json_of_columns_are_rows_too(tmp_path):
    chat = {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}
    (tmp_path / "columns.json").write_text(json.dumps(chat))
    for source in (chat, str(tmp_path / "columns.json")):
        found = load(source, column="messages")
        assert [prompt.messages[0]["content"] for prompt in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"question": ["a"], "answer": [1, 2]}, "columns of one length"),
        (DataLoader(["a"]), r"Give its dataset \(`loader.dataset`\)"),
        ((row for row in [{"prompt": "a"}]), r"taken as `list\(rows\)`"),
        (datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(), r"taken as `list\(rows\)`"),
        (["a", "b"], "must have columns by name, got 'a'"),
    ],
)
def test_what_has_no_rows_is_refused_with_the_way_out(source, said):
    with pytest.raises(ConfigError, match=said):
        load(source)


@pytest.mark.parametrize("path", [7, None])
def test_what_can_not_be_rows_is_refused(path):
    with pytest.raises(ConfigError, match="`path` must be the name of a dataset or file"):
        load(path)


def test_a_transform_that_fails_or_returns_no_row_is_named():
    with pytest.raises(ConfigError, match=r"`transform` failed for row 0 .* KeyError\('gone'\)"):
        load(transform=lambda row: row["gone"])
    with pytest.raises(ConfigError, match=r"`transform` must return the row .* got NoneType"):
        load(transform=lambda row: None)


@pytest.mark.parametrize("message", [{"content": "hi"}, {"role": "user"}])
def test_a_row_that_the_template_can_not_render_is_named(message):
    with pytest.raises(ConfigError, match=r"row 0 of .* can't be made a prompt"):
        load([{"question": [message]}]).prompt(0)


@pytest.mark.parametrize("row", [0, 66, 300])
@pytest.mark.parametrize("wrong", [None, float("nan"), 3, [], {"text": "x"}, [{"role": "user"}]])
def test_a_row_that_can_not_be_asked_is_found_at_the_start(row, wrong):
    rows = [{"question": f"What is {i}?"} for i in range(301)]
    rows[row]["question"] = wrong
    with pytest.raises(ConfigError, match=f"row {row} of the list given can't be made a prompt"):
        load(rows)


def test_rows_that_can_not_be_asked_are_counted():
    rows = [{"question": "What?" if i % 4 else None} for i in range(40)]
    rows[0]["question"] = "What?"
    with pytest.raises(ConfigError, match=r"row 4 of .*So it is with 8 other rows: 8, 12.* and 3"):
        load(rows)


def test_a_text_without_a_token_is_no_prompt():
    rows = [{"question": "What?"}, {"question": ""}]
    with pytest.raises(ConfigError, match=r"row 1 of .* it has no token to go on from"):
        load(rows, chat=False)
    assert load(rows).prompt(1).text == "<user></><assistant>"
    assert load(rows, chat=False, suffix="Go.").prompt(1).text == "Go."
    made = Prompts(rows, column="question").load(CharTokenizer(), make_prompt=made_of_nothing)
    with pytest.raises(PromptError, match=r"row 1 of .* it has no token to go on from"):
        made.prompt(1)


def made_of_nothing(row):
    return Prompt(tuple(map(ord, row["question"])), row["question"])


def test_an_id_that_the_model_does_not_have_is_named_with_its_row():
    rows = [{"question": text} for text in ("a", "b\u1234", "c", "<image>")]
    prompts = Prompts(rows, column="question")
    loaded = prompts.load(CharTokenizer(), vocabulary=Vocabulary(128))
    assert loaded.prompt(3).text
    with pytest.raises(PromptError, match=r"row 1 .* token id 4660, .* embedding only 128 rows"):
        loaded.prompt(1)  # not looked for at the start


def test_a_row_that_holds_a_token_that_the_model_does_not_have_is_found_at_the_start():
    rows = [{"question": text} for text in ("a", "b", "c", "an <image>")]
    with pytest.raises(ConfigError, match=r"row 3 .* token id 110, .* embedding only 110 rows"):
        load(rows, chat=False, vocabulary=Vocabulary(110, ("<image>",)))


def test_an_empty_conversation_is_refused():
    with pytest.raises(ConfigError, match="holds an empty list of chat messages"):
        load([{"question": []}]).prompt(0)
