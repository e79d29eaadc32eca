import pytest
import torch

from lightning_grpo.weights.gather import round_by_chance
from tests.fakes.devices import ON_A_GPU

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_of_many_roundings_is_the_value(dtype, device):
    value = 1.0 + torch.finfo(dtype).eps * 0.03
    for signed in (value, -value):
        rounded = round_by_chance(torch.full((100_000,), signed, device=device), dtype, "w").float()
        assert len(rounded.unique()) == 2
        assert rounded.mean().item() == pytest.approx(signed, abs=torch.finfo(dtype).eps * 3e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_what_the_dtype_can_hold_stays_itself(dtype):
    values = torch.randn(10_000).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    assert torch.equal(round_by_chance(values.float(), dtype, "w"), values)


@pytest.mark.parametrize("dtype", HALF)
def test_no_value_moves_by_a_whole_unit(dtype):
    values = torch.randn(10_000) * 0.02
    rounded = round_by_chance(values, dtype, "w").float()
    unit = values.abs().log2().floor().exp2() * torch.finfo(dtype).eps
    assert ((rounded - values).abs() < unit.clamp_min(2**-24)).all()


def test_a_parameter_rounds_alike_each_time_and_unlike_others():
    values = torch.randn(1000)
    first = round_by_chance(values, torch.bfloat16, "q_proj")
    assert torch.equal(round_by_chance(values.clone(), torch.bfloat16, "q_proj"), first)
    assert not torch.equal(round_by_chance(values, torch.bfloat16, "k_proj"), first)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_finite_stays_so(dtype):
    bits = [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000]  # the first is CUDA's NaN
    values = torch.tensor([*bits, -0x800000], dtype=torch.int32).view(torch.float32)
    rounded = round_by_chance(values, dtype, "w")
    assert torch.equal(rounded.isnan(), torch.tensor([True, True, True, False, False]))
    assert rounded[3:].tolist() == [float("inf"), float("-inf")]


def test_where_nothing_is_lost_nothing_is_drawn():
    values = torch.randn(10)
    assert torch.equal(round_by_chance(values, torch.float32, "w"), values)
    wide = torch.randn(10, dtype=torch.float64)
    assert torch.equal(round_by_chance(wide, torch.bfloat16, "w"), wide.bfloat16())
