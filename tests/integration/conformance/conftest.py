"""The same tests on two servers: the embedded engine, always, and the real SGLang, on the CPU.

The real one needs `make test-sglang` (or the marker `sglang`, and an environment made by
`python -m tests.sglang.environment`). What it cannot do on a CPU, and is therefore not compared:

- `/update_weights_from_tensor` by CUDA IPC, `/update_weights_from_ipc` (handles of GPU memory);
- NCCL groups (gloo stands in), CUDA graphs, the overlap schedule;
- layers that carry a state: their kernels are compiled, `sgl_kernel.mamba` and operators of torch;
- `/weights_checker` (it asks the GPU to synchronize) and `/get_weights_by_name` (not of Qwen);
- `--enable-lora` (the server dies at its start: pinned memory) and the real release of memory;
- bf16 at a speed worth measuring.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_grpo.servers.process import OwnedServers
from tests.fakes.forked_servers import ForkedServers
from tests.sglang.engines import REAL, real_servers
from tests.sglang.server import Server


@pytest.fixture(scope="session", params=["embedded", REAL])
def shared_server(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One process of each kind for all tests."""
    kind: str = request.param
    servers: OwnedServers = ForkedServers(max_running_requests=64)
    if kind != "embedded":
        servers = real_servers(disable_radix_cache="without-prefixes" in kind)
    server = Server(kind, servers, model_folder, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The server, generating, with the first weights under their first name and nothing to do."""
    yield shared_server
    shared_server.reset()
