"""How long the parts of a step take: sums of operations and bytes over what hardware achieves.

Constants were read off `benchmarks/results/h200_*.json` together, none of them for one row; what
each is made of stands beside it. `tests/unit/plan/test_h200.py` holds the sums against every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_grpo.loader import balance, plan_ranks
from lightning_grpo.plan.hardware import Speed
from lightning_grpo.policy.size import (
    FULL,
    HALF,
    ModelSize,
    TrainingSetup,
    kept_numbers,
    training_flops,
)

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
        plan = plan_ranks(lengths, balance(lengths, setup.ranks), setup.max_tokens)[0]
        each = self.group / setup.ranks
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
    again = (
        2 * size.vocab * size.hidden * predicted
        if predicted * size.vocab > setup.chunk_logits
        else 0
    )
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
    host = size.layers * speed.block_s * factor
    return max(gpu + _parameter_seconds(size, setup, speed), host)


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
