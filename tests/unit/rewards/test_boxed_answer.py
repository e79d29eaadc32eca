r"""Answers in a box, compared by value: handwritten pairs, and attacks."""

from __future__ import annotations

import threading

import pytest

from lightning_grpo.rewards.answers import last_boxed, math
from tests.unit.rewards.math_pairs import MISSED_PAIRS, PAIRS

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
