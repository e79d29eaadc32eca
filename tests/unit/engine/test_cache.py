"""What recurrent layers remember, in slots that are shared out, moved, interrupted and emptied."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from transformers import CONFIG_MAPPING

from lightning_grpo.certify.tiny import plain_logprobs, tiny_config, tiny_model
from lightning_grpo.engine.batch import Request
from lightning_grpo.engine.cache import StateSlots, alike, runs
from lightning_grpo.engine.model import (
    ModelRunner,
    check_servable,
    load_model,
    require_goes_on,
)
from lightning_grpo.engine.requests import UnservableError
from lightning_grpo.engine.scheduler import Limits, Scheduler
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import without_bars
from tests.fakes.engine_requests import PLAIN, ignore
from tests.fakes.faulty_parts import forgets_states


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_text"])
def model(request):
    """A tiny hybrid; `qwen3_next` is a mixture, too."""
    return tiny_model(tiny_config(CONFIG_MAPPING[request.param]()))


@pytest.fixture
def folder(model, tmp_path):
    with without_bars():
        model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def runner(folder) -> ModelRunner:
    with without_bars():
        return ModelRunner(load_model(folder))


def make(runner: ModelRunner, **limits: Any) -> Scheduler:
    return Scheduler(runner, None, Limits(**limits))


def asked(name: str, length: int, new: int, **changes: Any) -> Request:
    """A request for `new` tokens behind a prompt of a length."""
    values: dict[str, Any] = {
        **{"rid": name, "input_ids": tuple(range(3, 3 + length)), "max_new_tokens": new},
        **{"sampling_seed": len(name) * 31 + length, **changes},
    }
    return Request(msgspec.structs.replace(PLAIN, **values), ignore)


CROWD = [("a", 1, 9), ("b", 2, 3), ("c", 3, 15), ("d", 3, 1), ("e", 4, 12), ("f", 20, 7)]


def crowd() -> list[Request]:
    """Of lengths around a convolution's window; each asks twice, and ends at another time."""
    return [asked(name * n, length, new + n) for name, length, new in CROWD for n in (1, 2)]


def drain(scheduler: Scheduler, interrupted_every: int | None = None) -> dict[str, Any]:
    while scheduler.has_work:
        for _ in range(interrupted_every or 1):
            scheduler.step()
        if interrupted_every:
            scheduler.pause("retract")
            scheduler.resume()
    return {output.request.generation.rid: output for output in scheduler.outbox}


def assert_like_one_pass(model: Any, outputs: dict[str, Any]) -> None:
    for output in outputs.values():
        ids = torch.tensor([*output.request.generation.input_ids, *output.token_ids])
        with torch.no_grad():
            expected = plain_logprobs(model, [ids])[-len(output.token_ids) :]
        assert output.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize("interrupted_every", [None, 4])
def test_every_token_has_the_logprob_of_one_pass(model, runner, interrupted_every, row_by_row):
    runner.row_by_row = row_by_row
    scheduler = make(runner, max_running=5)  # so that slots are left, moved into and reused
    scheduler.submit(crowd())
    outputs = drain(scheduler, interrupted_every)
    assert len(outputs) == 2 * len(CROWD)
    assert_like_one_pass(model, outputs)


def test_an_interruption_changes_no_token(runner):
    found = []
    for interrupted_every in (None, 3):
        scheduler = make(runner)
        scheduler.submit(crowd())
        found.append(drain(scheduler, interrupted_every))
    plain, interrupted = found
    assert {n: o.token_ids for n, o in plain.items()} == {
        n: o.token_ids for n, o in interrupted.items()
    }


def test_what_goes_on_under_other_weights_has_the_states_of_these(runner):
    scheduler = make(runner)
    scheduler.submit([asked("a", 5, 12), asked("aa", 5, 12), asked("b", 9, 12)])
    for _ in range(4):
        scheduler.step()
    scheduler.pause("retract")

    def other() -> None:
        for parameter in runner.model.parameters():
            parameter.mul_(1.1)

    scheduler.update(other, "next")
    scheduler.resume()
    for output in drain(scheduler).values():
        new = output.request.versions.count("next")
        ids = torch.tensor([*output.request.generation.input_ids, *output.token_ids])
        expected = plain_logprobs(runner.model, [ids])[-new:]
        assert 0 < new < len(output.token_ids)
        assert output.logprobs[-new:] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_group_reads_its_prompt_once_and_each_member_goes_its_own_way(model, runner):
    scheduler = make(runner)
    group = [asked(f"g{i}", 11, 8, sampling_seed=i) for i in range(4)]
    scheduler.submit(group)
    outputs = drain(scheduler)
    assert len({tuple(output.token_ids) for output in outputs.values()}) > 1
    assert [request.cached_tokens for request in group] == [0, 11, 11, 11]
    assert_like_one_pass(model, outputs)


def test_a_prompt_that_is_kept_is_not_changed_by_those_who_go_on_from_it(model, runner):
    scheduler = make(runner)
    for turn in range(3):
        scheduler.submit([asked(f"t{turn}", 6, 10, sampling_seed=turn)])
        outputs = drain(scheduler)
    assert outputs["t2"].request.cached_tokens == 6
    assert_like_one_pass(model, outputs)


def test_a_longer_prompt_that_begins_like_a_kept_one_is_read_whole(model, runner):
    scheduler = make(runner)
    scheduler.submit([asked("short", 6, 4)])
    scheduler.submit([asked("long", 9, 4)])
    outputs = drain(scheduler)
    assert outputs["long"].request.cached_tokens == 0
    assert_like_one_pass(model, outputs)


def test_states_count_in_what_is_kept_of_prompts(runner):
    (state,) = runner.prefill([[5, 6, 7]])
    numbers = sum(held.numel() for held in state.states.values())
    layers, two, heads, _, dim = state.kv.shape
    assert state.size == 3 + numbers // (layers * two * heads * dim) > 3


def test_a_prompt_is_scored_as_it_is_read(model, runner):
    ids = list(range(5, 25))
    state, scores = runner.score(ids, 4)
    with torch.no_grad():
        expected = plain_logprobs(model, [torch.tensor(ids)])[5:]
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    (again,) = runner.prefill([ids])
    assert all(torch.equal(state.states[key], again.states[key]) for key in again.states)


def test_layers_that_go_on_otherwise_than_in_one_pass_are_refused(tmp_path):
    tiny_config(CONFIG_MAPPING["zamba2"]()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not the same token by token as in one pass"):
        check_servable(str(tmp_path))


def test_an_engine_that_loses_its_states_is_refused_with_the_weights_at_hand(runner, folder):
    require_goes_on(runner)
    with without_bars(), pytest.raises(UnservableError, match="token by token"):
        require_goes_on(forgets_states(folder))


def test_slots_are_placed_moved_and_wiped_and_more_are_made_when_needed():
    slots = StateSlots()
    first, second = ({(0, "conv_states", 0): torch.full((2,), v)} for v in (1.0, 2.0))
    slots.place(0, 2, first)
    slots.place(2, 1, second)
    (held,) = slots.rows(0, 3).values()
    assert held.tolist() == [[1, 1], [1, 1], [2, 2]]
    slots.move([2], [0])
    assert held.tolist() == [[2, 2], [1, 1], [2, 2]]
    slots.wipe(1)
    assert held.tolist() == [[2, 2], [0, 0], [2, 2]]
    slots.clear()
    assert slots.rows(0, 3) == {}


def test_only_rows_of_one_length_are_read_together():
    assert alike([3, 5, 3, 1, 5]) == [[0, 2], [1, 4], [3]]
    assert runs([2, 2, 2, 3, 2], most=2) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert runs([], most=2) == []
