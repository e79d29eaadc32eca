from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.rollout.admission import StalenessGate


def filled(gate: StalenessGate) -> list[int]:
    tickets = []
    while gate.may_admit():
        tickets.append(gate.admit())
    return tickets


def test_a_batch_of_nobody_and_negative_staleness_are_refused():
    with pytest.raises(ConfigError, match="`batch_size` must be >= 1, got 0"):
        StalenessGate(0, 1)
    with pytest.raises(ConfigError, match="`max_staleness` must be >= 0, got -1"):
        StalenessGate(4, -1)


def test_it_admits_one_batch_for_each_version_that_may_lie_between():
    assert len(filled(StalenessGate(4, 0))) == 4
    assert len(filled(StalenessGate(4, 2))) == 12


def test_on_policy_nobody_starts_between_a_batch_and_its_weights():
    gate = StalenessGate(2, 0)
    for ticket in filled(gate):
        gate.finish(ticket)
    assert len(gate.take()) == 2
    assert not gate.may_admit()
    gate.advance(1)
    assert len(filled(gate)) == 2


def test_the_slots_of_a_batch_are_freed_by_advance_not_by_take():
    gate = StalenessGate(2, 1)
    for ticket in filled(gate)[:2]:
        gate.finish(ticket)
    gate.take()
    assert gate.num_outstanding == 4
    gate.advance(1)
    assert gate.num_outstanding == 2


def test_it_stops_when_the_trainers_last_batch_is_covered():
    gate = StalenessGate(2, 3, max_groups=4)
    tickets = filled(gate)
    assert len(tickets) == 4
    gate.release(tickets[0])  # filtered: the trainer still wants four
    assert len(filled(gate)) == 1
    for ticket in [*tickets[1:], 4]:
        gate.finish(ticket)
    gate.take()
    gate.advance(1)
    gate.take()
    gate.advance(2)
    assert gate.is_exhausted
    assert not gate.may_admit()


def test_the_next_batch_waits_for_those_that_no_later_batch_has_room_for():
    # Six groups of version 0 in batches of two, none older than two versions: once the first batch
    # is gone, the second must have two of the four left, or the third can't hold the rest.
    gate = StalenessGate(2, 2)
    first = filled(gate)
    for ticket in first[:2]:
        gate.finish(ticket)
    gate.take()
    gate.advance(1)
    for ticket in filled(gate):  # version 1, done at once
        gate.finish(ticket)
    assert gate.select() is None
    assert gate.blockers() == first[2:4]
    gate.finish(first[5])
    assert gate.select() is None
    gate.finish(first[4])
    assert gate.select() == [first[4], first[5]]


def test_dropping_takes_whoever_is_ready_and_names_the_rest_once_they_are_too_old():
    gate = StalenessGate(2, 1, policy="drop")
    old = filled(gate)
    for ticket in old[:2]:
        gate.finish(ticket)
    gate.take()
    gate.advance(1)
    for ticket in filled(gate):
        gate.finish(ticket)
    assert len(gate.take()) == 2
    assert gate.overdue() == old[2:]


def test_strict_order_waits_for_everyone_and_takes_the_first_admitted():
    gate = StalenessGate(2, 1, policy="strict")
    tickets = filled(gate)
    for ticket in reversed(tickets[1:]):
        gate.finish(ticket)
    assert gate.take() is None
    gate.finish(tickets[0])
    assert gate.take() == tickets[:2]


def test_a_group_tried_again_is_of_the_version_it_starts_again_at():
    gate = StalenessGate(1, 1)
    first, second = filled(gate)
    gate.finish(first)
    gate.take()
    gate.advance(1)
    assert gate.retry(second) == 1
    assert gate.admitted_version(second) == 1


def test_the_version_never_goes_back():
    gate = StalenessGate(1, 1)
    gate.advance(3)
    gate.advance(3)
    with pytest.raises(RolloutError, match="from 3 to 2"):
        gate.advance(2)


def test_it_counts_batches_that_were_taken_before_the_weights_of_the_last_one_were_out():
    gate = StalenessGate(1, 2)
    first, second, third = filled(gate)
    gate.finish(first)
    gate.take()
    gate.finish(second)
    gate.take()  # two batches are out; the next one is trained at version 2
    gate.advance(1)
    (young,) = filled(gate)
    gate.finish(young)
    assert gate.take() is None
    assert gate.blockers() == [third]


def test_the_oldest_version_goes_first_also_when_an_earlier_group_was_tried_again():
    gate = StalenessGate(1, 2)
    first, second, third = filled(gate)
    gate.finish(first)
    gate.take()
    gate.advance(1)
    gate.retry(second)
    gate.finish(second)
    gate.finish(third)
    assert gate.take() == [third]


class GateMachine(RuleBasedStateMachine):
    """Any order of finishing, failing, filtering, retrying, taking and publishing."""

    @initialize(
        batch=st.integers(1, 5),
        staleness=st.integers(0, 3),
        batches=st.none() | st.integers(1, 8),
        policy=st.sampled_from(["wait", "wait", "strict", "drop"]),
    )
    def start(self, batch, staleness, batches, policy):
        limit = None if batches is None else batch * batches
        self.gate = StalenessGate(batch, staleness, limit, policy)
        self.running: list[int] = []
        self.finished: set[int] = set()
        self.order: list[int] = []

    def pick(self, data):
        return data.draw(st.sampled_from(self.running))

    @precondition(lambda self: self.gate.may_admit())
    @rule(count=st.integers(1, 20))
    def admit(self, count):
        while count and self.gate.may_admit():
            ticket = self.gate.admit()
            self.running.append(ticket)
            self.order.append(ticket)
            count -= 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 8))
    def finish(self, data, count):
        for _ in range(min(count, len(self.running))):
            ticket = self.pick(data)
            self.running.remove(ticket)
            self.gate.finish(ticket)
            self.finished.add(ticket)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def filter_or_fail(self, data):
        ticket = self.pick(data)
        self.running.remove(ticket)
        self.order.remove(ticket)
        self.gate.release(ticket)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def retry(self, data):
        self.gate.retry(self.pick(data))

    @rule()
    def take(self):
        ages = {t: self.gate.admitted_version(t) for t in self.order}
        version = self.gate.batch_version
        taken = self.gate.take()
        if taken is None:
            return
        assert len(taken) == self.gate.batch_size
        assert set(taken) <= self.finished
        if self.gate.policy == "strict":
            assert taken == self.order[: len(taken)]
        for ticket in taken:
            assert version - ages[ticket] <= self.gate.max_staleness
            self.order.remove(ticket)
        self.drop_overdue()

    @precondition(lambda self: self.gate.num_pending_batches)
    @rule()
    def advance(self):
        self.gate.advance(self.gate.version + 1)
        self.drop_overdue()

    def drop_overdue(self):
        overdue = self.gate.overdue()
        if self.gate.policy != "drop":
            assert not overdue
        for ticket in overdue:
            self.gate.release(ticket)
            self.order.remove(ticket)
            self.running = [t for t in self.running if t != ticket]
            self.finished.discard(ticket)

    @invariant()
    def slots_are_bounded(self):
        gate = self.gate
        assert gate.num_outstanding <= (gate.max_staleness + 1) * gate.batch_size
        if gate.max_groups is not None:
            assert gate.num_taken + len(self.order) <= gate.max_groups

    @invariant()
    def every_waiting_group_has_room_in_a_batch_that_may_take_it(self):
        gate = self.gate
        if gate.policy == "drop":
            return
        last = [gate.admitted_version(t) + gate.max_staleness for t in self.order]
        for version in set(last):
            due = sum(v <= version for v in last)
            assert due <= (version - gate.batch_version + 1) * gate.batch_size

    @invariant()
    def on_policy_nothing_is_admitted_ahead(self):
        if self.gate.max_staleness == 0 and self.gate.num_pending_batches:
            assert not self.gate.may_admit()

    @invariant()
    def once_everyone_has_finished_a_batch_can_be_taken(self):
        gate = self.gate
        settled = gate.policy != "strict" or not gate.may_admit()
        if not self.running and len(self.order) >= gate.batch_size and settled:
            assert gate.select() is not None
        if not self.running and not gate.may_admit() and not gate.num_pending_batches:
            assert gate.select() is not None or gate.is_exhausted

    @invariant()
    def a_batch_that_waits_says_for_whom(self):
        gate = self.gate
        if gate.select() is None and self.running:
            assert set(gate.awaited()) <= set(self.running)
            assert gate.awaited()
        elif gate.select() is not None:
            assert gate.policy != "wait" or not gate.blockers()


GateMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_no_order_of_events_breaks_the_staleness_rule = GateMachine.TestCase
