from __future__ import annotations

import math
import random
from collections import Counter

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.errors import (
    CheckpointError,
    ConfigError,
    FailureBudgetError,
    RolloutError,
    ServerError,
    ServersLostError,
)
from lightning_grpo.rollout.admission import PromptStream
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.producer import has_variance
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.types import Prompt, Sampling
from tests.fakes.generator import FakeGenerator
from tests.fakes.rollouts import make_producer, make_stream
from tests.fakes.virtual_time import run_virtual


async def train(producer, generator, num_batches, train_s=1.0):
    """Take, train for a while, publish: the trainer's loop."""
    batches = []
    for _ in range(num_batches):
        groups = await producer.take()
        version = producer.gate.version
        for group in groups:
            assert version - group.oldest_version <= producer.gate.max_staleness
        batches.append(groups)
        await anyio.sleep(train_s)
        generator.version = version + 1
        producer.advance(version + 1)
    return batches


def run_training(num_batches=3, train_s=1.0, generator=None, **options):
    generator = generator or FakeGenerator()

    async def main():
        async with make_producer(generator, **options) as producer:
            return producer, await train(producer, generator, num_batches, train_s)

    return run_virtual(main)


def keys_of(batches):
    return [[group.prompt.key for group in groups] for groups in batches]


def test_a_batch_has_exactly_the_groups_asked_for_and_each_group_all_its_trajectories():
    _, batches = run_training(batch_size=3, group_size=4)
    assert [len(groups) for groups in batches] == [3, 3, 3]
    assert {len(group.trajectories) for groups in batches for group in groups} == {4}


def test_on_policy_each_batch_is_sampled_after_the_weights_of_the_last_one_are_out():
    events = []
    run_training(batch_size=2, max_staleness=0, max_groups=6, events=events)
    names = [name for name, _ in events]
    one_batch = ["admit", "admit", "finish", "finish", "take", "advance"]
    assert names == one_batch * 3
    assert [data["version"] for name, data in events if name == "admit"] == [0, 0, 1, 1, 2, 2]


def test_every_prompt_of_a_pass_is_trained_on_once_when_nothing_fails():
    producer, batches = run_training(num_batches=6, batch_size=5, num_rows=10)
    keys = [key for groups in keys_of(batches) for key in groups]
    # With one version of staleness a batch may hold a prompt of the next pass, none twice.
    assert len(keys) == len(set(keys)) == 30
    assert {row for p, row in keys if p == 0} == set(range(10))
    assert producer.ledger.summary(0)["trained"] == 10


def durations(draw_seed, scale=5.0):
    """Durations that depend on the prompt, with a heavy tail."""

    def duration(input_ids, number):
        return random.Random(f"{draw_seed}:{input_ids}").paretovariate(1.2) * scale

    return duration


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch_size=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    train_s=st.floats(0, 30),
    fail_rate=st.sampled_from([0.0, 0.3, 0.5]),
    keep_rate=st.sampled_from([1.0, 0.5]),
    policy=st.sampled_from(["wait", "strict", "drop"]),
    max_in_flight=st.none() | st.integers(1, 12),
)
def test_no_schedule_breaks_staleness_counts_or_the_ledger(
    seed, batch_size, max_staleness, train_s, fail_rate, keep_rate, policy, max_in_flight
):
    rng = random.Random(seed)
    generator = FakeGenerator(
        durations(seed),
        lambda number: RuntimeError("lost") if rng.random() < fail_rate / 2 else None,
    )
    producer, batches = run_training(
        5,
        train_s,
        generator,
        batch_size=batch_size,
        max_staleness=max_staleness,
        policy=policy,
        num_rows=7,
        keep_group=lambda group: rng.random() < keep_rate,
        limits=RolloutLimits(max_in_flight=max_in_flight, max_failed_fraction=1.0, max_attempts=30),
    )
    assert [len(groups) for groups in batches] == [batch_size] * 5
    keys = [key for groups in keys_of(batches) for key in groups]
    assert len(keys) == len(set(keys))
    assert producer.counters.taken == producer.ledger.counts["trained"] == len(keys)
    assert producer.counters.filtered == producer.ledger.counts["filtered"]
    assert producer.counters.max_staleness_seen <= max_staleness
    assert policy == "drop" or producer.counters.dropped_groups == 0
    assert not generator.seeds_used_twice() or producer.counters.dropped_groups
    if max_in_flight is not None:
        assert generator.most_running <= max(max_in_flight, 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), max_staleness=st.integers(0, 3), train_s=st.floats(0, 30))
def test_slow_prompts_are_trained_on_like_fast_ones(seed, max_staleness, train_s):
    generator = FakeGenerator(durations(seed))
    events = []
    _, batches = run_training(
        6,
        train_s,
        generator,
        max_staleness=max_staleness,
        num_rows=11,
        events=events,
        max_groups=24,
    )
    admitted = [data["key"] for name, data in events if name == "admit"]
    trained = [key for groups in keys_of(batches) for key in groups]
    assert Counter(trained) == Counter(admitted)
    assert len(admitted) == 24  # the trainer's six batches, and not one more


def test_dropping_asks_the_prompt_again_and_counts_what_was_thrown_away():
    def duration(input_ids, number):
        return 1000.0 if number == 0 else 1.0

    generator = FakeGenerator(duration)
    events = []
    producer, batches = run_training(
        4, 5.0, generator, batch_size=2, max_staleness=1, policy="drop", events=events
    )
    dropped = [data["key"] for name, data in events if name == "drop"]
    assert len(dropped) == producer.counters.dropped_groups == 1
    assert dropped[0] in [key for groups in keys_of(batches) for key in groups]
    assert producer.counters.dropped_tokens == 3  # its second episode had finished
    assert generator.cancelled == 1


def test_a_straggler_expires_after_its_time_and_is_replaced():
    generator = FakeGenerator(lambda input_ids, number: 1e6 if number == 0 else 1.0)
    producer, batches = run_training(
        2, generator=generator, batch_size=2, limits=RolloutLimits(straggler_timeout_s=50)
    )
    assert producer.counters.expired == 1
    assert producer.ledger.counts["expired"] == 1
    assert [len(groups) for groups in batches] == [2, 2]


def test_strict_order_does_not_depend_on_who_finishes_first():
    def run(seed):
        keep = {"keep_group": lambda group: group.prompt.row % 3 > 0}
        generator = FakeGenerator(lambda ids, n: random.Random(f"{seed}:{n}").random())
        options = dict(batch_size=3, max_staleness=2, policy="strict", num_rows=20, **keep)
        _, batches = run_training(4, generator=generator, **options)
        return batches

    first = run(1)
    assert first == run(2) == run(3)
    assert all(group.prompt.row % 3 for groups in first for group in groups)


def test_seeds_are_repeatable_and_no_two_requests_share_one():
    def run(seed):
        generator = FakeGenerator(lambda ids, n: 1.0)
        _, batches = run_training(2, generator=generator, policy="strict", seed=seed)
        assert not generator.seeds_used_twice()
        assert {request["priority"] for request in generator.requests} == {False}
        return batches

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_failed_attempt_is_tried_again_with_other_seeds():
    generator = FakeGenerator(fail=lambda number: OSError("gone") if number == 0 else None)
    producer, batches = run_training(1, generator=generator, batch_size=1, max_staleness=0)
    assert batches[0][0].attempts == 2
    assert producer.counters.retried == 1
    assert not generator.seeds_used_twice()


@pytest.mark.parametrize("num_samples", [None, 2])
def test_what_an_attempt_that_lost_its_servers_would_have_been_is_sampled_again(num_samples):
    async def outcome(*lost):
        generator = FakeGenerator(fail=lambda n: ServerError("gone") if n in lost else None)
        async with make_producer(generator, batch_size=1, max_staleness=0) as producer:
            if num_samples is None:
                return await producer.take(), generator
            prompts = [make_stream().by_key((0, row)) for row in (3, 4)]
            return await producer.evaluate(prompts, None, num_samples), generator

    undisturbed, _ = run_virtual(outcome)
    found, generator = run_virtual(outcome, 0, 2)
    assert len(generator.requests) > 2 * len(found)
    assert [group.trajectories for group in found] == [g.trajectories for g in undisturbed]
    assert found[0].attempts > 1


def test_a_prompt_that_always_fails_is_named_and_replaced():
    def fail_first_prompt(number):
        return OSError("gone") if generator.requests[number]["group_key"] == first else None

    generator = FakeGenerator(fail=fail_first_prompt)
    events = []

    async def main():
        nonlocal first
        producer = make_producer(generator, batch_size=2, events=events)
        first = producer._backlog.stream.peek()
        async with producer:
            await train(producer, generator, 3)
        return producer

    first = None
    producer = run_virtual(main)
    assert [data["key"] for name, data in events if name == "failed"] == [first]
    assert producer.ledger.outcome(first) == "failed"
    assert producer.counters.failed == 1
    assert "OSError: gone" in producer._errors[0]


def test_a_reward_that_always_raises_ends_the_run_with_the_line_that_did():
    def broken_reward(completion):
        raise ZeroDivisionError("in the user's reward")

    with pytest.raises(FailureBudgetError, match=r"first 4 groups.*in broken_reward.*user's") as e:
        run_training(batch_size=4, reward=broken_reward)
    assert len(str(e.value).splitlines()) == 1


def test_a_workflow_that_always_raises_ends_the_run_with_its_own_line():
    class Broken:
        async def run(self, prompt, context):
            await context.generate(list(prompt.input_ids))
            return {}["gone"]

    with pytest.raises(
        FailureBudgetError, match=r"KeyError: 'gone' \(.*test_producer.py:\d+, in run: return"
    ) as error:
        run_training(workflow=Broken())
    assert len(str(error.value).splitlines()) == 1


def test_a_workflow_that_returns_nothing_fails_its_attempts():
    class Nothing:
        async def run(self, prompt, context):
            return None

    with pytest.raises(FailureBudgetError, match="returned None instead of a trajectory"):
        run_training(workflow=Nothing())


@pytest.mark.parametrize("error", [ConfigError("wrong"), ServersLostError("all gone")])
def test_an_error_that_no_attempt_can_cure_reaches_take_at_once(error):
    generator = FakeGenerator(fail=lambda number: error if number == 3 else None)
    with pytest.raises(type(error), match=str(error)):
        run_training(generator=generator)
    assert len(generator.requests) <= 2 * 8


def test_a_group_with_tokens_older_than_its_admission_never_gets_through():
    class Stale(FakeGenerator):
        async def generate(self, *args, **kwargs):
            self.version = -5
            return await super().generate(*args, **kwargs)

    with pytest.raises(FailureBudgetError, match="a server has old weights"):
        run_training(generator=Stale())


def test_an_error_reaches_a_take_that_already_waits_and_every_later_one():
    async def main():
        generator = FakeGenerator(
            lambda ids, n: 100.0, fail=lambda number: ConfigError("late") if number == 5 else None
        )
        seen = []

        async def take(producer):
            try:
                await producer.take()
            except ConfigError as error:
                seen.append(str(error))

        async with make_producer(generator) as producer:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, producer)
                tasks.start_soon(take, producer)
            await take(producer)
        return seen

    assert run_virtual(main) == ["late"] * 3


def test_leaving_cancels_every_request_and_wakes_those_who_wait():
    async def main():
        generator = FakeGenerator(lambda ids, n: 1e9)
        seen = []

        async def take(producer):
            try:
                await producer.take()
            except RolloutError as error:
                seen.append(str(error))

        async with anyio.create_task_group() as tasks, make_producer(generator) as producer:
            tasks.start_soon(take, producer)
            await anyio.sleep(5)
        return generator, seen

    generator, seen = run_virtual(main)
    assert generator.running == 0
    assert generator.cancelled == len(generator.requests) == 16
    assert seen == ["the rollouts were closed."]


def test_filtered_groups_are_replaced_by_the_next_prompts():
    producer, batches = run_training(
        num_batches=3, batch_size=2, keep_group=lambda group: group.prompt.row % 2 == 0
    )
    assert all(row % 2 == 0 for keys in keys_of(batches) for _, row in keys)
    assert producer.counters.filtered > 0
    assert producer.counters.filled == 0


def test_when_every_group_is_filtered_the_cost_is_bounded_and_the_batch_still_full():
    generator = FakeGenerator()
    producer, batches = run_training(
        num_batches=2,
        generator=generator,
        batch_size=3,
        max_staleness=0,
        reward=lambda completion: 1.0,
        keep_group=has_variance,
        limits=RolloutLimits(max_filtered_batches=2),
    )
    assert [len(groups) for groups in batches] == [3, 3]
    assert (producer.counters.filtered, producer.counters.filled) == (12, 6)


def test_groups_start_whole_and_in_order_when_few_requests_may_run():
    events = []
    generator = FakeGenerator()
    run_training(
        2, generator=generator, group_size=3, limits=RolloutLimits(max_in_flight=7), events=events
    )
    assert generator.most_running == 6
    order = [request["group_key"] for request in generator.requests]
    groups = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert [group[0] for group in groups] == [d["key"] for n, d in events if n == "admit"]


def test_the_trainers_last_batches_bound_what_is_started():
    async def main():
        generator = FakeGenerator()
        async with make_producer(generator, batch_size=2, max_staleness=3) as producer:
            producer.set_remaining_batches(2)
            await train(producer, generator, 2)
            await anyio.sleep(100)
            with pytest.raises(RolloutError, match="all 4 groups of the run were taken"):
                await producer.take()
        return len(generator.requests)

    assert run_virtual(main) == 2 * 2 * 2


def test_a_wait_is_explained_by_where_the_groups_are_and_the_last_errors():
    async def main():
        generator = FakeGenerator(
            lambda ids, n: 100.0 if n > 2 else 1.0,
            fail=lambda number: OSError("connection lost") if number == 0 else None,
        )
        async with make_producer(generator, batch_size=2) as producer:
            await anyio.sleep(50)
            return producer.progress().why

    line = run_virtual(main)
    assert line.startswith("no accepted group for 50 s at version 0: 4 groups running, 0 finished")
    assert "OSError: connection lost" in line


def resume(state, generator, num_batches, **options):
    async def main():
        producer = make_producer(generator, **options)
        producer.load_state_dict(state)
        async with producer:
            return producer, await train(producer, generator, num_batches)

    return run_virtual(main)


def plain(state):
    """Through a format that knows nothing but plain data."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), strict=False)


@settings(max_examples=25, deadline=None)
@given(
    cut=st.integers(0, 5),
    pause=st.floats(0, 20),
    seed=st.integers(0, 1000),
    max_staleness=st.integers(0, 2),
    keep_rate=st.sampled_from([1.0, 0.6]),
)
def test_a_run_that_is_cut_loses_no_prompt_and_trains_on_none_twice(
    cut, pause, seed, max_staleness, keep_rate
):
    options = {
        "batch_size": 3,
        "max_staleness": max_staleness,
        "num_rows": 5,
        "keep_group": lambda group: random.Random(group.prompt.row).random() < keep_rate,
    }

    async def first_half():
        generator = FakeGenerator(durations(seed))
        async with make_producer(generator, **options) as producer:
            batches = await train(producer, generator, cut)
            await anyio.sleep(pause)
            return producer.state_dict(), batches

    state, before = run_virtual(first_half)
    generator = FakeGenerator(durations(seed))
    generator.version = state["gate"]["version"]
    producer, after = resume(plain(state), generator, 6 - cut, **options)
    keys = [key for groups in keys_of([*before, *after]) for key in groups]
    assert len(keys) == len(set(keys)) == 18
    assert producer.ledger.counts["trained"] == producer.counters.taken == 18
    # Every prompt before the last one admitted has ended, runs, or waits to be taken.
    backlog = producer._backlog
    (stream,) = backlog.stream._streams
    started = {stream.key(index) for index in range(stream.cursor)}
    waiting = {run.key for run in backlog.runs.values()}
    waiting |= {key for key, _ in backlog._again.values()}
    ended = {key for key in started if producer.ledger.outcome(key)}
    assert started == ended | waiting
    assert not ended & waiting


@settings(max_examples=60, deadline=None)
@given(
    cut=st.integers(0, 3),
    pauses=st.lists(st.floats(0, 12), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    max_staleness=st.integers(0, 2),
)
def test_in_strict_order_a_run_that_is_cut_goes_on_as_if_it_were_not(
    cut, pauses, seed, max_staleness
):
    options = {
        "batch_size": 3,
        "max_staleness": max_staleness,
        "policy": "strict",
        "keep_group": lambda group: group.prompt.row % 4 > 0,
        "limits": RolloutLimits(max_in_flight=4),  # two groups: others still wait to be asked
    }
    _, whole = run_training(6, generator=FakeGenerator(durations(1)), **options)

    async def until_cut(state, num_batches, pause):
        generator = FakeGenerator(durations(f"{seed}:{pause}"))
        producer = make_producer(generator, **options)
        if state is not None:
            producer.load_state_dict(state)
        generator.version = producer.gate.version
        async with producer:
            batches = await train(producer, generator, num_batches)
            await anyio.sleep(pause)
            return plain(producer.state_dict()), batches

    state, before = None, []
    for index, pause in enumerate(pauses):
        state, batches = run_virtual(until_cut, state, 0 if index else cut, pause)
        before += batches
    generator = FakeGenerator(durations(seed))
    generator.version = cut
    _, after = resume(state, generator, 6 - cut, **options)
    assert [*before, *after] == whole


def test_a_checkpoint_of_other_prompts_is_refused():
    async def main():
        async with make_producer(num_rows=50) as producer:
            await anyio.sleep(10)
            return producer.state_dict()

    state = run_virtual(main)
    producer = make_producer(num_rows=50)
    rows = producer._backlog.stream.sets[""]._rows
    for row in rows:
        row["question"] += "?"
    with pytest.raises(CheckpointError, match="the dataset, its order or the chat template"):
        producer.load_state_dict(state)


def test_loading_while_it_runs_forgets_what_runs():
    async def main():
        async with make_producer(batch_size=2) as first:
            await first.take()
            await anyio.sleep(10)
            state = first.state_dict()
        generator = FakeGenerator(lambda ids, n: 5.0)
        async with make_producer(generator, batch_size=2) as producer:
            await anyio.sleep(2)
            producer.load_state_dict(state)
            groups = await producer.take()
            await anyio.sleep(1)
            assert generator.cancelled == 8
            return [run["key"] for run in state["backlog"]["finished"]], groups

    finished, groups = run_virtual(main)
    assert [list(group.prompt.key) for group in groups] == finished[:2]


def test_a_batch_counts_as_trained_only_once_its_weights_are_out():
    async def main():
        async with make_producer(batch_size=2) as producer:
            taken = await producer.take()
            before = producer.state_dict()
            producer.advance(1)
            after = producer.state_dict()
            return taken, before, after

    taken, before, after = run_virtual(main)
    keys = [list(group.prompt.key) for group in taken]
    assert before["gate"]["num_taken"] == 0
    assert [run["key"] for run in before["backlog"]["finished"]][:2] == keys
    assert after["gate"]["num_taken"] == 2
    assert not [run for run in after["backlog"]["finished"] if run["key"] in keys]


def test_a_resumed_run_trains_again_on_a_batch_that_was_taken_but_not_published():
    async def main():
        async with make_producer(batch_size=2) as first:
            taken = await first.take()
            state = first.state_dict()
        async with make_producer(batch_size=2) as second:
            second.load_state_dict(state)
            again = await second.take()
            second.advance(1)
            return taken, again, second.ledger

    taken, again, ledger = run_virtual(main)
    assert again == taken
    assert [ledger.outcome(group.prompt.key) for group in taken] == ["trained", "trained"]


def test_evaluation_goes_first_past_the_gate_in_order_with_its_own_sampling():
    async def main():
        generator = FakeGenerator(lambda ids, n: random.Random(n).random())
        workflow = RLVRWorkflow(lambda completion: 1.0, Sampling(max_new_tokens=8))
        async with make_producer(generator, workflow=workflow, max_staleness=0) as producer:
            await producer.take()  # the gate is closed from here on
            start = len(generator.requests)
            prompts = producer._backlog.stream.sets[""]
            greedy = Sampling(max_new_tokens=4, temperature=0.0)
            groups = await producer.evaluate(prompts, greedy, num_samples=3)
            again = await producer.evaluate(prompts, greedy, num_samples=3)
            assert groups == again
            assert producer.ledger.num_ended == 0  # evaluation never enters the ledger
            return generator.requests[start:], groups

    requests, groups = run_virtual(main)
    assert [group.prompt.row for group in groups] == list(range(50))
    assert {len(group.trajectories) for group in groups} == {3}
    assert {request["priority"] for request in requests} == {True}
    assert {request["sampling"].temperature for request in requests} == {0.0}
    assert {t.temperature for group in groups for t in group.trajectories} == {0.0}


def test_an_evaluation_prompt_that_fails_is_tried_again_and_then_named():
    async def main():
        def fail(number):
            asked = "".join(map(chr, generator.requests[number]["input_ids"]))
            return OSError("gone") if "question 7<" in asked else None

        generator = FakeGenerator(fail=fail)
        async with make_producer(generator) as producer:
            await producer.evaluate(producer._backlog.stream.sets[""])

    with pytest.raises(RolloutError, match=r"prompt 7 failed 3 times; last: OSError: gone"):
        run_virtual(main)


def test_a_reward_that_is_not_finite_never_trains():
    with pytest.raises(FailureBudgetError, match="reward is nan"):
        run_training(reward=lambda completion: math.nan)


def asking_but(*rows):
    """Makes prompts, but not of some rows."""

    def make_prompt(row):
        if int(row["answer"]) in rows:
            raise KeyError("hint")
        return Prompt(tuple(map(ord, row["question"])), row["question"], columns=dict(row))

    return make_prompt


def test_a_row_that_turns_out_to_be_no_prompt_is_given_up_by_name_and_the_next_is_asked(caplog):
    events = []
    producer, batches = run_training(
        20, num_rows=60, events=events, make_prompt=asking_but(3, 7), batch_size=5
    )
    asked = Counter(key for keys in keys_of(batches) for key in keys)
    assert set(asked.values()) == {1}
    assert {row for _, row in asked} == set(range(60)) - {3, 7}
    assert producer.counters.failed in (2, 3, 4)  # in the first pass, and in the second
    assert {data["key"][1] for name, data in events if name == "failed"} == {3, 7}
    assert producer.ledger.outcome((0, 3)) == "ended"
    assert "prompt (0, 3) is given up: row 3 of the list given can't be made a" in caplog.text


def test_rows_that_are_no_prompts_do_not_end_a_run_that_begins_with_them():
    stream = PromptStream(make_stream(100).sets[""])
    first = [stream.key(index)[1] for index in range(2)]
    assert 0 not in first  # which is made at the start
    make_prompt = asking_but(*first)
    _, batches = run_training(2, num_rows=100, batch_size=2, make_prompt=make_prompt)
    assert len(batches) == 2


def test_a_run_of_which_no_row_is_a_prompt_ends_with_the_reason():
    reason = r"First failure: .*row \d+ of .*KeyError\('hint'\)"
    with pytest.raises(FailureBudgetError, match=reason):
        run_training(num_rows=12, make_prompt=asking_but(*range(1, 12)))


def test_rows_that_are_given_up_stay_so_after_a_resume():
    make_prompt = asking_but(3, 7)

    async def main():
        generator = FakeGenerator()
        async with make_producer(generator, num_rows=12, make_prompt=make_prompt) as producer:
            before = await train(producer, generator, 2)
            state = producer.state_dict()
        again = make_producer(generator, num_rows=12, make_prompt=make_prompt)
        again.load_state_dict(state)
        async with again:
            return before, await train(again, generator, 3)

    before, after = run_virtual(main)
    asked = Counter(key for keys in keys_of([*before, *after]) for key in keys)
    assert set(asked.values()) == {1}
    assert {row for _, row in asked} == set(range(12)) - {3, 7}
