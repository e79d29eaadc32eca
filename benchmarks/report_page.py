"""How long the report's page takes with 2,000 trajectories: to be made, drawn, and used.

    python -m benchmarks.report_page --out benchmarks/results/report_page.json

Needs Chromium and chromedriver on the path. Each figure is the median of several tries in one
headless browser: from the start of the navigation to the first paint with content, and from an
action to the frame behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lightning_grpo.report.answers import choose_answers
from lightning_grpo.report.page import page_data, render_page
from lightning_grpo.report.run import read_runs
from tests.fakes.browser import Browser, missing_browser
from tests.fakes.report_runs import answer, group, write_batch, write_run

STEPS, GROUPS, SIZE, WORDS, TRIES = 25, 10, 8, 120, 5

PAINT = (
    "const of = (name) => performance.getEntriesByName(name)[0]?.startTime;"
    "const times = [of('first-contentful-paint'), of('ready')];"
    "return times.includes(undefined) ? null : times"
)
FRAME = """
const done = arguments[arguments.length - 1];
const began = performance.now();
{ %s }
requestAnimationFrame(() => setTimeout(() => done(performance.now() - began), 0));
"""
ACTIONS = {
    "scroll by a screen": "scrollBy(0, 800)",
    "scroll to the middle": "scrollTo(0, document.documentElement.scrollHeight / 2)",
    "sort by reward": (
        "const box = document.querySelector('#answers [data-choose=sort]');"
        "box.value = box.value === 'reward' ? 'step' : 'reward';"
        "box.dispatchEvent(new Event('change'))"
    ),
    "show mixed groups alone": "document.querySelector('#f-mixed').click()",
    "colour tokens": (
        "const box = document.querySelector('#answers [data-choose=colour]');"
        "box.value = box.value ? '' : 'logprob'; box.dispatchEvent(new Event('change'))"
    ),
    "to the overview": "document.querySelector('#tab-overview').click()",
    "to the timeline": "document.querySelector('#tab-timeline').click()",
    "zoom the timeline": "document.querySelector('#timeline button[title^=\"zoom in\"]').click()",
    "back to the answers": "document.querySelector('#tab-answers').click()",
}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if missing := missing_browser():
        raise SystemExit(missing)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path) -> dict[str, Any]:
    """All figures."""
    run = write_run(folder / "run", STEPS)
    for step in range(1, STEPS + 1):
        answers = [_answer(n) for n in range(SIZE)]
        write_batch(run, step, [group(step * GROUPS + n, answers) for n in range(GROUPS)])
    began = time.perf_counter()
    runs = read_runs([run])
    answers = choose_answers(runs)
    page = render_page(page_data(runs, answers))
    made_s = time.perf_counter() - began
    file = folder / "report.html"
    file.write_text(page)
    browser = Browser()
    try:
        browser.size(1400)
        paints = [_paint(browser, file.as_uri()) for _ in range(TRIES)]
        actions = {name: _action(browser, script) for name, script in ACTIONS.items()}
    finally:
        browser.close()
    first, drawn = (median(each) for each in zip(*paints, strict=True))
    return {
        "trajectories": answers.num_trajectories,
        "tokens": answers.num_trajectories * WORDS,
        "page_mb": round(len(page) / 1e6, 2),
        "made_in_s": round(made_s, 2),
        "first_paint_ms": round(first),
        "drawn_ms": round(drawn),
        "action_ms": actions,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _answer(number: int) -> Any:
    ids = tuple(5 + (number * 31 + place * 7) % 400 for place in range(WORDS))
    return answer(
        " ".join(f"word{number}" for _ in range(WORDS)),
        float(number % 2),
        input_ids=(5, 6, *ids),
        response_mask=(False, False, *[True] * WORDS),
        logprobs=(0.0, 0.0, *(-0.01 * (place % 300) for place in range(WORDS))),
        versions=(-1, -1, *[0] * WORDS),
    )


def _paint(browser: Browser, url: str) -> tuple[float, float]:
    """Milliseconds to the first paint, and until all of the view is drawn."""
    browser.open(url, "view=answers")
    first, drawn = browser.wait(lambda: browser.run(PAINT))
    return first, drawn


def _action(browser: Browser, script: str) -> int:
    times = [browser.driver.execute_async_script(FRAME % script) for _ in range(TRIES)]
    return round(median(times))


if __name__ == "__main__":
    main()
