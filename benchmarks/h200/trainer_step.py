"""One training step on recorded-like lengths, no server: tokens/s per GPU, memory, share of peak.

A Qwen2.5-1.5B-shaped model with random weights, fp32 master weights sharded by FSDP2, bf16
compute, packed sequences (log-normal lengths, mean 600 tokens), fused AdamW. The matrix peak is
measured in the same run (8192 cubed, bf16, random data). FLOPs are counted as a run counts them.

    torchrun --nproc-per-node 1 benchmarks/h200/trainer_step.py --out results.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import Qwen2Config, Qwen2ForCausalLM

from lightning_grpo.algorithm.batch import Denominators, MicroBatch
from lightning_grpo.algorithm.losses import GRPOLoss
from lightning_grpo.callbacks.recording import matrix_peak
from lightning_grpo.loader import plan_micro_batches
from lightning_grpo.objective import minibatch_loss
from lightning_grpo.policy.load import checkpoint_activations
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import parallelize

PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    name: str
    max_tokens: int
    compiled: bool = False
    checkpointing: bool = False
    keep: bool = False  # gathered bf16 parameters stay between the micro-batches of a step


VARIANTS = (
    Variant("eager, 8k", 8192),
    Variant("compiled, 8k", 8192, compiled=True),
    Variant("compiled, 16k", 16384, compiled=True),
    Variant("eager, checkpointing, 16k", 16384, checkpointing=True),
    Variant("kept, compiled, 8k", 8192, compiled=True, keep=True),
    Variant("kept, compiled, 10k", 10240, compiled=True, keep=True),
    Variant("kept, compiled, 20k", 20480, compiled=True, keep=True),
)


def lengths(num_sequences: int, seed: int) -> list[int]:
    """Log-normal, mean about 600 tokens, at most 2048."""
    generator = torch.Generator().manual_seed(seed)
    sigma = 0.6
    mu = torch.log(torch.tensor(600.0)) - sigma**2 / 2
    drawn = torch.exp(mu + sigma * torch.randn(num_sequences, generator=generator))
    return [int(x) for x in drawn.clamp(PROMPT_TOKENS + 16, 2048)]


def micro_batch(sizes: list[int], vocab: int, tokens: int, sequences: int) -> MicroBatch:
    """Random tokens of these lengths, on the GPU."""
    total = sum(sizes)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    mask = torch.ones(total, dtype=torch.bool)
    for start in starts[:-1].tolist():
        mask[start : start + PROMPT_TOKENS] = False
    per_token = {
        "behavior_logprobs": torch.full((total,), -12.0),
        "advantages": torch.randn(total),
        "temperature": torch.ones(total),
    }
    return MicroBatch(
        input_ids=torch.randint(0, vocab, (total,)).cuda(),
        cu_seqlens=starts.cuda(),
        response_mask=mask.cuda(),
        loss_mask=mask.cuda(),
        weight_versions=torch.zeros(total, dtype=torch.int64).cuda(),
        trajectory_index=torch.arange(len(sizes)).cuda(),
        denominators=Denominators(tokens, sequences, sequences),
        **{name: value.cuda() for name, value in per_token.items()},
    )


def build(variant: Variant, layers: int) -> PackedPolicy:
    """The sharded policy of one variant."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    model.train()
    if variant.checkpointing:
        checkpoint_activations(model)
    policy = PackedPolicy(model, share_prefixes=False, compiled=variant.compiled)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    parallelize(policy, mesh, reshard_after_forward=not variant.keep)
    return policy


def run(variant: Variant, sequences_per_gpu: int, layers: int, steps: int) -> dict[str, float]:
    """Seconds and memory of the best step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    policy = build(variant, layers)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = lengths(sequences_per_gpu, seed=rank)
    plan = plan_micro_batches(sizes, variant.max_tokens)
    count = torch.tensor([len(plan)], device="cuda")
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    while len(plan) < int(count):  # equal counts on all ranks
        largest = max(plan, key=len)
        plan.remove(largest)
        plan += [largest[::2], largest[1::2]]
    tokens = torch.tensor([sum(sizes) - PROMPT_TOKENS * len(sizes)], device="cuda")
    dist.all_reduce(tokens)
    batches = [
        micro_batch([sizes[i] for i in rows], 151936, int(tokens), sequences_per_gpu * world)
        for rows in plan
    ]
    loss_function = GRPOLoss()
    sharded = [m for m in policy.modules() if isinstance(m, FSDPModule)]

    def step() -> None:
        for k, batch in enumerate(batches):
            for module in sharded:
                module.set_requires_gradient_sync(k == len(batches) - 1, recurse=False)
                module.set_is_last_backward(k == len(batches) - 1)
                if variant.keep:
                    module.set_reshard_after_backward(k == len(batches) - 1)
            logprobs, _ = policy(
                batch.input_ids,
                batch.cu_seqlens,
                batch.temperature,
                positions_mask=batch.loss_mask,
            )
            loss, _ = minibatch_loss(
                logprobs, batch, loss_function, aggregation=loss_function.aggregation
            )
            (loss * world).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    best = timed(step, steps)
    total = sum(sizes)
    return {
        "step_s": best,
        "tokens_per_s_per_gpu": total / best,
        "tflops_per_gpu": policy.flops(sizes, total - PROMPT_TOKENS * len(sizes)) / best / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "micro_batches": len(batches),
        "tokens": total,
    }


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds of the best of `steps`, after two to warm up."""
    for _ in range(2):
        step()
    best = float("inf")
    for _ in range(steps):
        torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def profile(variant: Variant, out: Path) -> None:
    """Where the GPU's time goes in one step of a variant: the 25 costliest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(variant, 64, 28, 1)
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25)
    out.write_text(table)


def main() -> None:
    """Run the variants; one that fails says why and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    leads = dist.get_rank() == 0
    report = {
        "gpu": torch.cuda.get_device_name(),
        "gpus": dist.get_world_size(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "matrix_peak_tflops": matrix_peak(torch.device("cuda")) / 1e12,
        "variants": {},
    }
    for variant in VARIANTS:
        if args.only and not any(word in variant.name for word in args.only):
            continue
        torch._dynamo.reset()
        try:
            row = run(variant, args.sequences, args.layers, args.steps)
            row["share_of_peak"] = row["tflops_per_gpu"] / report["matrix_peak_tflops"]
        except Exception as error:  # noqa: BLE001 - one variant's failure is a result
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
            if leads:
                traceback.print_exc()
        report["variants"][variant.name] = row
        if leads:
            print(variant.name, json.dumps(row), flush=True)
            args.out.write_text(json.dumps(report, indent=1))
    if args.profile and leads and dist.get_world_size() == 1:
        profile(VARIANTS[-1], args.profile)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
