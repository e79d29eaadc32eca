"""GPUs are found by the table's names and by the driver's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.plan.hardware import (
    GPUS,
    Packed,
    Serving,
    Speed,
    Workload,
    find_gpu,
    gpu_speed,
    measured_flops,
    named_machine,
    optimizer_seconds,
    require_gpu,
    rollout_seconds,
    sync_seconds,
    training_seconds,
)
from lightning_grpo.plan.plan import step_parts
from lightning_grpo.policy.size import TrainingSetup
from tests.fakes.sizes import ROUND


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("Tesla V100-SXM2-32GB", None),
        ("", None),
    ],
)
def test_the_drivers_names_are_known(driver, name):
    assert find_gpu(driver) == name


def test_a_name_is_found_however_it_is_written_and_an_unknown_one_refused():
    assert require_gpu("H200") == "h200"
    with pytest.raises(ConfigError, match=r"must be one of b200.*Did you mean `a100`\?"):
        require_gpu("a1000")


def test_an_h200_achieves_what_was_measured():
    speed = gpu_speed("h200")
    assert speed.flops == pytest.approx(790e12, rel=0.01)
    assert speed.bandwidth == pytest.approx(4.3e12, rel=0.01)
    assert named_machine(2, "H200", 32).gpu_bytes == 143_771 << 20


def test_every_gpu_has_a_speed_in_words_and_stands_in_the_docs():
    page = (Path(__file__).parents[3] / "docs/plan.md").read_text()
    for name in GPUS:
        assert name.upper() in gpu_speed(name).words
        assert f"`{name}`" in page


def test_this_cpu_multiplies():
    assert 1e8 < measured_flops() < 1e13


# -- the sums behind a step's time, each worked out by hand ----------------------------------------


SIZE = replace(ROUND, vocab=25)
SPEED = Speed(
    flops=1e6,
    single=1e5,
    bandwidth=1e6,
    link=1e6,
    words="",
    block_s=0.0,
    decode_s=0.5,
    token_s=0.01,
    score_s=0.25,
    request_s=0.1,
    sync_s=1.0,
    other_s=2.0,
)
SETUP = TrainingSetup(max_tokens=100)
WORK = Workload(batch=2, group=4, staleness=0, prompt=10, completion=20, longest=40)


def test_neighbours_in_a_micro_batch_share_their_groups_prompt():
    # 8 sequences of 30 tokens, 3 in a micro-batch of 100: 3, 3 and 2.
    made = WORK.micro_batches(SETUP)
    assert [len(each.lengths) for each in made] == [3, 3, 2]
    # 3 neighbours of groups of 4 hold 1 + 3/4 prompts in the mean.
    assert made[0].unique == round(90 - (3 - 1.75) * 10)
    # All of both groups: 8 sequences, 2 prompts.
    (whole,) = WORK.micro_batches(replace(SETUP, max_tokens=1000))
    assert whole.unique == 240 - 6 * 10
    # Over four ranks a group has one sequence on each.
    (one,) = WORK.micro_batches(replace(SETUP, ranks=4))
    assert (len(one.lengths), one.unique) == (2, 60)


def test_ranks_minibatches_and_equal_rewards_leave_fewer_sequences():
    count = [
        sum(len(each.lengths) for each in work.micro_batches(setup))
        for work, setup in (
            (WORK, SETUP),
            (WORK, replace(SETUP, ranks=2)),
            (replace(WORK, minibatches=2), SETUP),
            (replace(WORK, trained_share=0.5), SETUP),
        )
    ]
    assert count == [8, 4, 4, 4]


def test_a_pass_is_its_products_its_traffic_and_its_parameters():
    packed = Packed(lengths=(30, 30), unique=50)
    # 6 operations a parameter and token, 6 * 16 * 4 * n^2 of attention; half are predicted.
    blocks = (6 * 800 * 60 + 6 * 16 * 4 * 2 * 30**2) * 50 / 60
    head = 6 * 25 * 8 * 30
    # 19 passes over what is kept in bf16, 22 over fp32 logits.
    moved = 19 * 4 * (4 * 8 + 2 * 16 + 4 + 4 * 32) * 50 * 2 + 22 * 4 * 25 * 30
    # bf16 gradients are added to fp32 sums; once a step the parameters are cast.
    copied = (10 + 6) * 1000
    expected = (blocks + head + moved + copied / 0.3) / 1e6
    assert training_seconds(SIZE, SETUP, [packed], 0.5, SPEED) == pytest.approx(expected)


def test_ranks_that_compute_a_row_together_share_its_work_and_exchange_heads():
    packed = Packed(lengths=(30, 30), unique=50)
    setup = replace(SETUP, ranks=2, row_ranks=2, sharded=False)
    alone, half = (training_seconds(SIZE, s, [packed], 0.5, SPEED) for s in
                   (replace(SETUP, ranks=2, sharded=False), setup))  # fmt: skip
    blocks = (6 * 800 * 60 + 6 * 16 * 4 * 2 * 30**2) * 50 / 60
    moved = 19 * 4 * (4 * 8 + 2 * 16 + 4 + 4 * 32) * 50 * 2 + 22 * 4 * 25 * 30
    # Half of 25 tokens' queries, keys, values and outputs in bf16, in each of 4 blocks, twice.
    sent = 2 * 4 * (2 * 16 + 4) * 2 * 25 / 2
    assert alone - half == pytest.approx(((blocks + 6 * 25 * 8 * 30 + moved) / 2 - sent) / 1e6)
    # Two ranks that compute each row together cut a batch as one rank does.
    (whole,) = WORK.micro_batches(replace(setup, max_tokens=1000))
    assert len(whole.lengths) == 8


def test_fp32_is_slower_by_its_products_and_its_bytes():
    packed = Packed(lengths=(30, 30), unique=60)
    setups = [replace(SETUP, sharded=False, half=half) for half in (True, False)]
    half, full = (training_seconds(SIZE, s, [packed], 0.0, SPEED) for s in setups)
    products = 6 * 800 * 60 + 6 * 16 * 4 * 2 * 30**2
    moved = 19 * 4 * 196 * 60 * 2
    assert full - half == pytest.approx(9 * products / 1e6 + moved / 1e6)


def test_the_host_is_the_limit_of_small_micro_batches():
    slow = replace(SPEED, block_s=5.0)
    packed = Packed(lengths=(30, 30), unique=60)
    once = 6 * 1000 / 0.3 / 1e6
    found = training_seconds(SIZE, SETUP, [packed] * 3, 0.5, slow)
    assert found == pytest.approx(3 * 4 * 5.0 + once)


def test_shards_are_gathered_in_each_micro_batch_and_gradients_summed_once():
    sharded = replace(SETUP, ranks=2, keeps=False)
    packed = Packed(lengths=(30, 30), unique=60)
    one, two = (training_seconds(SIZE, sharded, [packed] * n, 0.5, SPEED) for n in (1, 2))
    each = two - one
    assert one - each == pytest.approx(4 * 1000 / 2 / 1e6)
    alone = training_seconds(SIZE, SETUP, [packed], 0.5, SPEED) - 6 * 1000 / 0.3 / 1e6
    # Before forward and backward: half of the bf16 parameters by the link, half cast twice.
    assert each - alone == pytest.approx(2 * 2 * 1000 / 2 / 1e6 + 2 * 6 * 1000 / 2 / 0.3 / 1e6)


def test_an_optimizer_step_is_traffic_of_its_own_share():
    assert optimizer_seconds(SIZE, SETUP, SPEED) == pytest.approx(40 * 1000 / 1e6)
    assert optimizer_seconds(SIZE, replace(SETUP, ranks=4), SPEED) == pytest.approx(0.01)
    adapter = replace(SETUP, trained_fraction=0.02)
    assert optimizer_seconds(SIZE, adapter, SPEED) == pytest.approx(0.02 * 0.04)
    offloaded = replace(SETUP, offloaded=True)
    assert optimizer_seconds(SIZE, offloaded, SPEED) == pytest.approx(40_000 / 18e9)


def test_a_sync_gathers_sends_beside_scoring_and_interrupts():
    gather, score = 6 * 1000 / 0.3 / 1e6, 4 * 0.25
    assert sync_seconds(SIZE, SETUP, 30, SPEED) == pytest.approx(gather + score + 3 + 1)
    slow = replace(SPEED, link=100.0)
    found = sync_seconds(SIZE, SETUP, 0, slow, servers=2)
    assert found == pytest.approx(gather + 2 * 2000 / 100 + 1)


def test_a_batch_on_policy_lasts_until_its_longest_completion_ends():
    # 8 requests of 20 tokens: 40 steps with 4 in the mean.
    serving = Serving(servers=1, running=8)
    read = 2 * 1000 + 4 * 20 * SIZE.kv_bytes_per_token + 4 * 25 * 300
    prefill = 2 * 1000 * 20 / 1e6
    expected = 40 * (0.5 + max(read / 1e6, 4 * 0.01)) + prefill
    assert rollout_seconds(SIZE, WORK, serving, SPEED) == pytest.approx(expected)


def test_later_others_take_the_place_of_what_has_ended():
    # Two batches in flight, 8 at once: 160 tokens in 20 steps.
    stale, serving = replace(WORK, staleness=1), Serving(servers=1, running=8)
    found = rollout_seconds(SIZE, stale, serving, SPEED)
    assert found == pytest.approx(20 * (0.5 + 8 * 0.01) + 0.04, rel=0.01)
    fewer = rollout_seconds(SIZE, stale, Serving(servers=1, running=4), SPEED)
    assert fewer > found
    two = rollout_seconds(SIZE, stale, Serving(servers=2, running=4), SPEED)
    assert two < found


def test_servers_of_one_gpu_take_turns_and_those_of_several_share_the_reading():
    big = replace(SPEED, token_s=0.0, bandwidth=1e3)
    times = [
        rollout_seconds(SIZE, WORK, Serving(1, 8, per_gpu=per_gpu, tp=tp), big)
        for per_gpu, tp in ((1, 1), (2, 1), (1, 2))
    ]
    assert times[1] > 2.2 * times[0]
    assert times[2] < 0.6 * times[0]


@pytest.mark.parametrize(
    ("staleness", "shared", "waits"), [(0, False, True), (1, False, False), (1, True, False)]
)
def test_parts_overlap_where_they_may(staleness, shared, waits):
    slow = replace(SPEED, bandwidth=1e4)  # training is the longer part
    work = replace(WORK, staleness=staleness)
    parts = step_parts(SIZE, SETUP, work, Serving(1, 8, shared=shared), slow)
    alone = step_parts(SIZE, SETUP, replace(work, staleness=0), Serving(1, 8), slow)
    assert parts.waiting == (parts.rollout if waits else 0.0)
    beside = parts.rollout if shared and staleness else 0.0
    assert parts.forward_backward == pytest.approx(alone.forward_backward + beside)
    total = parts.waiting + parts.forward_backward + parts.optimizer + parts.sync + parts.other
    assert parts.step == total


def test_an_idle_trainer_waits_for_what_it_does_not_cover():
    slow = replace(SPEED, decode_s=100.0)
    parts = step_parts(SIZE, SETUP, replace(WORK, staleness=1), Serving(1, 8), slow)
    assert parts.step == pytest.approx(parts.rollout + parts.sync)  # servers stand still in it
