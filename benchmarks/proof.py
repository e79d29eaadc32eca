"""How often the proof of a weight sync raises a false alarm, and which planted faults it finds.

A policy moves by a random update before each publish. What is sent is scored as a run scores it;
the *server* is a simulated implementation of its own, computing with the same tensors in its
precision: every module's output is rounded anew, at random, so that its errors have nothing to do
with ours (they are a little larger than a GPU's). fp8 servers quantize by tensor, where our
measure of their rounding quantizes by row. `ratio` is a difference over its limit: an alarm is a
ratio above 1. The chance of one is estimated from the ratios' distribution, as that of their
logarithms' mean and deviation.

    python -m benchmarks.proof --out benchmarks/results/proof.json
    python -m benchmarks.proof --publishes 20 --out proof.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.errors import WeightSyncError
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.session.proof import (
    SnapshotScorer,
    _computing_with,
    _rounded_inputs,
    policy_scores,
)
from lightning_grpo.shipped import resolve_path
from lightning_grpo.weights.gather import gather_weights, round_by_chance
from lightning_grpo.weights.proof import (
    Probe,
    Rounding,
    Scores,
    SentScores,
    ServerProof,
    check_policy,
)

UPDATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Size of one update, relative to each tensor's root mean square; of an adapter, as it is."""
WIRES = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "bfloat16"}
"""Precision of the server, and the dtype that travels to it."""
POLICY_KINDS = ("float32", "bfloat16")


def shipped() -> PreTrainedModel:
    """The quickstart's model: trained, 0.46M parameters."""
    return load_policy(resolve_path("shipped:quickstart"))


def random_model(layers: int, hidden: int) -> PreTrainedModel:
    """Random weights, where nothing drowns the rounding."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(layers)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "quickstart": shipped,
    "random, 4 layers": lambda: random_model(4, 128),
    "random, 24 layers": lambda: random_model(24, 64),
}


class Server:
    """An implementation of its own: scores with the tensors that it was sent."""

    def __init__(self, model: PreTrainedModel, kind: str, seed: int = 0) -> None:
        self._scorer = SnapshotScorer(model)
        self._kind = kind
        self._draw = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def scores(self, snapshot: dict[str, Tensor], probe: Probe) -> Scores:
        """As it answers a probe."""
        self._scorer.hold(dict(snapshot))
        policy = self._scorer._policy
        if self._kind == "float32":
            with _computing_with(policy.model, Tensor.double), self._rounding(policy.model):
                return self._scorer.scores(probe.sequences)
        change = by_tensor if self._kind == "fp8" else Tensor.float
        with _computing_with(policy.model, change), self._rounding(policy.model):
            if self._kind != "fp8":
                return self._scorer.scores(probe.sequences)
            with _rounded_inputs(policy.model):
                return self._scorer.scores(probe.sequences)

    @contextmanager
    def _rounding(self, model: nn.Module) -> Iterator[None]:
        def rounded(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            if output.dtype == torch.float64:  # of an fp32 server: some units in the last place
                noise = torch.rand(output.shape, generator=self._draw, dtype=torch.float64) - 0.5
                return output * (1 + noise * 2**-22)
            name = str(torch.randint(2**31, (), generator=self._draw).item())
            return round_by_chance(output, torch.bfloat16, name).to(output.dtype)

        leaves = [m for m in model.modules() if not list(m.children())]
        hooks = [module.register_forward_hook(rounded) for module in leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def by_tensor(weight: Tensor) -> Tensor:
    """A matrix as e4m3 with one scale."""
    if weight.ndim < 2:
        return weight.float()
    scale = weight.float().abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return (weight.float() / scale).to(torch.float8_e4m3fn).float() * scale


@dataclass
class Trainer:
    """One policy, what it sends and how it proves it."""

    model: str
    server_kind: str
    policy_kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        self.policy = PackedPolicy(MODELS[self.model]())
        vocab = self.policy.model.config.vocab_size
        draw = torch.Generator().manual_seed(self.seed)
        self.probe = Probe(
            tuple(tuple(torch.randint(0, vocab, (n,), generator=draw).tolist()) for n in (128, 12))
        )
        self.wire = getattr(torch, WIRES[self.server_kind])
        self.scorer = SnapshotScorer(self.policy.model)
        self.draw = draw
        self.rounding = Rounding()

    @torch.no_grad()
    def step(self, size: float, only: str = "") -> None:
        """Move every weight whose name holds `only`."""
        for name, parameter in self.policy.named_parameters():
            if only not in name:
                continue
            rms = 1.0 if "lora" in name else parameter.square().mean().sqrt().clamp_min(1e-3)
            parameter.add_(size * rms * torch.randn(parameter.shape, generator=self.draw))

    def send(self) -> dict[str, Tensor]:
        """What travels."""
        return dict(gather_weights(self.policy, self.wire))

    def score(self, snapshot: dict[str, Tensor]) -> SentScores:
        """What it must score; the rounding is measured once, as in a run."""
        self.scorer.hold(snapshot)
        if not self.rounding.compute:
            kinds = {WIRES[self.server_kind], self.server_kind, self.policy_kind}
            measured = {kind: self.scorer.rounding(self.probe.sequences, kind) for kind in kinds}
            weights = self.scorer.weight_rounding(self.probe.sequences)
            self.rounding = Rounding(measured, weights)
        scores = self.scorer.scores(self.probe.sequences)
        return SentScores(scores, WIRES[self.server_kind], self.rounding)

    def scores(self) -> Scores:
        """What the policy itself gives the probe."""
        if self.policy_kind == "float32":
            return policy_scores(self.policy, self.probe.sequences)[0]
        with torch.no_grad(), _computing_with(self.policy.model, Tensor.bfloat16):
            return [self.policy(torch.tensor(ids))[0].tolist() for ids in self.probe.sequences]


def false_alarms(case: Trainer, update: float, publishes: int) -> dict[str, Any]:
    """Publishes in which nothing is wrong."""
    server = Server(case.policy.model, case.server_kind)
    server_proof = ServerProof(case.probe)
    ratios: dict[str, list[float]] = {"server": [], "policy": []}
    alarms = {"server": 0, "policy": 0}
    for version in range(publishes):
        case.step(update)
        snapshot = case.send()
        sent = case.score(snapshot)
        try:
            reading = server_proof.check(
                "server", version, sent, server.scores(snapshot, case.probe), case.server_kind
            )
            ratios["server"].append(reading.diff / reading.limit)
        except WeightSyncError:
            alarms["server"] += 1
        try:
            diff = check_policy(version, sent, case.scores(), case.policy_kind)
            ratios["policy"].append(diff)
        except WeightSyncError:
            alarms["policy"] += 1
    return {
        "publishes": publishes,
        "alarms": alarms,
        "server_ratio": spread(ratios["server"]),
        "policy_diff": round(statistics.mean(ratios["policy"]), 7),
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Where the ratios lie, and how likely one above 1 is."""
    logs = [math.log(max(ratio, 1e-9)) for ratio in ratios]
    mean, deviation = statistics.mean(logs), max(statistics.stdev(logs), 1e-6)
    return {
        "mean": round(statistics.mean(ratios), 4),
        "largest": round(max(ratios), 4),
        "chance_of_alarm": float(f"{0.5 * math.erfc(-mean / deviation / math.sqrt(2)):.2g}"),
    }


Weights = dict[str, Tensor]


@dataclass
class History:
    """What a fault is made of.

    Attributes:
        start: Weights of the first publish.
        before: Those of the publish before.
        average: A moving average.
        base: The weights without the adapter.
        matrix: A tensor's name.
        other: Another's, of the same shape.
    """

    start: Weights
    before: Weights
    average: Weights
    base: Weights
    matrix: str
    other: str


Fault = Callable[[Weights, History], tuple[Weights, Weights]]
"""Right weights to what is sent and what the server holds."""

FAULTS: dict[str, Fault] = {
    "two tensors swapped": lambda w, h: (w, w | {h.matrix: w[h.other], h.other: w[h.matrix]}),
    "rows of a tensor permuted": lambda w, h: (w, w | {h.matrix: w[h.matrix].roll(1, 0)}),
    "one tensor missing (zero)": lambda w, h: (w, w | {h.matrix: torch.zeros_like(w[h.matrix])}),
    "one tensor stale since the start": lambda w, h: (w, w | {h.matrix: h.start[h.matrix]}),
    "all tensors stale by one publish": lambda w, h: (w, h.before),
    "adapter left out": lambda w, h: (h.base, h.base),
    "average instead of the weights": lambda w, h: (h.average, h.average),
    "a copy from before the step sent": lambda w, h: (h.before, h.before),
}
RIGHT, WRONG = 10, 40
"""Publishes without the fault, then at most so many with it."""


def caught(model: str, server_kind: str, fault: str, update: float) -> str:
    """Which comparison finds a fault, and in which publish with it."""
    case = Trainer(model, server_kind, "float32")
    merged = fault == "adapter left out"
    base = case.send()
    if merged:
        LoRA(rank=4).add_to(case.policy.model)
    server, proof = Server(case.policy.model, server_kind), ServerProof(case.probe)
    matrix = next(n for n in base if "q_proj" in n or "c_attn" in n)
    other = [n for n, t in base.items() if t.shape == base[matrix].shape and n != matrix][-1]
    history = History(base, base, base, base, matrix, other)
    for version in range(1, RIGHT + WRONG + 1):
        case.step(update, only="lora" if merged else "")
        weights = case.send()
        pairs = ((n, history.average[n].float(), t) for n, t in weights.items())
        history.average = {n: (0.9 * a + 0.1 * t.float()).to(t.dtype) for n, a, t in pairs}
        sent_weights, held = weights, weights
        if version > RIGHT:
            sent_weights, held = FAULTS[fault](weights, history)
        sent = case.score(dict(sent_weights))
        where = f"publish {version - RIGHT}"
        try:
            scores = server.scores(held, case.probe)
            proof.check("server", version, sent, scores, server_kind)
        except WeightSyncError:
            return f"by the server's, {where}"
        try:
            check_policy(version, sent, case.scores(), "float32", merged=merged)
        except WeightSyncError:
            return f"by the policy's, {where}"
        history.before = weights
    return "no: the scores moved by less than rounding moves them"


def main() -> None:
    """False alarms first, then planted faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publishes", type=int, default=1000, help="of each case")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": platform.processor() or platform.machine(),
        **versions,
        "false_alarms": {},
        "planted": {},
    }
    for model in MODELS:
        for server_kind in WIRES:
            for update in UPDATES:
                for policy_kind in POLICY_KINDS:
                    name = f"{model}; server {server_kind}; policy {policy_kind}; {update:g}"
                    case = Trainer(model, server_kind, policy_kind)
                    found = false_alarms(case, update, args.publishes)
                    report["false_alarms"][name] = found
                    print(name, json.dumps(found), flush=True)
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for server_kind in WIRES:
        for update in UPDATES:
            name = f"quickstart; server {server_kind}; {update:g}"
            found = {f: caught("quickstart", server_kind, f, update) for f in FAULTS}
            report["planted"][name] = found
            print(name, json.dumps(found, indent=1), flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    totals = [found["alarms"] for found in report["false_alarms"].values()]
    report["total"] = {
        "publishes": args.publishes * len(totals),
        "server_alarms": sum(t["server"] for t in totals),
        "policy_alarms": sum(t["policy"] for t in totals),
    }
    print(json.dumps(report["total"]))
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
