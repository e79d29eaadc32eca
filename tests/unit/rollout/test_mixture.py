"""Several datasets as one stream."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.stream import PromptMixture
from tests.fakes.tokenizer import CharTokenizer


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
