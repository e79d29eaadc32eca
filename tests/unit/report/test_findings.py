from __future__ import annotations

import pytest

from lightning_grpo.report.findings import (
    best_step,
    command_to_go_on,
    expected_number,
    findings,
    how_it_ended,
    is_it_gamed,
    is_it_learning,
    slow_steps,
    what_is_wrong,
    where_time_went,
    why_slow,
)
from lightning_grpo.report.run import find_folder, read_run
from tests.fakes.report_runs import (
    BEGAN,
    answer,
    group,
    span_line,
    start_line,
    step_row,
    write_batch,
    write_metrics,
    write_run,
    write_timeline,
)


def read(folder):
    return read_run(folder, "run")


@pytest.fixture
def run(tmp_path):
    return read(write_run(tmp_path))


def test_every_question_is_answered_of_a_run_that_has_all(run):
    assert [finding.question for finding in findings(run)] == [
        "How did it end?",
        "Which step was best?",
        "Is it learning?",
        "What does it get wrong now?",
        "Is it gaming the reward?",
        "Where did the time go?",
        "Which steps took long, and why?",
    ]


# -- the end --------------------------------------------------------------------------------------


def test_a_run_that_ended_says_so(run):
    assert how_it_ended(run).answer == "It ran to its end at step 6. 6 steps were trained of 6."


def test_a_run_that_failed_before_its_first_step_says_why(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 6}\n")
    end = {"kind": "end", "at": BEGAN, "step": 0, "how": "failed", "text": "no room on the GPU"}
    write_timeline(tmp_path, [start_line(), end])
    found = findings(read(tmp_path))
    assert [finding.question for finding in found] == ["How did it end?"]
    assert found[0].answer == "It failed at step 0. No step was trained (6 were asked)."
    assert found[0].details == ["no room on the GPU"]


def test_a_run_that_goes_on_or_was_killed_is_not_called_done(tmp_path):
    write_metrics(tmp_path, [step_row(1)])
    write_timeline(tmp_path, [start_line(), start_line(1)])
    finding = how_it_ended(read(tmp_path))
    assert finding.answer.startswith("It runs, or was killed")
    assert finding.details == ["It went on from step 1."]


def test_a_run_without_a_timeline_does_not_say_how_it_ended(tmp_path):
    write_metrics(tmp_path, [step_row(1), step_row(2, policy__grad_norm=float("nan"))])
    finding = how_it_ended(read(tmp_path))
    assert finding.answer == "2 steps were trained. Its folder does not say how it ended."
    assert finding.details == ["policy/grad_norm was nan at step 2."]


def test_the_command_to_go_on_can_be_pasted(tmp_path):
    folder = tmp_path / "my runs"
    command = f"lightning-grpo fit --config '{folder}/config.yaml'"
    assert command_to_go_on(read(folder)) == command, "there is no checkpoint"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    assert command_to_go_on(read(folder)) == f"{command} --ckpt_path last"


def test_a_run_that_has_ended_is_told_to_train_longer(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 6}\n")
    end = {"kind": "end", "at": BEGAN, "step": 6, "how": "done"}
    write_timeline(tmp_path, [start_line(), end])
    assert command_to_go_on(read(tmp_path)).endswith("--trainer.max_steps 12 --ckpt_path last")
    write_timeline(tmp_path, [start_line(), end | {"step": 4, "how": "stopped"}])
    assert "max_steps" not in command_to_go_on(read(tmp_path))


def test_a_later_run_that_trained_nothing_is_named_beside_the_one_that_is_shown(tmp_path):
    for version in ("version_0", "version_1", "version_2"):
        (tmp_path / version).mkdir()
        write_metrics(tmp_path / version, [step_row(1)])
    write_batch(tmp_path / "version_1", 1, [group(0, [answer()])])
    shown = find_folder(tmp_path)
    assert shown.name == "version_1"
    (detail,) = how_it_ended(read(shown)).details
    assert f"A later run, {tmp_path / 'version_2'}, has trained on nothing so far" in detail


def test_groups_of_equal_rewards_are_named_where_most_of_them_are(tmp_path):
    rows = [step_row(step, reward__zero_variance_fraction=0.8) for step in range(1, 6)]
    write_metrics(tmp_path, rows)
    assert "80% of the groups had equal rewards" in is_it_learning(read(tmp_path)).details[-1]


# -- the best step --------------------------------------------------------------------------------


def validations(tmp_path, *scores, width=0.05):
    rows = [
        {
            "step": 10 * i,
            "eval/avg_at_1": score,
            "eval/avg_at_1_ci95_low": score - width,
            "eval/avg_at_1_ci95_high": score + width,
        }
        for i, score in enumerate(scores)
    ]
    write_metrics(tmp_path, rows)
    return read(tmp_path)


def test_the_best_step_is_that_of_the_best_validation(tmp_path):
    finding = best_step(validations(tmp_path, 0.2, 0.8, 0.5))
    assert finding.answer == "Step 10: eval/avg_at_1 0.800 (0.750 to 0.850), from 0.200 at step 0."
    assert finding.details[0] == (
        "At the last validation, step 20, it was 0.500: worse by more than the intervals."
    )


def test_a_difference_within_the_intervals_is_called_none(tmp_path):
    finding = best_step(validations(tmp_path, 0.2, 0.8, 0.75))
    assert "no worse than the intervals allow" in finding.details[0]


def test_the_checkpoint_of_the_best_step_is_named_or_those_that_there_are(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/epoch=0-step=10.ckpt").touch()
    (tmp_path / "checkpoints/final-step=30.ckpt").touch()
    assert best_step(validations(tmp_path, 0.2, 0.8)).details == [
        f"Its checkpoint: {tmp_path}/checkpoints/epoch=0-step=10.ckpt"
    ]
    assert best_step(validations(tmp_path, 0.8, 0.2)).details[-1] == (
        "There is no checkpoint of it; there are some of step 10, 30."
    )


def test_without_validations_the_reward_s_mean_over_some_steps_decides(tmp_path):
    rewards = (0.1, 0.2, 0.9, 0.2, 0.3, 0.6, 0.6, 0.6, 0.1, 0.1)
    write_metrics(tmp_path, [step_row(i, reward__mean=r) for i, r in enumerate(rewards, 1)])
    assert best_step(read(tmp_path)).answer.startswith("Step 7 by the training reward, 0.520")


# -- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "answer"),
    [
        ((0.2, 0.8), "Yes: the held-out score rises."),
        ((0.8, 0.2), "No: the held-out score falls."),
        ((0.5, 0.52), "Not that one could tell: the held-out score stays within its interval."),
    ],
)
def test_it_is_learning_where_the_held_out_score_rises_beyond_noise(tmp_path, scores, answer):
    assert is_it_learning(validations(tmp_path, *scores)).answer == answer


def test_a_change_has_an_interval_of_both_scores_and_none_beyond_what_fractions_allow(tmp_path):
    names = ("step", "eval/greedy", "eval/greedy_ci95_low", "eval/greedy_ci95_high")
    rows = [(0, 0.0, 0.0, 0.2775), (10, 1.0, 0.7225, 1.0)]
    write_metrics(tmp_path, [dict(zip(names, row, strict=True)) for row in rows])
    assert is_it_learning(read(tmp_path)).details == [
        "eval/greedy: 0.000 -> 1.000 (step 0 -> 10): better at 95 % (+0.608 to +1.000)."
    ]


def test_without_validations_only_the_training_reward_is_known(tmp_path):
    write_metrics(tmp_path, [step_row(step) for step in range(1, 7)])
    assert is_it_learning(read(tmp_path)).answer.startswith("The training reward rises. Held-out")


# -- time -----------------------------------------------------------------------------------------


def test_the_time_is_shared_out(tmp_path):
    write_metrics(tmp_path, [step_row(1), step_row(2)])
    assert where_time_went(read(tmp_path)).answer == (
        "2 steps took 4.0 s without validation: forward and backward 50%, waiting 25%, other 12%, "
        "weight sync 8%, optimizer 5%."
    )


def test_a_slow_step_says_what_was_slow_and_what_happened_meanwhile(run):
    assert list(why_slow(run)) == [3]
    assert why_slow(run)[3] == (
        "9.0 s instead of 2.0 s: waiting 7.5 s (usually 500 ms). 3 attempts at a group failed and "
        "were made again. server 1 was out for 7.5 s of it. Said then: server 1 is out."
    )
    assert slow_steps(run).answer == "Step 3 (9.0 s), where the median is 2.0 s."


def test_what_servers_do_behind_a_step_is_no_reason_for_it(tmp_path):
    rows = [step_row(step) for step in (1, 2, 3)]
    write_metrics(tmp_path, [*rows, step_row(4, time__step_s=8.0, time__wait_rollout_s=6.5)])
    spans = [
        span_line(0, 6.5, "waiting", step=4),
        span_line(8, 20, "validation", step=4),
        span_line(8, 20, "paused", "server 0", step=4),
    ]
    write_timeline(tmp_path, [start_line(), *spans])
    assert why_slow(read(tmp_path))[4] == (
        "8.0 s instead of 2.0 s: waiting 6.5 s (usually 500 ms)."
    )


def test_the_first_step_after_a_start_says_so(tmp_path):
    rows = [step_row(step) for step in (1, 2, 3)]
    write_metrics(tmp_path, [*rows, step_row(4, time__step_s=4.0, time__wait_rollout_s=2.5)])
    write_timeline(tmp_path, [start_line(), start_line(3)])
    assert why_slow(read(tmp_path))[4].endswith(
        "It was the first step since a start, when nothing was sampled ahead."
    )


def test_where_no_step_was_slow_none_is_named(tmp_path):
    write_metrics(tmp_path, [step_row(step) for step in (1, 2, 3)])
    finding = slow_steps(read(tmp_path))
    assert finding.answer == "None took more than 1.5 times the median of 2.0 s and 1.0 s longer."


def test_a_step_that_took_tenths_of_a_second_longer_is_not_called_slow(tmp_path):
    for seconds, slow in ((0.2, []), (1.0, []), (1.2, [4])):
        taken = [(1, 0.1), (2, 0.1), (3, 0.1), (4, seconds)]
        write_metrics(tmp_path, [{"step": step, "time/step_s": s} for step, s in taken])
        assert list(why_slow(read(tmp_path))) == slow


# -- what is wrong --------------------------------------------------------------------------------


def test_what_is_wrong_is_counted_at_the_last_validation(run):
    finding = what_is_wrong(run)
    assert finding.answer == "1 of 4 held-out answers at step 6 have a reward below 0.5."
    assert finding.details == [
        "1 of the wrong ones were cut off at the length limit.",
        "Wrong answers have 4 tokens on average, right ones 4.",
        "In 1 of 1 wrong ones the expected number is somewhere in the answer.",
        "Mean of form among them: 1.",
        "Mean of right among them: 0.",
        "Since step 0, of 4 prompts: 3 became right, 0 became wrong, 1 were wrong both times.",
    ]
    wrong, changed = finding.looks
    assert wrong.state | {"sort": 0} == {
        "view": "answers", "run": "run", "kind": "held-out", "steps": "6", "below": 0.5, "sort": 0
    }  # fmt: skip
    assert changed.state["steps"] == "0,6"


def test_without_validations_the_last_steps_of_training_are_looked_at(tmp_path):
    for step in range(1, 6):
        write_batch(tmp_path, step, [group(0, [answer(), answer(reward=0.0)])])
    finding = what_is_wrong(read(tmp_path))
    assert finding.answer == "3 of 6 answers in training at steps 3-5 have a reward below 0.5."


def test_an_answer_without_a_number_as_reward_counts_as_wrong(tmp_path):
    write_batch(tmp_path, 1, [group(0, [answer(), answer(reward=float("nan"))])])
    assert what_is_wrong(read(tmp_path)).answer.startswith("1 of 2")


@pytest.mark.parametrize(
    ("columns", "number"),
    [
        ('{"answer": "3 + 4 = 7\\n#### 1,007"}', "1007"),
        ('{"solution": "none"}', None),
        ('{"question": "What is 3?"}', None),
        ("not JSON", None),
        ("[1]", None),
    ],
)
def test_the_expected_number_is_the_last_one_of_the_row_s_answer(columns, number):
    assert expected_number({"columns": columns}) == number


@pytest.mark.parametrize(
    ("text", "count", "fails"), [("6, it seems", 10, "form"), ("I give up", 0, "reasoning")]
)
def test_many_wrong_answers_tell_what_fails(tmp_path, text, count, fails):
    write_batch(tmp_path, 1, [group(3, [answer(text, 0.0)] * 10)])
    assert (
        f"In {count} of 10 wrong ones the expected number is somewhere in the answer: {fails} is "
        "what mostly fails."
    ) in what_is_wrong(read(tmp_path)).details


# -- gaming ---------------------------------------------------------------------------------------


def signs(run):
    finding = is_it_gamed(run)
    return finding.answer, [line for line in finding.details if line.startswith("!")]


def write_steps(tmp_path, groups, **metrics):
    for step in range(1, 4):
        write_batch(tmp_path, step, groups)
    rows = [
        step_row(step, **{name: values[step - 1] for name, values in metrics.items()})
        for step in range(1, 4)
    ]
    write_metrics(tmp_path, rows)
    return read(tmp_path)


def test_a_run_that_does_its_task_shows_no_sign(tmp_path):
    groups = [group(row, [answer(f"It is #### {2 * row}")]) for row in range(1, 9)]
    assert signs(write_steps(tmp_path, groups)) == (
        "None of 3 signs points to it; no count sees everything, so read some.",
        [],
    )


def test_the_same_text_for_every_prompt_is_a_sign(tmp_path):
    tokens = 20
    many = answer(
        "The answer is 2, 4, 6, 8, 10, 12, 14 and 16.",
        input_ids=tuple(range(5, 5 + tokens)),
        response_mask=(False, False, *[True] * (tokens - 2)),
        logprobs=(0.0,) * tokens,
        versions=(-1, -1, *[0] * (tokens - 2)),
    )
    answer_, found = signs(write_steps(tmp_path, [group(row, [many]) for row in range(1, 9)]))
    assert answer_ == "1 of 3 signs points to it."
    assert "24 of 24 rewarded answers are the same text for several prompts (8 times" in found[0]


def test_a_reward_without_the_expected_answer_is_a_sign(tmp_path):
    groups = [group(row, [answer(f"{row}: I am sure.")]) for row in range(1, 9)]
    _, found = signs(write_steps(tmp_path, groups))
    assert found == ["! 24 of 24 rewarded answers don't hold the expected number."]


def test_where_the_reward_may_be_gamed_its_rise_is_not_taken_for_learning(tmp_path):
    groups = [group(row, [answer(f"{row}: I am sure.")]) for row in range(1, 9)]
    found = {finding.question: finding for finding in findings(write_steps(tmp_path, groups))}
    assert found["Is it learning?"].details[-1] == (
        "It is the reward that says so, and it may be gamed: see there."
    )


def test_named_rewards_that_part_are_a_sign(tmp_path):
    groups = [group(1, [answer("#### 2")])]
    run = write_steps(
        tmp_path, groups, reward__right__mean=(0.6, 0.4, 0.2), reward__form__mean=(0.1, 0.5, 0.9)
    )
    _, found = signs(run)
    assert found == ["! Rewards by name: form +0.800, right -0.400: one rises, one falls."]


def test_a_training_reward_that_rises_alone_is_a_sign(tmp_path):
    write_run(tmp_path)
    rows = [step_row(step, reward__mean=0.2 * step) for step in range(1, 5)]
    write_metrics(
        tmp_path, [{"step": 0, "eval/greedy": 0.5}, *rows, {"step": 4, "eval/greedy": 0.5}]
    )
    _, found = signs(read(tmp_path))
    assert found == [
        "! The training reward changed by +0.400, the held-out score by +0.000: only the former "
        "rises."
    ]


def test_answers_that_are_cut_off_and_rewarded_are_a_sign(tmp_path):
    groups = [group(row, [answer(f"#### {2 * row}", truncated=True)]) for row in range(1, 9)]
    _, found = signs(write_steps(tmp_path, groups))
    assert found == ["! 24 of 24 answers that were cut off got the reward all the same."]


def test_a_length_that_decides_the_reward_is_a_sign(tmp_path):
    def of_length(tokens, reward):
        sampled = tokens - 2
        return answer(
            "#### 2",
            reward,
            input_ids=(5,) * tokens,
            response_mask=(False, False, *[True] * sampled),
            logprobs=(0.0,) * tokens,
            versions=(-1, -1, *[0] * sampled),
        )

    groups = [group(1, [of_length(4, 1.0), of_length(5, 1.0), of_length(30, 0.0)])]
    _, found = signs(write_steps(tmp_path, groups))
    assert len(found) == 1
    assert "reward and length correlate by -1.00: length nearly decides." in found[0]
