from __future__ import annotations

import pytest

from lightning_grpo.rewards.answers import boxes_answer, has_tags, marks_answer


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
