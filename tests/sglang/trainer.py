"""The trainer's side of a weight group, step by step as the package's transport does it."""

from __future__ import annotations

import uuid
from typing import Any

import torch

from lightning_grpo.weights.gather import make_buckets
from lightning_grpo.weights.process_group import WeightGroup
from tests.sglang.server import Server


class Trainer:
    """Rank 0 of a gloo group with one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        name = f"weights-{uuid.uuid4().hex[:8]}"
        self.group = WeightGroup(name, "gloo", 2, "127.0.0.1", timeout_s=30.0)
        joining = server.start(server.post, "/init_weights_update_group", **self.group.invitation())
        self.group.join([])
        assert joining.result(30)["success"] is True

    def send(self, tensors: dict[str, torch.Tensor], **body: Any) -> tuple[int, Any]:
        """One broadcast for each tensor."""
        request = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "group_name": self.group.name,
            "flush_cache": False,
        }
        answer = self._ask(request | body)
        for tensor in tensors.values():
            self.group.broadcast(tensor)
        return answer.result(30)

    def send_buckets(
        self, tensors: dict[str, torch.Tensor], label: str | None, bucket_bytes: int = 1 << 30
    ) -> list[tuple[int, Any]]:
        """Flat buckets; the label goes with the last."""
        buckets = make_buckets(tensors, bucket_bytes)
        answers = []
        for index, bucket in enumerate(buckets):
            last = index == len(buckets) - 1
            answer = self._ask(bucket.request(self.group.name, label if last else None))
            self.group.broadcast(bucket.flat)
            answers.append(answer.result(30))
        return answers

    def close(self) -> None:
        self.server.post("/destroy_weights_update_group", group_name=self.group.name)
        self.group.abort()

    def _ask(self, body: dict[str, Any]) -> Any:
        return self.server.start(self.server.request, "/update_weights_from_distributed", body)
