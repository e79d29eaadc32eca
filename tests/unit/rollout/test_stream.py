"""Several datasets as one stream."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.rollout.admission import Curriculum, PromptMixture, undecided, unsolved
from lightning_grpo.rollout.prompts import Prompts
from tests.fakes.generator import FakeGenerator
from tests.fakes.rollouts import make_producer
from tests.fakes.tiny_run import make_group
from tests.fakes.tokenizer import CharTokenizer
from tests.fakes.virtual_time import run_virtual


def make_mixture(**sizes_and_weights: tuple[int, float]) -> PromptMixture:
    sets = {}
    for name, (size, weight) in sizes_and_weights.items():
        rows = [{"question": f"{name} {i}"} for i in range(size)]
        prompts = Prompts(rows, column="question", weight=weight)
        sets[name] = prompts.load(CharTokenizer(), name=name)
    return PromptMixture(sets)


def take(mixture: PromptMixture, count: int) -> list[tuple[int, int]]:
    keys = []
    for _ in range(count):
        keys.append(mixture.peek())
        mixture.advance()
    return keys


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
    cut=st.integers(0, 60),
)
def test_any_stretch_has_the_datasets_in_proportion_and_each_its_own_passes(sizes, weights, cut):
    lanes = {f"d{i}": (size, weights[i]) for i, size in enumerate(sizes)}
    mixture = make_mixture(**lanes)
    keys = take(mixture, cut)
    again = make_mixture(**lanes)
    again.load_state_dict(mixture.state_dict())
    keys += take(again, 60 - cut)
    assert keys == take(make_mixture(**lanes), 60)
    assert len(set(keys)) == 60
    prompts = [again.by_key(key) for key in keys]
    asked = Counter(prompt.dataset for prompt in prompts)
    total = sum(weight for _, weight in lanes.values())
    for name, (size, weight) in lanes.items():
        assert abs(asked[name] - 60 * weight / total) <= len(lanes)
        own = [prompt for prompt in prompts if prompt.dataset == name]
        assert [prompt.pass_index for prompt in own] == [i // size for i in range(len(own))]
    assert mixture.num_rows == sum(sizes)


def test_rows_are_counted_end_to_end_and_name_the_prompt_again():
    mixture = make_mixture(few=(2, 1.0), many=(5, 1.0))
    for key in take(mixture, 20):
        prompt = mixture.by_key(key)
        assert prompt.key == key
        name, row = prompt.columns["question"].split()
        assert int(row) == key[1] - (0 if name == "few" else 2)
    assert mixture.pass_index == 2  # of the larger one; the other is in its fifth


def test_a_prompt_that_is_left_out_does_not_count_towards_its_datasets_share():
    mixture = make_mixture(a=(50, 1.0), b=(50, 1.0))
    assert mixture.by_key(mixture.peek()).dataset == "a"
    mixture.advance(asked=False)
    assert mixture.by_key(mixture.peek()).dataset == "a"
    mixture.advance()
    assert mixture.by_key(mixture.peek()).dataset == "b"


def test_a_checkpoint_of_other_datasets_and_a_row_that_is_not_there_are_refused():
    state = make_mixture(a=(3, 1.0)).state_dict()
    mixture = make_mixture(a=(3, 1.0), b=(3, 1.0))
    with pytest.raises(CheckpointError, match=r"datasets \['a'\], this run has \['a', 'b'\]"):
        mixture.load_state_dict(state)
    for row in (6, 99, -1):
        with pytest.raises(CheckpointError, match=rf"\(0, {row}\) is not one of the 6 rows"):
            mixture.by_key((0, row))


def test_a_weight_is_positive():
    with pytest.raises(ConfigError, match="`weight` must be > 0"):
        Prompts([{}], weight=0.0)


EASY = 5


def reward_of_row(prompt: str) -> float:
    """Rows below five are always right, the others never."""
    digits = "".join(c for c in prompt.partition("question ")[2] if c.isdigit())
    return float(int(digits) < EASY)


def train(num_batches, state=None, **options):
    async def main():
        generator = FakeGenerator()
        producer = make_producer(
            generator, batch_size=2, num_rows=10, reward=reward_of_row, **options
        )
        if state is not None:
            producer.load_state_dict(pickle.loads(pickle.dumps(state)))
            generator.version = producer.gate.version
        async with producer:
            keys = []
            for _ in range(num_batches):
                keys.append([group.prompt.key for group in await producer.take()])
                await anyio.sleep(1.0)
                generator.version = producer.gate.version + 1
                producer.advance(generator.version)
            return producer, keys, producer.state_dict()

    return run_virtual(main)


def test_the_first_pass_asks_everything_and_later_ones_what_was_not_solved():
    producer, keys, _ = train(40, curriculum=Curriculum(least=0.1))
    asked = Counter(key for batch in keys for key in batch)
    assert set(asked.values()) == {1}
    passes = max(pass_index for pass_index, _ in asked)
    for pass_index in range(passes):
        rows = {row for p, row in asked if p == pass_index}
        assert rows >= set(range(EASY, 10)), "what was never solved is always asked"
        if pass_index == 0:
            assert rows == set(range(10))
    easy = sum(row < EASY for _, row in asked if _ > 0)
    hard = sum(row >= EASY for _, row in asked if _ > 0)
    assert 0 < easy < hard / 4
    summary = producer.ledger.summary(1)
    assert summary["trained"] + summary["skipped"] == 10
    assert producer.counters.skipped > 20


@pytest.mark.parametrize("cut", [3, 9])
def test_in_strict_order_a_run_that_is_cut_leaves_out_the_same_prompts(cut):
    options = {"curriculum": Curriculum(), "policy": "strict"}
    _, whole, _ = train(16, **options)
    _, before, state = train(cut, **options)
    _, after, _ = train(16 - cut, state, **options)
    assert [*before, *after] == whole


def test_without_a_curriculum_nothing_is_remembered():
    _, _, state = train(6)
    assert state["ledger"]["success"] == {}
    assert state["counters"]["skipped"] == 0


def test_priorities_by_hand():
    assert [unsolved(s) for s in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [undecided(s) for s in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.75, 1.0, 0.0]
    group = make_group(0, (0.0, 0.4, 0.5, 1.0))
    assert Curriculum().success(group) == 0.5
    assert Curriculum(passing_reward=1.0).success(group) == 0.25


def test_a_prompt_is_asked_with_its_probability_and_the_same_way_every_time():
    curriculum = Curriculum(priority=undecided, least=0.2)
    for success, expected in [(0.5, 1.0), (0.25, 0.75), (1.0, 0.2), (None, 1.0)]:
        draws = [curriculum.asks((p, row), success) for p in range(20) for row in range(100)]
        assert abs(sum(draws) / len(draws) - expected) < 0.04
    again = replace(curriculum)
    keys = [(p, row) for p in range(20) for row in range(20)]
    assert [again.asks(k, 0.1) for k in keys] == [curriculum.asks(k, 0.1) for k in keys]
    assert [again.asks(k, 0.1, 1) for k in keys] != [curriculum.asks(k, 0.1) for k in keys]


@pytest.mark.parametrize("least", [0.0, 1.5])
def test_a_prompt_can_not_be_forgotten(least):
    with pytest.raises(ConfigError, match=r"`curriculum.least` must be > 0 and <= 1"):
        Curriculum(least=least)
