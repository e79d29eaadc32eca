"""GPUs by name, and what a processor achieves of what its data sheet says."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from difflib import get_close_matches

from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.base import Machine, device_model, device_names, local_machine

MIB = 1 << 20
ACHIEVED_FLOPS, ACHIEVED_BANDWIDTH = 0.80, 0.90
"""Of the data sheet's. Measured on an H200 (790 of 989 TFLOP/s by bf16 products of 8,192 rows, 4.3
of 4.8 TB/s read and written), believed of the others."""
NVLINK, PCIE = 170e9, 20e9
"""Bytes a second that a gather of parameters achieves between GPUs. NVLink: from one and two H200
(`h200_trainer_step.json`); PCIe: believed."""


@dataclass(frozen=True)
class GPU:
    """One line of the table.

    Attributes:
        words: Of the driver's name for it, all of which must be there.
        mib: Memory, as the driver tells it.
        tflops: bf16 products summed in fp32, without sparsity, by the data sheet.
        single: TFLOP/s of fp32 products, by the data sheet.
        terabytes: A second, of its memory, by the data sheet.
        link: Between GPUs.
    """

    words: str
    mib: int
    tflops: float
    single: float
    terabytes: float
    link: float = NVLINK


# NVIDIA's data sheets of each product (bf16 with sparsity there is halved here); memory as
# `nvidia-smi` shows it. Where a name has the words of several lines the first one counts.
GPUS = {
    "b200": GPU("B200", 183_359, 2250, 75, 8.0),
    "h200": GPU("H200", 143_771, 989, 67, 4.8),
    "gh200": GPU("GH200", 97_871, 989, 67, 4.0),
    "h100-nvl": GPU("H100 NVL", 95_830, 835, 60, 3.9),
    "h100-pcie": GPU("H100 PCIe", 81_559, 756, 51, 2.0, PCIE),
    "h100": GPU("H100", 81_559, 989, 67, 3.35),
    "a100-40gb": GPU("A100 40GB", 40_960, 312, 19.5, 1.555),
    "a100": GPU("A100", 81_920, 312, 19.5, 2.039),
    "l40s": GPU("L40S", 46_068, 362, 91.6, 0.864, PCIE),
    "l40": GPU("L40", 46_068, 181, 90.5, 0.864, PCIE),
    "l4": GPU("L4", 23_034, 121, 30.3, 0.300, PCIE),
    "a10g": GPU("A10G", 23_028, 70, 31.5, 0.600, PCIE),
    "a10": GPU("A10", 23_028, 125, 31.2, 0.600, PCIE),
    "rtx-6000-ada": GPU("RTX 6000 Ada", 49_140, 364, 91.1, 0.960, PCIE),
    "rtx-a6000": GPU("RTX A6000", 49_140, 155, 38.7, 0.768, PCIE),
    "rtx-5090": GPU("RTX 5090", 32_607, 210, 104.8, 1.792, PCIE),
    "rtx-4090": GPU("RTX 4090", 24_564, 165, 82.6, 1.008, PCIE),
    "rtx-3090": GPU("RTX 3090", 24_576, 71, 35.6, 0.936, PCIE),
}


@dataclass(frozen=True)
class Speed:
    """What a processor, and the program that drives it, achieve.

    Attributes:
        flops: A second, of matrix products in bf16.
        single: The same in fp32.
        bandwidth: Bytes a second of memory, read and written.
        link: Bytes a second between GPUs.
        block_s: Least time of a block's forward and backward pass, which the host takes to launch.
        decode_s: Of a server's decoding step beside what its GPU and scheduler do.
        token_s: A server's scheduler, for each token.
        score_s: Of a proof's pass, for each block.
        request_s: To interrupt a request and send it again.
        resent_s: The same, for each token that it has: read with its logprob, and written again.
        sync_s: Of a weight sync beside all that.
        other_s: Of a step: packing, logging, recording.
        words: What it was taken from.
    """

    flops: float
    single: float
    bandwidth: float
    link: float
    words: str
    block_s: float = 3e-3
    decode_s: float = 1.5e-3
    token_s: float = 15e-6
    score_s: float = 1.2e-3
    request_s: float = 100e-6
    resent_s: float = 2.8e-6
    sync_s: float = 0.02
    other_s: float = 0.1


def gpu_speed(name: str) -> Speed:
    """What a GPU of the table achieves. Its host's times are those of the H200's."""
    gpu = GPUS[name]
    flops, bandwidth = gpu.tflops * ACHIEVED_FLOPS, gpu.terabytes * ACHIEVED_BANDWIDTH
    words = (
        f"{name.upper()}: {flops:.0f} of {gpu.tflops:.0f} TFLOP/s (bf16) and {bandwidth:.1f} of "
        f"{gpu.terabytes:.1f} TB/s achieved"
    )
    single = gpu.single * ACHIEVED_FLOPS * 1e12
    return Speed(flops * 1e12, single, bandwidth * 1e12, gpu.link, words)


def cpu_speed(flops: float) -> Speed:
    """What a CPU core achieves, whose memory and links are no limit of small models.

    Times are those of the quickstart on two cores; its small products reach half of a large one's.

    Args:
        flops: Of `measured_flops`.
    """
    words = f"this CPU: {flops / 1e9:.0f} GFLOP/s of fp32 products on one core, measured now"
    return Speed(
        flops / 2,
        flops / 2,
        20e9,
        20e9,
        words,
        block_s=8e-3,
        decode_s=4e-3,
        token_s=110e-6,
        score_s=10e-3,
        request_s=200e-6,
        sync_s=0.03,
        other_s=0.1,
    )


def measured_flops() -> float:
    """FLOP/s of a product of two fp32 matrices of 768 rows on one thread; a tenth of a second."""
    import torch

    rows, threads = 768, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.ones(rows, rows), torch.ones(rows, rows)
        left @ right
        best = float("inf")
        for _ in range(8):
            began = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * rows**3 / best


def named_machine(gpus: int, name: str, cores: int) -> Machine:
    """A machine with so many GPUs of the table.

    Raises:
        ConfigError: The table has none of this name.
    """
    return Machine(gpus, GPUS[require_gpu(name)].mib * MIB, cores)


def require_gpu(name: str) -> str:
    """A GPU's name in the table, however it is written.

    Raises:
        ConfigError: The table has none of this name.
    """
    known = find_gpu(name)
    if known is None:
        nearest = get_close_matches(name.lower(), GPUS, n=1, cutoff=0.5)
        meant = f" Did you mean `{nearest[0]}`?" if nearest else ""
        raise ConfigError("--gpu", f"must be one of {', '.join(GPUS)}", name, meant.strip())
    return known


def find_gpu(name: str) -> str | None:
    """The table's name of a GPU, by that or by the driver's (`NVIDIA A100-SXM4-80GB`)."""
    if name.lower() in GPUS:
        return name.lower()
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = (key for key, gpu in GPUS.items() if set(gpu.words.lower().split()) <= words)
    return next(found, None)


def this_machine(cores: int) -> tuple[Machine, str]:
    """What is here, and what the driver calls its GPUs; empty where there is none."""
    machine = local_machine(cores)
    return machine, device_model(device_names()[0]) if machine.gpus else ""
