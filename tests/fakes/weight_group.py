"""The server's end of a weight group, joined as SGLang joins, without torch's global state."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=5)


def join_group(body: dict[str, Any]) -> Any:
    store = dist.TCPStore(
        body["master_address"], body["master_port"], body["world_size"], False, TIMEOUT
    )
    for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], TIMEOUT)


def receive(group: Any, body: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As SGLang's FlattenedTensorBucket: bytes end to end, in the order of the names."""
    assert body["load_format"] == "flattened_bucket"
    dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
    sizes = [
        torch.Size(shape).numel() * dtype.itemsize
        for shape, dtype in zip(body["shapes"], dtypes, strict=True)
    ]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([flat], options).wait()
    pieces = flat.split(sizes)
    return {
        name: piece.view(dtype).reshape(shape)
        for name, piece, dtype, shape in zip(
            body["names"], pieces, dtypes, body["shapes"], strict=True
        )
    }
