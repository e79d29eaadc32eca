""""""

from __future__ import annotations

import threading
from decimal import Decimal
from math import copysign

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.rewards import gsm8k
from lightning_grpo.rewards.answers import (
    boxes_answer,
    final_number,
    has_tags,
    last_boxed,
    marks_answer,
    math,
)
from tests.unit.rewards.math_pairs import MISSED_PAIRS, PAIRS

RIGHT = [
    ("#### 18", "18"),
    ("She earns 9 * 2.\n#### 18", "#### 18"),
    ("#### 18", "Janet sells 16 - 3 - 4 = 9 eggs.\n#### 18"),
    ("#### 1,234", "1234"),
    ("#### 1234", "#### 1,234"),
    ("#### 1,234,567.50", "1234567.5"),
    ("#### $18.00", "18"),
    ("#### 18.0", "18"),
    ("#### .5", "0.5"),
    ("#### 018", "18"),
    ("#### 18 dollars.", "18"),
    ("#### 18.", "18"),
    ("#### 18, which is all.", "18"),
    ("#### 18%", "18"),
    ("#### 18kg", "18"),
    ("#### **18**", "18"),
    ("#### The answer is 18.", "18"),
    ("#### x=18", "18"),
    ("#### v2 gives 18", "18"),
    ("####18", "18"),
    ("####\n18", "18"),
    ("#### -5", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### \u22125", "-5"),
    ("#### $ 5", "5"),
    ("#### \u20ac5", "5"),
    ("#### 3\nNo, wait.\n#### 18", "18"),
    ("#### 18 (that is 12 + 6)", "18"),
    ("#### 0.1", "0.10"),
    ("#### \u20135", "-5"),
    ("#### \u20145", "-5"),
    ("#### minus 5", "-5"),
    ("#### 1 000", "1000"),
    ("#### 1\u202f000", "1000"),
    ("#### 1\\,000 km", "1000"),
    ("#### 1{,}000", "1000"),
    ("#### 18 cm^2", "18"),
    ("#### 18 cm\u00b2", "18"),
    ("#### 18 (that is, 12 or 6 more)", "18"),
    ("#### -> 18", "18"),
    ("#### => 18", "18"),
    ("#### at least 18", "18"),
    ("#### 18 pi\u00f1atas", "18"),
    ("#### 18 monkeys", "18"),
    ("#### 18 eggs, 3 of them", "18"),
    ("#### 18 other eggs", "18"),
]
WRONG = [
    ("18", "18"),
    ("", "18"),
    ("####", "18"),
    ("#### none", "18"),
    ("#### 18\n#### 3", "18"),
    ("#### 19", "18"),
    ("#### -18", "18"),
    ("#### 18.01", "18"),
    ("#### 181", "18"),
    ("#### 1,8", "18"),
    ("#### 1/2", "1"),
    ("#### 1e3", "1"),
    ("#### 10-20", "10"),
    ("#### 3, 4", "3"),
    ("#### 3 + 5", "3"),
    ("#### 12:30", "12"),
    ("#### 1.2.3", "1.2"),
    ("#### \n\nBecause 18", "17"),
    ("#### 0.30000000000000004", "0.3"),
    ("#### 9007199254740993", "9007199254740992"),
    ("### 18", "18"),
    ("#### 5 1/2", "5"),
    ("#### 5 \\frac{1}{2}", "5"),
    ("#### 5\\frac12", "5"),
    ("#### 5-1/2", "5"),
    ("#### 5 and a half", "5"),
    ("#### 5 point 5", "5"),
    ("#### 1 000", "1"),
    ("#### 1\u202f000", "1"),
    ("#### 1 00", "1"),
    ("#### 1'000", "1"),
    ("#### 1_000", "1"),
    ("#### 1\\,000", "1"),
    ("#### 1{,}000", "1"),
    ("#### 1,000 000", "1000"),
    ("#### 2\u00bd", "2"),
    ("#### 2 \u00bd", "2"),
    ("#### \u00bd", "0"),
    ("#### 3\u00b2", "3"),
    ("#### 3^2", "3"),
    ("#### 3 squared", "3"),
    ("#### 1\u0663", "1"),
    ("#### 1\uff13", "1"),
    ("#### 12 or 13", "12"),
    ("#### 12 (or 13)", "12"),
    ("#### 12 or thirteen", "12"),
    ("#### 12 eggs or 13 eggs", "12"),
    ("#### 12, or 13", "12"),
    ("#### 12, maybe 13", "12"),
    ("#### 12 (13)", "12"),
    ("#### 12; 13", "12"),
    ("#### 12 | 13", "12"),
    ("#### 12? 13", "12"),
    ("#### 12 to 13", "12"),
    ("#### 12\u201313", "12"),
    ("#### 12 \u2014 13", "12"),
    ("#### 12 feet 6 inches", "12"),
    ("#### 12 dollars and 50 cents", "12"),
    ("#### 5 million", "5"),
    ("#### 5k", "5"),
    ("#### 5 dozen", "5"),
    ("#### 5\u00b73", "5"),
    ("#### 5\\cdot 3", "5"),
    ("#### 5 \\times 3", "5"),
    ("#### 5\u00f73", "5"),
    ("#### 5\\sqrt{2}", "5"),
    ("#### 5\u221a2", "5"),
    ("#### 5x", "5"),
    ("#### 5\u03c0", "5"),
    ("#### \u20135", "5"),
    ("#### \u20145", "5"),
    ("#### \u22125", "5"),
    ("#### \uff0d5", "5"),
    ("#### minus 5", "5"),
    ("#### negative $5", "5"),
    ("#### \u00b15", "5"),
    ("#### \\pm 5", "5"),
    ("#### not 5", "5"),
    ("#### > 5", "5"),
    ("#### more than 5", "5"),
    ("#### \u221a5", "5"),
    ("#### \\sqrt{5}", "5"),
    ("#### \\frac{5}{2}", "5"),
    ("#### 5 .5", "5"),
    ("#### 5. 6", "5"),
    ("#### 5_2", "5"),
    ("#### 5 E2", "5"),
    ("#### 5 lakh", "5"),
    ("#### 5 one half", "5"),
    ("#### 5...6", "5"),
    ("#### 5 tenths", "5"),
    ("#### 5 sixths", "5"),
    ("#### half of 5", "5"),
    ("#### double 5", "5"),
    ("#### sqrt(5)", "5"),
    ("#### log 5", "5"),
    ("#### 5 in base 6", "5"),
    ("#### 5 + x", "5"),
    ("#### 5 (maybe 6)", "5"),
    ("#### 5 eggs (alternatively 6)", "5"),
    ("#### 5, no wait 6", "5"),
    ("#### 5. Actually 6", "5"),
    ("#### 5 eggs, 6 eggs", "5"),
    ("#### $5 dollars; $6 dollars", "5"),
    ("#### 5 quadrillion", "5"),
    ("#### 5C2", "5"),
    ("#### 5 doubled", "5"),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_a_right_answer_as_models_write_it_scores_one(completion, answer):
    assert gsm8k(completion, answer) == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_what_is_not_the_number_after_the_last_mark_scores_zero(completion, answer):
    assert gsm8k(completion, answer) == 0.0


def test_a_dataset_answer_may_be_a_number():
    assert gsm8k("#### 18", 18) == 1.0


def test_a_dataset_answer_without_a_number_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="holds no number: 'unknown'"):
        gsm8k("#### 18", "unknown")


@given(
    number=st.integers(-(10**12), 10**12),
    commas=st.booleans(),
    dollars=st.booleans(),
    before=st.text(max_size=30),
    tail=st.sampled_from(["", ".", " dollars.", "\n", "!", " eggs, 3 of them", ".00", "\n7"]),
)
def test_any_number_is_found_however_it_is_written(number, commas, dollars, before, tail):
    written = f"{abs(number):,}" if commas else str(abs(number))
    written = ("-" if number < 0 else "") + ("$" if dollars else "") + written
    assert gsm8k(f"{before}\n#### {written}{tail}", f"#### {number}") == 1.0
    assert gsm8k(f"{before}\n#### {written}{tail}", f"#### {number + 1}") == 0.0


@given(text=st.text(max_size=300))
def test_no_text_breaks_it(text):
    found = final_number(text)
    assert found is None or isinstance(found, Decimal)
    assert gsm8k(text, "3") in (0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    ["#" * 10**6, "####" + "9" * 10**6, "####" + "1," * 10**6, "#### -" * 10**5, "x" * 10**6],
)
@pytest.mark.timeout(5)
def test_a_megabyte_of_anything_is_nothing(text):
    for _ in range(50):
        assert gsm8k(text, "18") == 0.0


def test_the_result_is_a_float():
    assert copysign(1.0, gsm8k("", "1")) == 1.0
    assert isinstance(gsm8k("#### 1", "1"), float)


# ---- format -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("2 + 2 = 4\n#### 4", 1.0),
        ("2 + 2 = 4 #### 4\n\n", 1.0),
        ("#### 4\nSo it is.", 0.0),
        ("#### 3\n#### 4", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_is_marked_once_and_last(completion, score):
    assert marks_answer(completion) == score


def test_a_box_has_something_in_it():
    assert boxes_answer(r"so \boxed{4}") == 1.0
    assert boxes_answer(r"so \boxed{}") == 0.0
    assert boxes_answer("so 4") == 0.0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"\boxed {7}", 1.0),
        ("\\boxed\n{7}", 1.0),
        (r"\boxed{{7}}", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{7", 0.0),
        (r"\boxed{7} or \boxed{", 0.0),
        (r"\boxed{ {} }", 0.0),
        (r"\boxed{\,\text{ }}", 0.0),
        (r"\boxed{\textit{}}", 0.0),
        (r"\boxed{\ }", 0.0),
        (r"\boxed 7", 0.0),
    ],
)
def test_a_box_is_what_math_reads_as_one(completion, score):
    assert boxes_answer(completion) == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a < b</think><answer>4</answer>", 1.0),
        ("\n<think>a</think>\n<answer>4</answer>\n", 1.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("<think><think>a</think><answer>4</answer>", 0.0),
        ("4", 0.0),
    ],
)
def test_tags_come_in_order_with_nothing_around_them(completion, score):
    assert has_tags()(completion) == score


def test_other_tags_can_be_asked_for():
    assert has_tags(["a.b"])("<a.b>x</a.b>") == 1.0
    assert has_tags(["a.b"])("<acb>x</acb>") == 0.0


def test_the_template_may_have_opened_the_first_tag():
    opened = "I add.</think>\n<answer>4</answer>"
    whole = "<think>" + opened
    assert has_tags()(opened) == 1.0
    assert has_tags()(opened, prompt="What?<assistant><think>\n") == 1.0
    assert has_tags()(whole, prompt="What?<assistant>") == 1.0
    assert has_tags()(opened, prompt="What?<assistant>") == 0.0
    assert has_tags()(whole, prompt="What?<assistant><think>\n") == 0.0
    assert has_tags()("<answer>4</answer>", prompt="<think>") == 0.0
    assert has_tags()("4</answer>") == 0.0


# -- answers in a box, compared by value: handwritten pairs, and attacks ---------------------------


pytest.importorskip("math_verify", reason="needs the extra [math]")


def boxed(text):
    return f"So we find $\\boxed{{{text}}}$."


@pytest.mark.parametrize(("gold", "said", "expected"), PAIRS)
def test_a_handwritten_pair(gold, said, expected):
    assert math(boxed(said), gold) == expected


@pytest.mark.parametrize(("gold", "said"), MISSED_PAIRS)
def test_a_pair_that_is_known_to_be_missed(gold, said):
    assert math(boxed(said), gold) == 0.0


def test_there_are_two_hundred_pairs_and_both_sides_are_large():
    expected = [value for _, _, value in PAIRS]
    assert len(expected) >= 200
    assert 80 <= sum(expected) <= len(expected) - 80


def test_the_last_box_counts_and_none_is_wrong():
    assert math(boxed("4") + boxed("5"), "5") == 1.0
    assert math(boxed("5") + boxed("4"), "5") == 0.0
    for text in ("The answer is 5.", "#### 5", "", "\\boxed 5", "\\boxed{5", "\\boxed{}"):
        assert math(text, "5") == 0.0


def test_a_forged_mark_in_the_question_or_completion_changes_nothing():
    assert math("You said #### 7. " + boxed("5"), "5") == 1.0
    assert math("\\boxed{7} is what you want? #### 5", "5") == 0.0


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} \\boxed {2}", "2"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{{{", None),
        ("\\boxed{ }", None),
        ("none", None),
    ],
)
def test_a_box_ends_where_its_brace_does(text, inside):
    assert last_boxed(text) == inside


MEGABYTE = 2**20
ATTACKS = {
    "digits": boxed("9" * MEGABYTE),
    "words": "x " * MEGABYTE + boxed("6"),
    "boxes": "\\boxed{" * MEGABYTE,
    "boxes that end": "\\boxed{" * 10_000 + "6" + "}" * 10_000,
    "braces": boxed("{" * 200 + "5" + "}" * 200),
    "parentheses": boxed("(" * 150 + "5" + ")" * 150),
    "fractions": boxed("\\frac{1}{" * 40 + "2" + "}" * 40),
    "roots": boxed("\\sqrt{" * 15 + "2" + "}" * 15),
    "tower": boxed("9^{9^{9^{9^9}}}"),
    "tower without braces": boxed("9^9^9^9"),
    "power": boxed("2^{1000000000}"),
    "negative power": boxed("2^{-1000000000}"),
    "decimal powers": boxed("(2.5^{9999})^{9999}"),
    "repeating": boxed("0.\\overline{" + "1" * 300 + "}"),
    "spaces": boxed("1" + " " * 390),
    "groups": boxed("1" + " 000" * 90 + " "),
    "letters": boxed("5" + " a" * 190),
    "factorial": boxed("100000!"),
    "factorials": boxed("99!!!!"),
    "sum": boxed("\\sum_{n=1}^{999999999} \\frac{1}{n}"),
    "integral": boxed("\\int_0^1 e^{x^x} \\sin(\\cos(\\tan(x^x))) dx"),
    "never simplified": boxed("(\\sin x + \\cos x)^{97} (\\tan x + \\cot x)^{89} - e^{i x^{31}}"),
    "roots of sums": boxed("+".join(f"\\sqrt{{{n}+\\sqrt{{{n + 1}}}}}" for n in range(2, 19))),
    "characters": boxed("\x00\ud800\u202e\\\\%$#&"),
    "code": boxed("__import__('os').system('true')"),
    "dollars": boxed("$" * 300),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_a_wrong_answer(name):
    assert math(ATTACKS[name], "5") == 0.0


def test_it_also_works_where_there_is_no_alarm():
    values = []
    thread = threading.Thread(target=lambda: values.append(math(boxed("0.5"), "\\frac{1}{2}")))
    thread.start()
    thread.join()
    assert values == [1.0]


def test_an_answer_of_the_dataset_that_cannot_be_read_is_told():
    with pytest.raises(ValueError, match="the dataset's answer can't be read"):
        math(boxed("5"), "")
