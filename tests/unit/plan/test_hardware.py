"""GPUs are found by the table's names and by the driver's."""

from pathlib import Path

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.plan.hardware import (
    GPUS,
    find_gpu,
    gpu_speed,
    measured_flops,
    named_machine,
    require_gpu,
)


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
