"""The command line on GPUs: what a user runs, from the first step to an exported model.

Servers are the real SGLang where `SGLANG_SITE` names a folder with its packages or
`lightning-grpo install-server` made its environment, else the embedded engine. One SGLang serves
all tests of this module but the one that starts its own.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_grpo.servers.sglang import SGLangServers, remembered_python
from lightning_grpo.shipped import resolve_path
from tests.fakes.ranks import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(400),
]

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# A file, as the installed command is one: Lightning starts the other ranks by its name.
PROGRAM = "import sys\nfrom lightning_grpo.cli.main import main\nsys.exit(main())\n"
# Packages that are carried to a machine may lack kernels: these need none of their own.
FLAGS = {"attention-backend": "triton", "sampling-backend": "pytorch"}


def server_python(folder: Path) -> str | None:
    """The interpreter that has SGLang; None where there is none."""
    site = os.environ.get("SGLANG_SITE")
    if site is None:
        return "auto" if remembered_python() is not None else None
    script = folder / "server-python"
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH={site}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Options that name the servers."""
    folder = tmp_path_factory.mktemp("servers")
    python = server_python(folder)
    if python is None:
        yield ["--data.servers", "lightning_grpo.EmbeddedServers"]
        return
    started = SGLangServers(
        1,
        devices=[torch.cuda.device_count() - 1],
        memory_fraction=0.2,
        python=python,
        flags={**FLAGS, "max-running-requests": 256, "cuda-graph-max-bs-decode": 256},
    )
    started.api_key = ""
    (handle,) = started.start(resolve_path("shipped:quickstart"), folder)
    try:
        yield [
            *("--data.servers", "lightning_grpo.RunningServers"),
            *("--data.servers.urls", f'["{handle.url}"]'),
        ]
    finally:
        started.stop()


class Command:
    """`lightning-grpo` in a folder."""

    def __init__(self, folder: Path, servers: list[str]) -> None:
        self.folder = folder
        self.servers = servers
        self.program = folder / "lightning-grpo"
        self.program.write_text(PROGRAM)

    def __call__(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, str(self.program), *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
            timeout=360,
        )
        screen = done.stdout + done.stderr
        assert done.returncode == status, screen
        return screen

    def fit(self, *options: str, steps: int = 4, servers: list[str] | None = None) -> str:
        return self(
            *("fit", "--config", "quickstart.yaml", "--trainer.accelerator", "gpu"),
            *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", "4"),
            *("--trainer.log_every_n_steps", "1", "--data.val_prompts.limit", "20"),
            *(self.servers if servers is None else servers),
            *options,
        )

    def column(self, name: str) -> list[float]:
        found = []
        for file in sorted(self.folder.rglob("metrics*.csv"), key=lambda f: f.stat().st_mtime):
            with file.open() as rows:
                found += [float(row[name]) for row in csv.DictReader(rows) if row.get(name)]
        return found

    def checkpoint(self) -> str:
        saved = [path for path in self.folder.rglob("*.ckpt") if not path.is_symlink()]
        return str(max(saved, key=lambda path: path.stat().st_mtime))


@pytest.fixture
def command(tmp_path, servers):
    return Command(tmp_path, servers)


def quiet(screen: str) -> None:
    """Nothing on the screen that a user can do nothing about."""
    for noise in ("Traceback", "sync_dist", "Tensor Cores", "stamina", "NCCL WARN", "Warning:"):
        assert noise not in screen, screen


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_a_run_validates_saves_resumes_is_validated_and_exported(command, strategy):
    options = ("--trainer.strategy", strategy, "--trainer.devices", "1")
    screen = command.fit(*options)
    quiet(screen)
    assert screen.count("held-out at step") == 2
    quiet(command.fit(*options, "--ckpt_path", "last", steps=6))
    assert len(command.column("reward/mean")) == 6
    assert all(0 < share < 1 for share in command.column("throughput/mfu"))
    assert len(command.column("throughput/mfu")) == 6
    # Proved at each step. Where a policy computes in the wire's dtype, nothing is rounded.
    for proof in ("mismatch/probe", "mismatch/sent"):
        assert len(command.column(proof)) >= 6
        assert 0 <= max(command.column(proof)) < 0.1
    saved = command.checkpoint()
    screen = command(
        *("validate", "--config", "quickstart.yaml", "--trainer.accelerator", "gpu"),
        *("--data.val_prompts.limit", "20", "--ckpt_path", saved, *options, *command.servers),
    )
    assert "held-out at step 6" in screen
    command("export", saved, str(command.folder / "exported"))
    assert (command.folder / "exported" / "model.safetensors").exists()


def test_an_adapter_trains_and_reaches_the_servers(command):
    pytest.importorskip("peft")
    quiet(command.fit("--trainer.strategy", "fsdp2", "--model.lora", "{rank: 8}"))
    assert len(command.column("reward/mean")) == 4


def test_weights_go_by_disk_where_that_is_asked(command):
    by_disk = '[{"class_path": "lightning_grpo.WeightSync", "init_args": '
    by_disk += '{"transport": {"class_path": "lightning_grpo.DiskTransport"}}}]'
    quiet(command.fit("--trainer.strategy", "fsdp2", "--trainer.callbacks", by_disk))
    assert list(command.folder.rglob("weights/v000004"))


def test_a_run_starts_its_own_servers_and_shares_the_gpu_with_them(command, tmp_path):
    python = server_python(tmp_path)
    if python is None:
        pytest.skip("needs SGLang")
    own = [
        *("--data.servers", "lightning_grpo.SGLangServers", "--data.servers.python", python),
        *("--data.servers.flags", str(FLAGS).replace("'", '"')),
    ]
    screen = command.fit("--trainer.strategy", "fsdp2", servers=own)
    quiet(screen)
    assert "256 requests in flight, 192 decoded at once, all by graphs" in screen
    assert len(command.column("reward/mean")) == 4


@two_gpus
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_does(command, strategy):
    """What two ranks trained on is trained on again by one: a server's samples differ each time."""
    options = ("--trainer.strategy", strategy, "--trainer.devices")
    quiet(command.fit(*options, "2"))
    together = command.column("policy/grad_norm")
    (run,) = command.folder.glob("runs/*/version_0")
    command("replay", "--from", str(run), *options, "1", "--trainer.default_root_dir", "alone")
    (metrics,) = command.folder.glob("alone*/**/metrics.csv")
    with metrics.open() as rows:
        alone = [float(row["policy/grad_norm"]) for row in csv.DictReader(rows)]
    assert len(together) == len(alone) == 4
    assert alone[0] == pytest.approx(together[0], rel=0.02)


@two_gpus
def test_weights_go_by_nccl_to_a_server_on_another_gpu(command):
    quiet(command.fit("--trainer.strategy", "fsdp2", "--trainer.devices", "[0]"))
    assert len(command.column("reward/mean")) == 4
