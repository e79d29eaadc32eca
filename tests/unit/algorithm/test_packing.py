from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.loader import balance, plan_micro_batches, plan_ranks

LENGTHS = st.lists(st.integers(1, 200), max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 300))
def test_each_sequence_is_in_one_micro_batch_and_only_a_long_one_exceeds_the_budget(
    lengths, budget
):
    plan = plan_micro_batches(lengths, budget)
    assert sorted(i for positions in plan for i in positions) == list(range(len(lengths)))
    for positions in plan:
        assert positions == sorted(positions)
        assert sum(lengths[i] for i in positions) <= budget or len(positions) == 1


@settings(deadline=None)
@given(LENGTHS, st.integers(200, 400))
def test_micro_batches_are_filled(lengths, budget):
    # First-fit leaves at most one micro-batch that is no more than half full.
    loads = [sum(lengths[i] for i in p) for p in plan_micro_batches(lengths, budget)]
    assert sum(load * 2 <= budget for load in loads) <= 1


def test_a_budget_of_ten_packs_seven_with_three_and_six_with_four():
    assert plan_micro_batches([3, 7, 4, 6], 10) == [[0, 1], [2, 3]]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8))
def test_shares_cover_all_and_differ_by_at_most_one_sequence_in_cost(costs, num_ranks):
    shares = balance(costs, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert shares == balance(costs, num_ranks)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 300))
def test_every_rank_gets_as_many_micro_batches_as_the_others(lengths, num_ranks, budget):
    shares = balance(lengths, num_ranks)
    plans = plan_ranks(lengths, shares, budget)
    assert len({len(plan) for plan in plans}) == 1
    for share, plan in zip(shares, plans, strict=True):
        assert sorted(i for positions in plan for i in positions) == share
        for positions in plan:
            assert sum(lengths[i] for i in positions) <= budget or len(positions) <= 1


def test_a_rank_with_too_few_sequences_gets_empty_micro_batches():
    assert plan_ranks([9, 9, 9, 9], [[0, 1, 2], [3]], 9) == [[[0], [1], [2]], [[3], [], []]]


def test_a_rank_splits_its_micro_batches_rather_than_run_empty_ones():
    plans = plan_ranks([9, 9, 1, 2, 3], [[0, 1], [2, 3, 4]], 9)
    assert len(plans[1]) == 2
    assert all(plans[1])
