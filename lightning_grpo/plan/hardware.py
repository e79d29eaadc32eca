"""How long the parts of a step take on a machine: its GPUs by name, and what they achieve.

Times are sums of operations and bytes over what hardware achieves of its data sheet. Constants were
read off `benchmarks/results/h200_*.json` together, none of them for one row; what each is made of
stands beside it. `tests/unit/plan/test_h200.py` holds the sums against every row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lightning_grpo.errors import ConfigError
from lightning_grpo.loader import balance, plan_ranks
from lightning_grpo.policy.packed import MAX_KEPT_PROBABILITIES
from lightning_grpo.policy.size import (
    FULL,
    HALF,
    ModelSize,
    TrainingSetup,
    kept_numbers,
    training_flops,
)
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


# -- how long a step takes -------------------------------------------------------------------------

PASSES = 19
"""How often each number that backward needs is read or written, all operations on it and on its
gradient counted: what is left of a step's time beside matrix products, over the memory's speed."""
LOGIT_PASSES, COMPILED_LOGIT_PASSES = 22, 7
"""The same of each logit, by the operations in `policy/packed.py`."""
ADAPTER_PASSES = 8
"""The same of each number that an adapted layer gives (`policy/adapted.py`): its update is written,
scaled and added, and its gradient scaled and read by both of the adapter's products."""
COPY_SHARE = 0.3
"""Of the memory's speed, that copies of parameters tensor by tensor achieve (an eighth of a step,
by the profile in `h200_trainer_step.json`)."""
CAST_BYTES, ADD_BYTES = FULL + HALF, HALF + 2 * FULL
"""Of a parameter that is made bf16, and of a gradient that is added to an fp32 sum."""
STEP_BYTES = 40
"""Of a parameter in an optimizer step: Adam reads four numbers and writes three; the norm reads the
gradient and clipping reads and writes it."""
STEP_LAUNCHES = 0.2
"""What an optimizer step launches, beside a forward and a backward pass."""
HOST_STEP = 18e9
"""Bytes a second of the same in host memory (`cpu_offload` in `h200_options.json`)."""
HOST_LINK, HOST_GATHER = 25e9, 4e9
"""Bytes a second between host and GPU: of parameters for a pass, and of all that are to be sent."""
SEND = 150e9
"""Bytes a second from trainer to server by CUDA IPC or NVLink (`h200_weight_sync.json`)."""
DECODE_BYTES = 300
"""Of a logit of a decoding step: softmax, sampling and logprob by torch's kernels. With it a server
of the 1.5B shape decodes 21k, 45k and 55k tokens/s of 64, 256 and 512 requests, where 26k, 48k and
55k were measured (`benchmarks/h200/README.md`)."""
SWITCH = 0.2
"""Of a decoding step on the GPU, what each further server on it costs the others: four took 1.3 to
1.9 times as long as by turns alone, and two 1.3 times (`h200_server_sizes.json`)."""
MERGE_PASSES = 50
"""How often an adapter's merge, which rounds by chance, reads and writes each weight in fp32."""


@dataclass(frozen=True)
class Serving:
    """Who answers.

    Attributes:
        servers: Which share the requests.
        running: Requests that one decodes at once.
        per_gpu: Servers on each GPU, which take turns.
        tp: GPUs of each server.
        shared: Whether the trainer uses the same processor.
    """

    servers: int
    running: int
    per_gpu: int = 1
    tp: int = 1
    shared: bool = False


@dataclass(frozen=True)
class Packed:
    """One micro-batch.

    Attributes:
        lengths: Tokens of each sequence.
        unique: Tokens that are computed: a prompt that several sequences begin with counts once.
    """

    lengths: tuple[int, ...]
    unique: int


@dataclass(frozen=True)
class Workload:
    """What a rollout batch asks and trains.

    Attributes:
        batch: Prompts.
        group: Completions of each.
        minibatches: Optimizer steps of one pass over it.
        passes: Over it.
        staleness: How many versions behind rollouts may be; 0: they and training take turns.
        prompt: Tokens of a prompt on average.
        completion: Tokens of a completion on average.
        longest: Tokens of the longest completion of a batch.
        trained_share: Of the trajectories, that have an advantage to learn from.
        scorings: Forward passes beside training: of a reference, and of the proximal policy.
    """

    batch: int
    group: int
    staleness: int
    prompt: float
    completion: float
    longest: float
    minibatches: int = 1
    passes: int = 1
    trained_share: float = 1.0
    scorings: int = 0

    @property
    def completions(self) -> int:
        """Of a rollout batch."""
        return self.batch * self.group

    @property
    def steps(self) -> int:
        """Optimizer steps on a rollout batch."""
        return self.minibatches * self.passes

    def micro_batches(self, setup: TrainingSetup) -> list[Packed]:
        """One rank's micro-batches in one optimizer step, as if all sequences had one length.

        Neighbours stay together (`loader.py`), and ranks share out each group.
        """
        trained = max(1, round(self.completions * self.trained_share / self.minibatches))
        lengths = [max(2, round(self.prompt + self.completion))] * trained
        plan = plan_ranks(lengths, balance(lengths, setup.shares), setup.max_tokens)[0]
        each = self.group / setup.shares
        return [self._packed([lengths[i] for i in rows], trained, each) for rows in plan]

    def _packed(self, lengths: list[int], trained: int, each: float) -> Packed:
        prompts = min(len(lengths), trained / self.group, 1 + len(lengths) / each)
        saved = (len(lengths) - max(1.0, prompts)) * self.prompt if lengths else 0.0
        return Packed(tuple(lengths), round(sum(lengths) - saved))


def training_seconds(
    size: ModelSize,
    setup: TrainingSetup,
    micro_batches: Sequence[Packed],
    predicted_share: float,
    speed: Speed,
) -> float:
    """Forward and backward of one optimizer step on one rank.

    Args:
        size: Of the model.
        setup: How it is trained.
        micro_batches: Its own.
        predicted_share: Of the tokens, those that the policy sampled.
        speed: Of the GPU.
    """
    each = (_pass_seconds(size, setup, m, predicted_share, speed) for m in micro_batches)
    return sum(each) + _once_a_step(size, setup, speed)


def _pass_seconds(
    size: ModelSize,
    setup: TrainingSetup,
    packed: Packed,
    predicted_share: float,
    speed: Speed,
) -> float:
    """Of one micro-batch: what its GPU takes, or what its host takes to launch it."""
    tokens = sum(packed.lengths)
    predicted = round(tokens * predicted_share)
    blocks, head = training_flops(size, packed.lengths, predicted, setup.trained_fraction)
    blocks *= packed.unique / tokens
    kept = predicted if predicted * size.vocab <= setup.chunk_logits else 0
    if setup.compiled and setup.half:
        kept = max(kept, MAX_KEPT_PROBABILITIES // size.vocab)
    again = 2 * size.vocab * size.hidden * max(0, predicted - kept)
    factor = 4 / 3 if setup.checkpointing else 1.0
    each = PASSES * kept_numbers(size, compiled=setup.compiled)
    if setup.trained_fraction < 1:
        outputs = size.query_width + size.kv_width + 2 * size.hidden + 2 * size.intermediate
        each += ADAPTER_PASSES * outputs
    moved = size.layers * each * packed.unique * factor * setup.bytes_each
    logit_passes = COMPILED_LOGIT_PASSES if setup.compiled else LOGIT_PASSES
    moved += logit_passes * FULL * size.vocab * predicted
    flops = speed.flops if setup.half else speed.single
    gpu = (blocks * factor + head + again) / flops + moved / speed.bandwidth
    gpu = gpu / setup.row_ranks + _exchange_seconds(size, setup, packed.unique, speed)
    host = size.layers * speed.block_s * factor
    return max(gpu + _parameter_seconds(size, setup, speed), host)


def _exchange_seconds(size: ModelSize, setup: TrainingSetup, tokens: int, speed: Speed) -> float:
    """Of a rank that computes a row with others: what it sends in attention, forward and backward.

    Queries, keys and values of its tokens go out, and what attention gives comes back.
    """
    passes = 3 if setup.checkpointing else 2
    sent = size.attending * (2 * size.query_width + size.kv_width) * setup.bytes_each
    others = (setup.row_ranks - 1) / setup.row_ranks
    return passes * sent * tokens / setup.row_ranks * others / speed.link


def _parameter_seconds(size: ModelSize, setup: TrainingSetup, speed: Speed) -> float:
    """Of one micro-batch: gradients are added up, and parameters cast and gathered if not kept."""
    copied = ADD_BYTES * size.parameters * setup.trained_fraction
    gathered = 0.0
    if setup.sharded and not setup.keeps:  # before the forward and before the backward pass
        copied += 2 * CAST_BYTES * size.parameters / setup.shards
        gathered = 2 * HALF * size.parameters * _others(setup)
    return copied / (COPY_SHARE * speed.bandwidth) + gathered / speed.link


def _once_a_step(size: ModelSize, setup: TrainingSetup, speed: Speed) -> float:
    """What kept parameters take, and gradients that are summed over ranks, or go to the host."""
    trained = size.parameters * setup.trained_fraction
    seconds = (1 if setup.sharded else 2) * FULL * trained * _others(setup) / speed.link
    if setup.sharded and setup.keeps:
        seconds += CAST_BYTES * size.parameters / (COPY_SHARE * speed.bandwidth)
    if setup.offloaded:
        seconds += FULL * (size.parameters + trained) / setup.shards / HOST_LINK
    return seconds


def _others(setup: TrainingSetup) -> float:
    """Of a sharded tensor, what lies on other ranks."""
    return (setup.ranks - 1) / setup.ranks


def scoring_seconds(
    size: ModelSize,
    setup: TrainingSetup,
    micro_batches: Sequence[Packed],
    predicted_share: float,
    speed: Speed,
) -> float:
    """One forward pass over the same micro-batches: a third of what training takes."""
    fetched = FULL * size.parameters / HOST_LINK if setup.reference == "host" else 0.0
    third = sum(_pass_seconds(size, setup, m, predicted_share, speed) for m in micro_batches) / 3
    return third + fetched


def optimizer_seconds(size: ModelSize, setup: TrainingSetup, speed: Speed) -> float:
    """One step of Adam on one rank's share, with the norm and the clipping of its gradients."""
    moved = STEP_BYTES * size.parameters * setup.trained_fraction / setup.shards
    launched = size.layers * speed.block_s * STEP_LAUNCHES
    return launched + moved / (HOST_STEP if setup.offloaded else speed.bandwidth)


def sync_seconds(
    size: ModelSize,
    setup: TrainingSetup,
    in_flight: int,
    speed: Speed,
    *,
    servers: int = 1,
    tokens: float = 0.0,
) -> float:
    """From the last optimizer step until the servers go on with proved weights.

    Weights are gathered and cast, sent while the trainer scores what it sends, and proved; requests
    in flight are interrupted and sent again.

    Args:
        size: Of the model.
        setup: How it is trained.
        in_flight: Requests, at all servers together.
        speed: Of the GPU.
        servers: Which are sent to over one link.
        tokens: That a request has when it is interrupted, on average.
    """
    gather = CAST_BYTES * size.parameters / (COPY_SHARE * speed.bandwidth)
    if setup.offloaded:
        gather = FULL * size.parameters / setup.shards / HOST_GATHER
    if setup.trained_fraction < 1:
        gather += MERGE_PASSES * 2 * FULL * size.parameters / speed.bandwidth
    send = servers * HALF * size.parameters / min(SEND, speed.link)
    score = size.layers * speed.score_s
    return (
        gather
        + max(send, score)
        + in_flight * (speed.request_s + tokens * speed.resent_s)
        + speed.sync_s
    )


def rollout_seconds(size: ModelSize, work: Workload, serving: Serving, speed: Speed) -> float:
    """How long servers take for a rollout batch.

    A decoding step reads the weights and the keys and values of every sequence once; the scheduler,
    one thread of Python, takes some microseconds for each token meanwhile. On-policy a batch lasts
    until its longest completion ends; otherwise others take the place of those that have ended.

    Args:
        size: Of the model.
        work: What is asked.
        serving: Who answers.
        speed: Of a GPU that serves.
    """
    requests = -(-work.completions // serving.servers)
    tokens = requests * work.completion
    at_once = min(serving.running, requests * (work.staleness + 1))
    steps = max(tokens / at_once, 1.0 if work.staleness else work.longest)
    mean = tokens / steps
    context = work.prompt + work.completion / 2
    read = HALF * size.parameters + mean * context * size.kv_bytes_per_token
    read += mean * size.vocab * DECODE_BYTES
    gpu = max(read / speed.bandwidth, 2 * size.parameters * mean / speed.flops)
    prefilled = work.batch * work.prompt / (serving.servers * serving.tp)
    prefill = 2 * size.parameters * prefilled / speed.flops
    turn = gpu * serving.per_gpu * (1 + SWITCH * (serving.per_gpu - 1)) / serving.tp
    return steps * (speed.decode_s + max(turn, mean * speed.token_s)) + prefill
