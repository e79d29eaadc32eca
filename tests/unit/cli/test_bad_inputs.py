"""Wrong input of every kind, to every command: one message, exit code 2, and nothing left behind.

A row is a command line; the files that it names are made by `prepare`. None of them costs a
server, a download or a step.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_grpo.cli.launch import engine_command
from lightning_grpo.cli.main import main
from lightning_grpo.engine.__main__ import main as engine

MINE = """\
from abc import ABC, abstractmethod

import lightning as L

from lightning_grpo import GRPOModule, RolloutDataModule


class Unfinished(GRPOModule, ABC):
    @abstractmethod
    def mine(self): ...


class Greedy(GRPOModule):
    def __init__(self, *args, **kwargs):
        raise KeyError("no such thing")


class Leaves(L.Callback):
    def __init__(self):
        raise SystemExit(0)


class Ends(L.Callback):
    def __init__(self):
        raise GeneratorExit


class Broken(L.Callback):
    def __init__(self, n: int = 1):
        self.n = [][n]


class NotACallback:
    pass


def reward(completion):
    return 1.0


def asks_for_more(completion, nowhere_column):
    return 1.0


number = 3
"""

TRAINER = "trainer: {accelerator: cpu, max_steps: 1, logger: true}\n"
FILES: dict[str, bytes | str] = {
    "mine.py": MINE,
    "leaves.py": "import sys\nsys.exit(0)\n",
    "leaves_empty.py": "raise SystemExit\n",
    "generates.py": "raise GeneratorExit\n",
    "cancels.py": "class Mine(BaseException):\n    pass\nraise Mine('no')\n",
    "interrupts.py": "import os\nos.nowhere\n",
    "deep.py": "def f(n):\n    return f(n + 1)\nf(0)\n",
    "syntax.py": "def f(:\n",
    "zero.py": b"\0\0\0",
    "latin.py": b"x = '\xe9'\n",
    "script/script.py": "import datasets\n",
    "script/data.txt": "x\n",
    "empty/.keep": "",
    "merge.yaml": TRAINER + "model:\n  <<: 3\n",
    "merge_list.yaml": TRAINER + "model:\n  <<: [1, 2]\n",
    "merge_text.yaml": "<<: text\n",
    "include.yaml": TRAINER + "model: !include other.yaml\n",
    "include_list.yaml": TRAINER + "data: !include [a.yaml, b.yaml]\n",
    "include_map.yaml": TRAINER + "data: !thing {a: 1}\n",
    "python_name.yaml": "model: !!python/name:os.system\n",
    "python_object.yaml": "model:\n  loss: !!python/object/apply:os.getcwd []\n",
    "bad_int.yaml": "trainer: {max_steps: !!int abc}\n",
    "bad_date.yaml": "trainer: {max_steps: 2020-13-45}\n",
    "bad_binary.yaml": "trainer: {max_steps: !!binary é}\n",
    "bad_float.yaml": "trainer: {max_steps: !!float x}\n",
    "set.yaml": "trainer: !!set {max_steps}\n",
    "list_key.yaml": "trainer: {[1, 2]: 3}\n",
    "map_key.yaml": "trainer:\n  ? {a: 1}\n  : 3\n",
    "int_key.yaml": "trainer: {3: 3}\n",
    "null_key.yaml": "trainer: {~: 3}\n",
    "anchor.yaml": "trainer: *nowhere\n",
    "self.yaml": "trainer: &t\n  a: *t\n",
    "two.yaml": "trainer: {}\n---\nmodel: {}\n",
    "tab.yaml": "trainer:\n\tmax_steps: 1\n",
    "brace.yaml": "trainer: {max_steps: 1\n",
    "list.yaml": "- 1\n",
    "text.yaml": "hello\n",
    "number.yaml": "3\n",
    "binary.yaml": bytes(range(256)),
    "zeros.yaml": b"\0" * 64,
    "utf16.yaml": TRAINER.encode("utf-16"),
    "utf16le.yaml": TRAINER.encode("utf-16-le"),
    "utf32.yaml": TRAINER.encode("utf-32"),
    "latin1.yaml": "# caf\xe9\n".encode("latin-1") + TRAINER.encode(),
    "control.yaml": "trainer: {max_steps: \x07}\n",
    "deep.yaml": "trainer: " + "[" * 3000 + "]" * 3000 + "\n",
    "long_key.yaml": "k" * 5000 + ": 3\n",
    "duplicate.yaml": "trainer: {max_steps: 1, max_steps: 2}\n",
    "garbage.ckpt": b"garbage" * 99,
    "empty.ckpt": b"",
    "zip.ckpt": b"PK\x03\x04" + b"\0" * 99,
    "rows.jsonl": '{"completion": "x", "prompt": "p"}\n',
    "no_completion.jsonl": '{"prompt": "p"}\n',
    "numbers.jsonl": "1\n2\n",
    "list.json": "[1, 2]\n",
    "map.json": "{}\n",
    "broken.jsonl": "{nope\n",
    "empty.jsonl": "",
    "latin1.jsonl": b'{"completion": "\xe9"}\n',
    "garbage.parquet": b"garbage",
    "half.parquet": b"PAR1" + b"\0" * 40 + b"PAR1",
    "table.csv": "a,b\n",
    "a_file": "x",
    "runs_file/runs": "x",
}
GOOD = "fit --config quickstart.yaml"
CONFIGS = [name for name in FILES if name.endswith(".yaml")]

COMMANDS = [
    *(f"fit --config {name}" for name in CONFIGS),
    *(f"{command} --config utf16.yaml" for command in ("validate", "test", "launch slurm")),
    *(
        f"launch slurm --config {name}"
        for name in ("merge.yaml", "binary.yaml", "python_name.yaml")
    ),
    # Files and folders.
    "fit",
    "fit --config",
    "fit --config nowhere.yaml",
    "fit --config empty",
    "fit --config secret.yaml",
    "fit --config a_pipe.yaml/x",
    f"{GOOD} --config nowhere.yaml",
    f"{GOOD} --trainer.default_root_dir a_file",
    f"{GOOD} --trainer.default_root_dir a_file/below",
    f"{GOOD} --trainer.default_root_dir sealed/below",
    f"{GOOD} --trainer.default_root_dir /proc/nowhere",
    f"{GOOD} --ckpt_path nowhere.ckpt",
    f"{GOOD} --ckpt_path garbage.ckpt",
    f"{GOOD} --ckpt_path empty.ckpt",
    f"{GOOD} --ckpt_path zip.ckpt",
    f"{GOOD} --ckpt_path empty",
    f"{GOOD} --ckpt_path last",
    f"{GOOD} --ckpt_path best",
    f"{GOOD} --ckpt_path hpc",
    f"{GOOD} --trainer.default_root_dir s3://bucket/runs",
    f"{GOOD} --trainer.default_root_dir=",
    f"{GOOD} --trainer.max_steps 0",
    f"{GOOD} --data.prompts.path /",
    f"{GOOD} --data.prompts.path=",
    f"{GOOD} --data.prompts.path script",
    f"{GOOD} --data.prompts.path empty",
    f"{GOOD} --data.prompts.path a_file",
    f"{GOOD} --data.prompts.path table.csv",
    f"{GOOD} --data.prompts.path nowhere.jsonl",
    f"{GOOD} --data.prompts.path garbage.parquet",
    f"{GOOD} --data.prompts.path half.parquet",
    f"{GOOD} --data.prompts.path broken.jsonl",
    f"{GOOD} --data.prompts.path empty.jsonl",
    f"{GOOD} --data.prompts.path numbers.jsonl",
    f"{GOOD} --data.prompts.path latin1.jsonl",
    f"{GOOD} --data.prompts.path shipped:nowhere",
    f"{GOOD} --data.prompts.column nowhere",
    f"{GOOD} --data.prompts.limit 0",
    f"{GOOD} --data.prompts.limit -1",
    f"{GOOD} --model.model a_file",
    f"{GOOD} --model.model empty",
    f"{GOOD} --model.model shipped:nowhere",
    f"{GOOD} --model.model ''",
    # The user's own code.
    f"{GOOD} --model mine.Unfinished",
    f"{GOOD} --model mine.Greedy",
    f"{GOOD} --model mine.nowhere",
    f"{GOOD} --model mine.number",
    f"{GOOD} --model mine",
    f"{GOOD} --model leaves.Module",
    f"{GOOD} --model leaves_empty.Module",
    f"{GOOD} --model generates.Module",
    f"{GOOD} --model cancels.Module",
    f"{GOOD} --model interrupts.Module",
    f"{GOOD} --model syntax.Module",
    f"{GOOD} --model zero.Module",
    f"{GOOD} --model latin.Module",
    f"{GOOD} --model deep.Module",
    f"{GOOD} --model ..Module",
    f"{GOOD} --data leaves.Data",
    f"{GOOD} --trainer.callbacks+ leaves.Callback",
    f"{GOOD} --trainer.callbacks+ mine.Leaves",
    f"{GOOD} --trainer.callbacks+ mine.Broken",
    f"{GOOD} --trainer.callbacks+ mine.Ends",
    f"{GOOD} --trainer.callbacks+ mine.NotACallback",
    f"{GOOD} --trainer.callbacks+ mine.Broken --trainer.callbacks.n x",
    f"{GOOD} --trainer.logger leaves.Logger",
    f"{GOOD} --data.workflow.init_args.reward leaves.f",
    f"{GOOD} --data.workflow.init_args.reward generates.f",
    f"{GOOD} --data.workflow.init_args.reward mine.number",
    f"{GOOD} --data.workflow.init_args.reward mine.asks_for_more",
    f"{GOOD} --data.workflow.init_args.reward 3",
    f"{GOOD} --data.keep_group leaves.f",
    f"{GOOD} --model.optimizer leaves.Adam",
    f"{GOOD} --model.optimizer mine.number",
    f"{GOOD} --model.optimizer.lr -1",
    f"{GOOD} --model.optimizer.lr .nan",
    f"{GOOD} --model.loss leaves.Loss",
    f"{GOOD} --data.servers mine.NotACallback",
    # Numbers of the trainer.
    f"{GOOD} --trainer.val_check_interval 0",
    f"{GOOD} --trainer.val_check_interval -1",
    f"{GOOD} --trainer.val_check_interval 0.0",
    f"{GOOD} --trainer.val_check_interval .nan",
    f"{GOOD} --trainer.val_check_interval .inf",
    f"{GOOD} --trainer.val_check_interval 1.5",
    f"{GOOD} --trainer.val_check_interval 1000000000000",
    f"{GOOD} --trainer.check_val_every_n_epoch 0",
    f"{GOOD} --trainer.check_val_every_n_epoch -1",
    f"{GOOD} --trainer.max_steps -2",
    f"{GOOD} --trainer.max_steps 1.5",
    f"{GOOD} --trainer.max_epochs -2",
    f"{GOOD} --trainer.max_time soon",
    f"{GOOD} --trainer.max_time 00:00",
    f"{GOOD} --trainer.gradient_clip_val -1",
    f"{GOOD} --trainer.gradient_clip_val .nan",
    f"{GOOD} --trainer.gradient_clip_val .inf",
    f"{GOOD} --trainer.gradient_clip_algorithm x",
    f"{GOOD} --trainer.log_every_n_steps -1",
    f"{GOOD} --trainer.limit_train_batches -1",
    f"{GOOD} --trainer.limit_train_batches 1.5",
    f"{GOOD} --trainer.limit_train_batches 0",
    f"{GOOD} --trainer.limit_val_batches .nan",
    f"{GOOD} --trainer.limit_val_batches -0.5",
    f"{GOOD} --trainer.num_sanity_val_steps -2",
    f"{GOOD} --trainer.accumulate_grad_batches 0",
    f"{GOOD} --trainer.devices 0",
    f"{GOOD} --trainer.devices -1",
    f"{GOOD} --trainer.devices x",
    f"{GOOD} --trainer.devices 100000",
    f"{GOOD} --trainer.num_nodes 0",
    f"{GOOD} --trainer.num_nodes -1",
    f"{GOOD} --trainer.accelerator x",
    f"{GOOD} --trainer.accelerator gpu",
    f"{GOOD} --trainer.strategy x",
    f"{GOOD} --trainer.precision x",
    f"{GOOD} --trainer.precision 16-true",
    f"{GOOD} --trainer.logger x",
    f"{GOOD} --trainer.callbacks x",
    f"{GOOD} --trainer.plugins x",
    f"{GOOD} --trainer.profiler x",
    f"{GOOD} --trainer.fast_dev_run -1",
    f"{GOOD} --trainer.overfit_batches -1",
    f"{GOOD} --seed_everything -1",
    f"{GOOD} --seed_everything 1e30",
    f"{GOOD} --seed_everything 99999999999",
    f"{GOOD} --seed_everything x",
    # Numbers of ours.
    f"{GOOD} --data.batch_size 0",
    f"{GOOD} --data.batch_size .inf",
    f"{GOOD} --data.batch_size 1.5",
    f"{GOOD} --data.group_size 1",
    f"{GOOD} --data.group_size 1000000000",
    f"{GOOD} --data.max_staleness -1",
    f"{GOOD} --data.workflow.init_args.sampling.temperature .inf",
    f"{GOOD} --data.workflow.init_args.sampling.temperature .nan",
    f"{GOOD} --data.workflow.init_args.sampling.temperature -1",
    f"{GOOD} --data.workflow.init_args.sampling.max_new_tokens 0",
    f"{GOOD} --data.workflow.init_args.sampling.max_new_tokens 1000000000",
    f"{GOOD} --model.loss.clip_high .nan",
    f"{GOOD} --model.loss.clip_high -1",
    f"{GOOD} --model.entropy_coefficient .nan",
    f"{GOOD} --model.max_tokens_per_microbatch 0",
    f"{GOOD} --data.limits.request_timeout_s .nan",
    f"{GOOD} --data.servers.num_servers 0",
    f"{GOOD} --data.servers.num_servers 1000000",
    f"{GOOD} --data.servers RunningServers --data.servers.urls '[]'",
    f"{GOOD} --data.servers RunningServers --data.servers.urls '[\"\"]'",
    f"{GOOD} --data.servers RunningServers --data.servers.urls '[http://127.0.0.1:99999]'",
    f"{GOOD} --data.servers RunningServers --data.servers.urls '[ftp://127.0.0.1]'",
    # The command line itself.
    "nowhere",
    "fit nowhere",
    "fit --",
    "fit --config quickstart.yaml nowhere",
    f"{GOOD} --=3",
    f"{GOOD} --trainer",
    f"{GOOD} --trainer 3",
    f"{GOOD} --trainer.max_steps",
    f"{GOOD} --trainer.max_steps=",
    f"{GOOD} --trainer.max_steps.x 3",
    f"{GOOD} --trainer..max_steps 3",
    f"{GOOD} --data.batch_size '[1, 2'",
    f"{GOOD} --model 3",
    f"{GOOD} --data '{{'",
    f"{GOOD} --data.prompts '!!python/name:os.system'",
    f"{GOOD} --data.prompts '<<: 3'",
    f"{GOOD} --data.prompts '{{<<: 3}}'",
    f"{GOOD} --data.prompts '!include x'",
    # The other commands.
    "show",
    "show nowhere",
    "show empty",
    "show a_file",
    "show garbage.parquet",
    "show secret.yaml",
    "show empty --limit x",
    "show empty --limit -1",
    "show empty --sort x",
    "show empty --nope",
    "export",
    "export garbage.ckpt",
    "export nowhere.ckpt out",
    "export garbage.ckpt out",
    "export empty.ckpt out",
    "export zip.ckpt out",
    "export empty out",
    "export garbage.ckpt a_file",
    "export garbage.ckpt a_file/below",
    "export garbage.ckpt script",
    "score",
    "score --reward mine.reward",
    "score --reward mine.reward --data nowhere.jsonl",
    "score --reward mine.reward --data no_completion.jsonl",
    "score --reward mine.reward --data numbers.jsonl",
    "score --reward mine.reward --data list.json",
    "score --reward mine.reward --data map.json",
    "score --reward mine.reward --data broken.jsonl",
    "score --reward mine.reward --data empty.jsonl",
    "score --reward mine.reward --data latin1.jsonl",
    "score --reward mine.reward --data garbage.parquet",
    "score --reward mine.reward --data empty",
    "score --reward mine.reward --data rows.jsonl --processes -1",
    "score --reward mine.reward --data rows.jsonl --timeout-s nan",
    "score --reward mine.reward --data rows.jsonl --timeout-s -1",
    "score --reward mine.reward --data rows.jsonl --limit -1",
    "score --reward mine.number --data rows.jsonl",
    "score --reward mine.nowhere --data rows.jsonl",
    "score --reward nowhere.f --data rows.jsonl",
    "score --reward mine.asks_for_more --data rows.jsonl",
    "score --reward leaves.f --data rows.jsonl",
    "score --reward generates.f --data rows.jsonl",
    "score --reward syntax.f --data rows.jsonl",
    "score --reward '' --data rows.jsonl",
    "replay --from",
    "replay --from nowhere",
    "replay --from empty",
    "replay --from garbage.parquet",
    "replay --from garbage.parquet --config quickstart.yaml",
    "replay --from empty --config quickstart.yaml",
    "replay --config quickstart.yaml",
    "launch nowhere",
    "launch slurm",
    "launch slurm --config nowhere.yaml",
    "launch slurm --config quickstart.yaml --train-nodes 0",
    "launch slurm --config quickstart.yaml --train-nodes -1",
    "launch slurm --config quickstart.yaml --train-nodes x",
    "launch slurm --config quickstart.yaml --server-nodes -1",
    "launch slurm --config quickstart.yaml --gpus-per-node -1",
    "launch slurm --config quickstart.yaml --ranks-per-node 0",
    "launch slurm --config quickstart.yaml --folder a_file --submit",
    "launch slurm --config quickstart.yaml --data.servers 3",
    "launch ray --config quickstart.yaml --train-nodes 0",
    "launch ray --config quickstart.yaml --max-restarts -1",
    "launch server-node",
    "launch server-node --folder a_file/x",
    "launch server-node --folder empty --node x",
    "install-server --use nowhere",
    "install-server --use a_file",
    "install-server --use empty",
    "install-server --nope",
    "install-server --folder a_file",
    "serve nowhere",
    "serve a_file",
    "serve empty",
    "serve shipped:quickstart --port 99999",
    "serve shipped:quickstart --port -1",
    "serve shipped:quickstart --port x",
    "serve shipped:quickstart --max-running-requests 0",
    "serve shipped:quickstart --kv-memory-mb -1",
    "serve shipped:quickstart --nope",
    "serve --port 0",
]


AS_ROOT = os.geteuid() == 0
MOST_LINES = 4


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[Path]:
    """The files that the rows name; modules among them are forgotten afterwards."""
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "secret.yaml").touch(mode=0)
    (tmp_path / "sealed").mkdir(mode=0o500)
    yield tmp_path
    for name in FILES:
        if name.endswith(".py"):
            sys.modules.pop(Path(name).stem, None)


def ended(line: str) -> object:
    """The exit code of a command line; `serve` becomes the engine's process, here it is called."""
    words = shlex.split(line)
    try:
        if words[0] == "serve":
            return engine(engine_command(words[1:])[3:])
        return main(words)
    except SystemExit as leaving:
        return leaving.code


def contents(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.parent.name != "__pycache__"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_input_is_one_message_with_exit_code_2_and_leaves_nothing(prepared, capfd, line):
    if AS_ROOT and ("sealed" in line or "secret" in line):
        pytest.skip("root may read and write everything")
    before = contents(prepared)
    assert ended(line) == 2
    said = capfd.readouterr().err.strip().splitlines()
    message = [number for number, text in enumerate(said) if text.startswith("error: ")]
    assert len(message) == 1, said
    assert len(said) - message[0] <= MOST_LINES, said
    assert {path for path in contents(prepared) - before if path.name != "__pycache__"} == set()


def test_leaving_with_status_0_in_the_middle_of_a_run_is_not_to_have_trained(prepared, capfd):
    (prepared / "leaves_later.py").write_text(
        "import sys\nimport lightning as L\n"
        "class Callback(L.Callback):\n"
        "    def setup(self, trainer, pl_module, stage):\n        sys.exit(0)\n"
    )
    assert ended(f"{GOOD} --trainer.callbacks+ leaves_later.Callback") == 1
    said = capfd.readouterr().err
    assert "the run did not come to its end: SystemExit: 0 (leaves_later.py, line 5)" in said
