"""The report's page in a real browser, as a person uses it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_grpo.report.answers import choose_answers
from lightning_grpo.report.page import PageServer, page_data, render_page
from lightning_grpo.report.run import read_runs, stamp
from tests.fakes.browser import Browser, missing_browser
from tests.fakes.report_runs import (
    BEGAN,
    answer,
    group,
    start_line,
    write_batch,
    write_run,
    write_timeline,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(missing_browser()), reason=missing_browser()),
]

STEPS, GROUPS, SIZE = 10, 24, 8
MARKUP = "<script>document.title = 'gone'</script><img src=x onerror=\"document.title = 'gone'\">"
HEBREW, EMOJI = "\u05e9\u05dc\u05d5\u05dd", "\U0001f469\u200d\U0001f52c"
CALL = (
    '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>\n<|im_start|>user\n'
    "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>"
)


def write_page(path: Path, *folders: Path, limit: int = 4000) -> str:
    """The page's address."""
    runs = read_runs(folders)
    path.write_text(render_page(page_data(runs, choose_answers(runs, limit))), encoding="utf-8")
    return path.as_uri()


def write_large_run(folder: Path) -> Path:
    """About 2,000 trajectories; row 0 is asked at every step, and answered better each time."""
    write_run(folder, STEPS)
    for step in range(1, STEPS + 1):
        groups = []
        for place in range(GROUPS):
            right = place % 7 + step // 3
            row = 1000 * step + place if place else 0
            groups.append(
                group(
                    row,
                    [
                        answer(
                            f"step {step} row {row} says {n}", float(n < right), truncated=n == 7
                        )
                        for n in range(SIZE)
                    ],
                )
            )
        write_batch(folder, step, groups)
    strange = [
        answer(MARKUP),
        answer(f"{HEBREW} {EMOJI} end", 0.5),
        answer("needle " + "word " * 200_000 + "tail", 0.0),
        answer("It is 4.", 1.0, transcript=CALL, num_turns=2),
        answer("not a number", float("nan")),
    ]
    write_batch(folder, STEPS, [group(7, strange, asked=f"{MARKUP} asked"), *groups])
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    return write_page(folder / "report.html", write_large_run(folder / "large/version_0"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def page(browser) -> Iterator[Browser]:
    """A tab on a wide, light screen; a test that leaves a complaint in the console fails."""
    browser.size(1400)
    browser.complaints()
    yield browser
    assert browser.complaints() == []


def first_card(page: Browser) -> str:
    return page.text(".card")


def status(page: Browser) -> str:
    return page.text("#status")


# -- overview -------------------------------------------------------------------------------------


def test_the_page_opens_on_the_answers_to_what_one_asks_first(page, large):
    page.open(large)
    questions = page.texts(".questions h3")
    assert {"Which step was best?", "What does it get wrong now?", "Is it gaming the reward?"} < {
        *questions
    }
    assert "Step 10: eval/avg_at_1 0.750" in page.text("#questions")
    assert page.count("#charts figure") == page.count("#charts canvas") > 5


def test_a_step_that_took_long_says_why(page, large):
    page.open(large, "step=5")
    assert "9.0 s instead of 2.0 s: waiting 7.5 s" in page.text("#step")
    assert "server 1 was out" in page.text("#step")
    page.press("]")
    assert page.run("return document.querySelector('#step-number').value") == "6"
    assert "server 1 was out" not in page.text("#step")


def test_a_click_on_a_chart_chooses_its_step(page, large):
    page.open(large)
    page.run(
        "const over = document.querySelector('#charts .u-over');"
        "const box = over.getBoundingClientRect();"
        "for (const kind of ['mousemove', 'mousedown', 'mouseup', 'click']) over.dispatchEvent(new"
        " MouseEvent(kind, {bubbles: true, clientX: box.left + 2, clientY: box.top + 20}))"
    )
    page.wait(lambda: "step=" in page.run("return location.hash"))
    assert page.run("return document.querySelector('#step-number').value") in ("0", "1")


def test_another_metric_can_be_drawn(page, large):
    page.open(large)
    before = page.count("#charts figure")
    page.choose("extra", "rollout/retried")
    assert page.count("#charts figure") == before + 1
    assert "rollout/retried" in page.texts("#charts figure h3 span")


def test_what_a_metric_means_is_beside_its_chart(page, large):
    page.open(large)
    page.click("#charts details summary")
    assert "mean reward over the rollout batch" in page.text("#charts details[open]")


def test_two_runs_lie_over_each_other_with_a_name_each(page, tmp_path):
    write_run(tmp_path / "first/version_0")
    write_run(tmp_path / "second/version_0", 8)
    page.open(write_page(tmp_path / "r.html", tmp_path / "first", tmp_path / "second"))
    keys = page.texts("#charts figure:first-child .key")
    assert [key.split()[0] for key in keys] == ["first", "second"]
    assert page.texts("#overview table tbody tr th")[:2] == ["first", "second"]
    page.choose("run", "second")
    assert "8 steps were trained" in page.text("#questions")


# -- answers --------------------------------------------------------------------------------------


def test_a_finding_leads_to_the_answers_that_it_counted(page, large):
    page.open(large)
    page.click_text("Read the wrong ones")
    assert status(page).startswith("1 answer in 1 group")
    assert "6 it is not" in first_card(page)
    page.driver.back()
    page.wait(lambda: page.run("return !document.querySelector('#overview').hidden"))


def test_answers_are_filtered_by_step_reward_and_truncation(page, large):
    page.open(large, "view=answers")
    page.type("#f-steps", "2-3")
    page.wait(lambda: status(page).startswith(f"{2 * GROUPS * SIZE} answers in {2 * GROUPS}"))
    page.type("#f-from", "1")
    page.wait(lambda: "mean reward 1" in status(page))
    page.click("#f-truncated")
    page.wait(lambda: "No answer passes these filters." in page.text("#list"))
    page.click("#clear")
    page.wait(lambda: status(page).startswith("1,9"))


def test_only_groups_of_different_rewards_can_be_shown(page, large):
    page.open(large, "view=answers&steps=1")
    page.click("#f-mixed")
    page.wait(lambda: f" in {GROUPS} group" not in status(page))
    assert page.count(".card.high") > 0
    assert page.count(".card.low") > 0


def test_text_is_searched_and_marked(page, large):
    page.open(large, "view=answers")
    page.press("/")
    page.press("ROW 3005 says 2")
    page.wait(lambda: status(page).startswith("1 answer in 1 group"))
    assert page.texts("mark") == ["row 3005 says 2"]
    page.click_text("7 more of this group")
    assert page.count(".card") == SIZE


def test_groups_are_sorted_either_way(page, large):
    page.open(large, "view=answers&kind=trained&steps=1-9")
    page.choose("sort", "reward")
    page.wait(lambda: "reward 0" in first_card(page))
    page.click("#f-reverse")
    page.wait(lambda: page.text(".group .chip:nth-of-type(4)") == "mean reward 1")


def test_what_is_no_number_is_sorted_last(page, large):
    page.open(large, f"view=answers&search=number&steps={STEPS}&sort=reward&reverse=1")
    assert "reward nan" in page.text("#list")


def test_tokens_are_coloured(page, large):
    page.open(large, "view=answers&steps=1")
    page.choose("colour", "logprob")
    titles = page.run(
        "return [...document.querySelector('.card').querySelectorAll('.tok')].map((t) => t.title)"
    )
    assert titles == [
        "logprob -0.10, ratio 0.82, weights 3",
        "logprob -2.00, ratio 1.65, weights 3",
        "logprob -0.50, ratio 1.00, weights 4",
        "logprob 0.00, ratio 1.00, weights 4",
    ]
    shades = (
        "return [...document.querySelectorAll('.card .tok')].slice(0, 4)"
        ".map((token) => token.style.background)"
    )
    assert page.run(shades)[3] == ""
    assert len(set(page.run(shades))) == 4
    page.choose("colour", "version")
    assert len(set(page.run(shades))) == 2
    page.choose("colour", "ratio")
    less, more, *same = page.run(shades)
    assert len({less, more, ""}) == 3
    assert same == ["", ""]
    page.choose("colour", "advantage")
    assert len(set(page.run(shades))) == 1


def test_one_prompt_is_followed_through_time(page, large):
    page.open(large, "view=answers&kind=trained&steps=1")
    page.click_text("This prompt through time")
    page.wait(lambda: "One prompt through time: row 0" in status(page))
    page.wait(lambda: page.count(".group") > 2)
    assert page.texts(".group .where")[:3] == ["Step 0", "Step 1", "Step 2"]
    page.click_text("All prompts")
    page.wait(lambda: "One prompt" not in status(page))


def test_held_out_answers_are_compared_before_and_after(page, large):
    page.open(large)
    page.click_text("Before and after")
    assert status(page).startswith("4 prompts, at the first and at the last")
    page.click("#f-reverse")
    page.wait(lambda: "change +1" in page.text(".group"))
    assert page.texts(".group .pair h3")[:2] == ["Step 0", "Step 10"]


def test_a_conversation_is_shown_turn_by_turn(page, large):
    page.open(large, f"view=answers&steps={STEPS}&search=It+is+4")
    assert page.texts(".turn .role") == ["policy", "tool", "policy"]
    assert page.text(".turn .call") == "add(a=2)"


def test_markup_in_an_answer_is_text(page, large):
    page.open(large, f"view=answers&search=onerror&steps={STEPS}")
    assert MARKUP in page.texts(".card .text")
    assert page.text(".prompt") == f"{MARKUP} asked"
    assert page.count("main img, main script") == 0
    assert "large" in page.driver.title


def test_right_to_left_and_joined_characters_stay_whole(page, large):
    page.open(large, f"view=answers&search={HEBREW}")
    assert f"{HEBREW} {EMOJI} end" in page.texts(".card .text")
    direction = (
        "return getComputedStyle([...document.querySelectorAll('.card .text')]"
        ".find((text) => text.textContent.includes(arguments[0]))).direction"
    )
    assert page.run(direction, HEBREW) == "rtl"


@pytest.mark.slow
def test_a_megabyte_of_text_is_cut_until_it_is_asked_for(page, large):
    page.open(large, "view=answers&search=needle")
    assert page.text("mark") == "needle"
    assert len(first_card(page)) < 10_000
    page.click_text("All of it (1,000,011 characters)")
    page.wait(lambda: first_card(page).endswith("tailLess"))
    page.click_text("Less")


def test_two_thousand_trajectories_are_in_the_list_and_few_in_the_document(page, large):
    page.open(large, "view=answers")
    assert status(page).startswith("1,9")
    at_the_middle = (
        "const holds = (box) => box.top <= 450 && box.bottom > 450;"
        "const groups = [...document.querySelectorAll('.group')];"
        "return groups.find((group) => holds(group.getBoundingClientRect()))?.ariaLabel"
    )
    seen = []
    for tenths in range(10):
        page.run("scrollTo(0, document.documentElement.scrollHeight * arguments[0])", tenths / 10)
        seen.append(page.wait(lambda: page.run(at_the_middle)))
        assert page.count(".group") < 40
    assert len(set(seen)) == 10
    page.run("scrollTo(0, 1e9)")
    labels = "return [...document.querySelectorAll('.group')].map((group) => group.ariaLabel)"
    page.wait(lambda: f"step {STEPS}, row 3" in page.run(labels))  # the last held-out answer


def test_groups_do_not_overlap(page, large):
    page.open(large, "view=answers")
    page.run("scrollTo(0, 30000)")
    boxes = (
        "return [...document.querySelectorAll('.group')].map((n) => n.getBoundingClientRect())"
        ".map((box) => [box.top, box.bottom]).sort((a, b) => a[0] - b[0])"
    )
    page.wait(lambda: len(page.run(boxes)) > 2)
    assert all(below[0] >= above[1] - 1 for above, below in pairwise(page.run(boxes)))


# -- timeline -------------------------------------------------------------------------------------


def shown_span(page: Browser) -> str:
    return page.text("#span")


def test_the_timeline_is_zoomed_by_keys_wheel_and_buttons_and_jumps_to_a_step(page, large):
    page.open(large, "view=timeline")
    whole = shown_span(page)
    assert whole.startswith("0 s to ")
    page.press("+", "#lanes")
    page.wait(lambda: shown_span(page) != whole)
    page.click_text("All")
    assert shown_span(page) == whole
    page.run(
        "const lanes = document.querySelector('#lanes'); const box = lanes.getBoundingClientRect();"
        "const place = {clientX: box.left + 300, clientY: box.top + 40};"
        "lanes.dispatchEvent(new WheelEvent('wheel', {deltaY: -500, cancelable: true, ...place}))"
    )
    zoomed = shown_span(page)
    assert zoomed != whole
    page.press("\ue014", "#lanes")  # the right arrow
    assert shown_span(page) not in (zoomed, whole)
    page.type("#jump", "5\ue007")
    page.wait(lambda: shown_span(page).startswith("4.60 s to"))
    assert page.text("#jumped").startswith("Step 5: 9.0 s instead of 2.0 s: waiting 7.5 s")


def test_a_span_says_what_it_was(page, large):
    page.open(large, "view=timeline&step=5")
    page.run(
        "const lanes = document.querySelector('#lanes'); const box = lanes.getBoundingClientRect();"
        "const middle = box.left + 92 + (box.width - 100) * 12 / 27;"
        "const place = {clientX: middle, clientY: box.top + 45};"
        "lanes.dispatchEvent(new PointerEvent('pointermove', place))"
    )
    assert page.text("#tip").startswith("trainer: waiting, step 5\n7.50 s")


def test_time_is_summed_up_for_each_lane(page, large):
    page.open(large, "view=timeline")
    assert page.texts("#timeline tbody th") == ["trainer", "server 0", "server 1"]
    assert "out 7.50 s" in page.text("#timeline tbody tr:nth-child(3)")


# -- the frame ------------------------------------------------------------------------------------


def shown_view(page: Browser) -> list[str]:
    return page.run(
        "return [...document.querySelectorAll('main > section')]"
        ".filter((section) => !section.hidden).map((section) => section.id)"
    )


def test_the_views_are_reached_by_keyboard(page, large):
    page.open(large)
    page.press("2")
    assert shown_view(page) == ["answers"]
    page.press("\ue014", "#tab-answers")
    assert shown_view(page) == ["timeline"]
    assert page.run("return document.activeElement.id") == "tab-timeline"
    page.press("1")
    assert shown_view(page) == ["overview"]


def test_groups_are_walked_through_by_keyboard(page, large):
    page.open(large, "view=answers&kind=trained&steps=1-9")
    focused = "return document.activeElement.dataset.index"
    for key, index in (("j", "0"), ("j", "1"), ("j", "2"), ("k", "1")):
        page.press(key)
        assert page.run(focused) == index


@pytest.mark.parametrize("view", ["overview", "answers", "timeline"])
def test_on_a_narrow_screen_nothing_sticks_out(page, large, view):
    page.size(390, 800)
    page.open(large, f"view={view}")
    assert page.run("return document.documentElement.scrollWidth") <= 390


def test_dark_is_the_system_s_choice_and_can_be_changed(page, large):
    paper = "return getComputedStyle(document.body).backgroundColor"
    page.size(1400, dark=True)
    page.open(large)
    assert page.run(paper) == "rgb(22, 24, 28)"
    page.click("#theme")
    assert page.run(paper) == "rgb(253, 252, 249)"
    assert page.count("#charts canvas") == page.count("#charts figure")


def test_what_is_chosen_stands_in_the_address(page, large):
    page.open(large, "view=answers")
    page.type("#search", "row 2003 says 1")
    page.wait(lambda: "search=row" in page.run("return location.hash"))
    page.driver.refresh()
    page.wait(lambda: page.run("return document.body.dataset.ready === '1'"))
    assert status(page).startswith("1 answer")


def test_a_run_that_failed_before_its_first_step_has_a_page(page, tmp_path):
    end = {"kind": "end", "at": BEGAN, "step": 0, "how": "failed", "text": "no room on the GPU"}
    write_timeline(tmp_path, [start_line(), end])
    url = write_page(tmp_path / "r.html", tmp_path)
    for view, words in (
        ("overview", "no room on the GPU"),
        ("answers", "No answers were recorded."),
        ("timeline", "Nothing was recorded."),
    ):
        page.open(url, f"view={view}")
        assert words in page.text(f"#{view}")
    assert page.count("canvas, #step") == 0, "there is no step to show"


def test_a_served_page_takes_in_new_steps_and_keeps_what_was_chosen(page, tmp_path):
    folder = write_run(tmp_path)

    def read():
        runs = read_runs([folder])
        return page_data(runs, choose_answers(runs))

    server = PageServer(read, lambda: stamp([folder]), refresh_s=0.2)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        page.open(f"http://127.0.0.1:{server.server_port}/", "view=answers&search=news")
        assert "No answer passes" in page.text("#list")
        page.click("#search")
        write_batch(folder, 7, [group(0, [answer("here are news")])])
        page.wait(lambda: status(page).startswith("1 answer"))
        assert page.run("return document.activeElement.id") == "search"
        assert "live" in page.text("#live")
    finally:
        page.driver.get("about:blank")
        server.shutdown()
        thread.join()
        server.server_close()
