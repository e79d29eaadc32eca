"""`lightning-grpo plan` for machines that are only named, and for runs that were."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from transformers import Qwen2Config

from lightning_grpo.cli.main import main
from lightning_grpo.cli.sources import collect
from lightning_grpo.cli.trainer_cli import build_run
from lightning_grpo.cli.unstarted import read_facts
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.module import GRPOModule
from lightning_grpo.plan.hardware import named_machine
from lightning_grpo.plan.plan import layout_of, memory_of
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.session.material import open_material
from lightning_grpo.shipped import resolve_config, resolve_path
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy

ON_GPUS = [
    *("--config", "quickstart.yaml", "--trainer.accelerator", "gpu"),
    *("--trainer.strategy", "fsdp2", "--data.servers", "lightning_grpo.SGLangServers"),
    *("--data.prompts.limit", "20", "--data.val_prompts.limit", "20"),
]
SEVEN_B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "architectures": ["Qwen2ForCausalLM"],
}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory):
    """A model of that shape without weights, and the quickstart's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "seven-b"
    Qwen2Config(**SEVEN_B).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(Path(resolve_path("shipped:quickstart")) / name, folder / name)
    return str(folder)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """The exit status and the plan of some words."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main(["plan", *words, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_a_run_on_a_cpu_is_planned_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", "quickstart.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "It runs on the CPU. A step takes about" in printed
    assert "completions of 28 tokens on average, 56 at most" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_gpus_serve_and_train_as_fit_would_have_them(planned):
    status, plan = planned(*ON_GPUS, "--gpus", "3", "--gpu", "a100")
    assert status == 0
    roles = [(gpu["index"], bool(gpu["training"]), gpu["num_servers"]) for gpu in plan["gpus"]]
    assert roles == [(0, True, 0), (1, False, 1), (2, False, 1)]
    _, shared = planned(*ON_GPUS, "--gpus", "1", "--gpu", "a100")
    (gpu,) = shared["gpus"]
    assert gpu["training"]
    assert gpu["num_servers"] == 1


@pytest.mark.parametrize("gpus", ["1", "4"])
def test_a_page_is_as_wide_as_a_terminal_and_names_the_limit(tmp_path, monkeypatch, capsys, gpus):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *ON_GPUS, "--gpus", gpus, "--gpu", "rtx-6000-ada"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert ("The limit is" in printed) == (gpus == "4")
    assert ("GPUs 0, 1 train" in printed) == (gpus == "4")
    assert ("GPU 0 trains and serves" in printed) == (gpus == "1")


def test_servers_are_those_that_fit_would_start(planned):
    """64 x 8 requests of a small model: two servers on the GPU, each with half of them."""
    _, plan = planned(*ON_GPUS, "--gpus", "1", "--gpu", "h100", "--data.batch_size", "64")
    assert plan["servers"][:3] == [
        "512 requests in flight",
        "384 decoded at once, all by graphs",
        "context 192",
    ]
    assert SGLangServers.machine is None


def test_flags_and_limits_of_the_users_are_heeded(planned):
    _, plan = planned(
        *(*ON_GPUS, "--gpus", "2", "--gpu", "h100", "--data.batch_size", "64"),
        *("--data.servers.flags", '{"max-running-requests": 32}'),
    )
    assert "32 decoded at once, all by graphs" in plan["servers"]


def test_a_fraction_of_the_users_own_counts_as_it_is(planned):
    words = [*ON_GPUS, "--gpus", "1", "--gpu", "h100", "--data.servers.memory_fraction"]
    status, plan = planned(*words, "0.5")
    assert status == 0
    assert plan["gpus"][0]["serving"]["weights and cache"] == (81_559 << 20) // 2
    status, plan = planned(*words, "0.97")
    assert status == 1
    assert "for the servers' weights and cache" in plan["problems"][0]


def test_gpus_that_all_train_and_serve_take_turns(planned):
    words = [*ON_GPUS, "--gpus", "2", "--gpu", "h100"]
    both = ["--data.servers.devices", "[0,1]", "--trainer.devices", "[0,1]"]
    _, apart = planned(*words)
    _, shared = planned(*words, *both)
    assert all(gpu["training"] and gpu["num_servers"] for gpu in shared["gpus"])
    parts = shared["parts"]
    assert parts["forward_backward"] > 1.5 * apart["parts"]["forward_backward"]
    alone = parts["forward_backward"] + parts["waiting"] - parts["rollout"]
    assert alone == pytest.approx(apart["parts"]["forward_backward"], rel=0.1)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """What `nvidia-smi` says of two GPUs of this name."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(name):
        tool = tmp_path / "bin/nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            "#!/bin/sh\ncase $* in *index*) echo 0; echo 1;; *total*) echo 23034;; "
            f"*) echo {name};; esac\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    return install


def test_the_gpus_of_this_machine_are_those_that_its_driver_names(planned, driver):
    driver("NVIDIA L4")
    status, plan = planned(*ON_GPUS)
    assert status == 0
    assert [gpu["index"] for gpu in plan["gpus"]] == [0, 1]
    assert any("L4:" in text for text in plan["assumed"])


def test_of_a_gpu_that_nobody_knows_the_memory_is_planned_alone(planned, driver, capsys):
    driver("NVIDIA X9")
    status, plan = planned(*ON_GPUS)
    assert (status, plan["parts"], plan["fits"]) == (0, None, True)
    assert main(["plan", *ON_GPUS]) == 0
    assert "How long a step takes is not known" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "machine",
    [
        ["--gpus", "8", "--gpu", "h100"],
        ["--gpus", "2", "--gpu", "h200"],
    ],
)
def test_what_is_named_to_change_first_makes_it_fit(planned, seven_b, machine):
    words = [*ON_GPUS, "--model.model", seven_b, *machine]
    words += ["--data.batch_size", "512", "--model.max_tokens_per_microbatch", "32768"]
    status, plan = planned(*words)
    assert status == 1
    assert not plan["fits"]
    assert plan["parts"] is None
    assert "GiB" in plan["problems"][0]
    for change in plan["changes"]:
        status, changed = planned(*words, *shlex.split(change["options"]))
        assert status == 0, changed["problems"]
        taken = max(sum((*g["training"].values(), *g["serving"].values())) for g in changed["gpus"])
        assert taken == change["taken"]
        assert changed["parts"]["step"] == pytest.approx(change["step"])


def test_where_nothing_helps_it_is_said(tmp_path, monkeypatch, capsys, seven_b):
    monkeypatch.chdir(tmp_path)
    words = [*ON_GPUS, "--model.model", seven_b, "--gpus", "1", "--gpu", "rtx-4090"]
    assert main(["plan", *words]) == 1
    assert "more GPUs, or a smaller model" in " ".join(capsys.readouterr().out.split())


def test_settings_that_need_ranks_are_those_of_the_ranks_that_are_planned(planned, seven_b):
    words = [*ON_GPUS, "--model.model", seven_b, "--gpus", "8", "--gpu", "h200"]
    words += ["--model.max_tokens_per_microbatch", "2048"]
    rows = ["--trainer.strategy", "lightning_grpo.FSDP2Strategy"]
    rows += ["--trainer.strategy.shard_size", "2", "--trainer.strategy.sequence_parallel_size", "2"]
    (_, alone), (_, together) = planned(*words), planned(*words, *rows)
    alone, together = (plan["gpus"][0]["training"] for plan in (alone, together))
    assert together["activations"] == pytest.approx(alone["activations"] / 2)
    assert together["weights"] == pytest.approx(2 * alone["weights"])


def test_what_is_named_to_go_faster_does(planned, seven_b):
    words = [*ON_GPUS, "--model.model", seven_b, "--gpus", "8", "--gpu", "h200"]
    words += ["--model.gradient_checkpointing", "true", "--data.max_staleness", "0"]
    _, plan = planned(*words)
    assert plan["fits"]
    assert plan["changes"]
    for change in plan["changes"]:
        assert change["step"] < plan["parts"]["step"]
        _, changed = planned(*words, *shlex.split(change["options"]))
        assert changed["parts"]["step"] == pytest.approx(change["step"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "2"], "`--config` needs a file"),
        (["--config", "none.yaml"], "No config file 'none.yaml' here"),
        ([*ON_GPUS], "Name the machine that is planned for: `--gpus 1 --gpu h200`"),
        ([*ON_GPUS, "--gpus", "0"], "must be >= 1, got 0"),
        ([*ON_GPUS, "--gpu", "h2000"], "Did you mean `h200`?"),
        ([*ON_GPUS, "--gpus", "2", "--trainer.max_step", "3"], "did you mean"),
        ([*ON_GPUS, "--gpus", "1", "--model.model", "no/such"], "a folder that exists or a hub id"),
        ([*ON_GPUS, "--gpus", "2", "--trainer.devices", "3"], "must be of the 2 that there are"),
        (
            [*ON_GPUS, "--gpus", "2", "--trainer.devices", "0"],
            "must be of the 2 that there are, got '0'",
        ),
        ([*ON_GPUS, "--gpus", "2", "--trainer.devices", "all"], "must be `auto` or numbers"),
        ([*ON_GPUS, "--gpus", "2", "--trainer.devices", "[5]"], "must be of the 2 that there are"),
        ([*ON_GPUS, "--gpus", "2", "--data.servers.tp", "4"], "the number of serving GPUs"),
        ([*ON_GPUS, "--gpus", "2", "--trainer.devices", "2"], "must not overlap"),
        (
            [
                *(*ON_GPUS, "--gpus", "6", "--trainer.strategy", "lightning_grpo.FSDP2Strategy"),
                *("--trainer.strategy.sequence_parallel_size", "2"),
            ],
            "`sequence_parallel_size` must divide the number of ranks (3), got 2",
        ),
        (["--check", "nowhere"], "'nowhere' does not exist"),
        (["--check", "."], "holds no run"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


# -- a run that was --------------------------------------------------------------------------------

STEPS = {
    "time/step_s": 0.8,
    "time/wait_rollout_s": 0.2,
    "time/forward_backward_s": 0.3,
    "time/optimizer_s": 0.01,
    "time/weight_sync_s": 0.25,
    "completion/length_mean": 30.0,
    "completion/length_max": 45.0,
    "reward/zero_variance_fraction": 0.25,
    "health/gpu_peak_gb": 5.5,
    "health/rss_gb": 0.7,
}


def short_config():
    """The quickstart's, with a few of its prompts."""
    text = Path(resolve_config("quickstart.yaml")).read_text()
    return text.replace("column: question}", "column: question, limit: 20}")


def write_run(folder, config, machine, steps=8):
    """What `plan --check` reads of a run; the first steps are slow."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    start = {"kind": "start", "at": 1.0, "step": 0, "machine": machine}
    (folder / "timeline.jsonl").write_text(json.dumps(start) + "\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *STEPS])
        writer.writeheader()
        for step in range(1, steps + 1):
            slow = {"time/step_s": 9.0} if step <= 3 else {}
            writer.writerow({"step": step, **STEPS, **slow})


def test_a_run_is_compared_line_by_line(planned, tmp_path):
    write_run(tmp_path / "run", short_config(), "2 CPU cores, 24 GiB")
    status, found = planned("--check", "run")
    assert status == 0
    lines = {line["what"]: line for line in found["lines"]}
    assert lines["a step"]["measured"] == pytest.approx(0.8)  # without the slow ones
    assert lines["weight sync"]["measured"] == pytest.approx(0.25)
    for line in lines.values():
        assert line["ratio"] == pytest.approx(line["predicted"] / line["measured"])
    assert "30 tokens; 75% of the trajectories trained" in found["notes"][0]
    assert lines["memory of the trainer"]["measured"] == 0.7  # of the process, on a CPU


def test_a_run_on_gpus_is_planned_for_the_machine_that_it_names(planned, tmp_path):
    config = short_config().replace("accelerator: cpu", "accelerator: gpu, strategy: fsdp2")
    config = config.replace("EmbeddedServers ", "SGLangServers ")
    config = config.replace(
        "accelerator: gpu, strategy: fsdp2", "accelerator: gpu\n  strategy: fsdp2"
    )
    write_run(tmp_path / "run", config, "2 x NVIDIA H200, 32 CPU cores, 251 GiB")
    status, found = planned("--check", "run")
    assert status == 0
    lines = {line["what"]: line for line in found["lines"]}
    assert lines["memory of the trainer"]["measured"] == 5.5
    assert any("H200" in note for note in found["notes"])
    _, other = planned("--check", "run", "--gpus", "2", "--gpu", "l4")
    assert any("L4" in note for note in other["notes"])


def test_a_run_without_a_step_or_a_config_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "none", "trainer: {}", "2 CPU cores, 24 GiB", steps=0)
    assert main(["plan", "--check", "none"]) == 2
    assert "has no step" in capsys.readouterr().err
    (tmp_path / "none/config.yaml").unlink()
    assert main(["plan", "--check", "none"]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_fit_asks_of_its_servers_what_was_planned(tmp_path, monkeypatch):
    """The load that `fit` hands to its servers, and the one that a plan lays servers out by."""
    monkeypatch.chdir(tmp_path)
    config = Path(resolve_config("quickstart.yaml"))
    words = ["--data.servers", "lightning_grpo.SGLangServers", "--data.batch_size", "64"]
    words += ["--model.max_tokens_per_microbatch", "4096"]
    words += ["--trainer.strategy", "lightning_grpo.FSDP2Strategy"]  # by its class alone
    words += ["--data.prompts.limit", "20", "--data.val_prompts.limit", "20"]
    machine = named_machine(1, "h100", 16)
    facts = read_facts([("quickstart.yaml", config)], words, machine, "h100", None)
    settings = collect([("quickstart.yaml", config)], words)
    with build_run(
        [("quickstart.yaml", config)], words, settings, GRPOModule, RolloutDataModule
    ) as run:
        run.trainer.state.fn = TrainerFn.FITTING
        assert isinstance(run.trainer.strategy, FSDP2Strategy)
        run.trainer.strategy.connect(run.model)
        data = run.datamodule
        data.trainer, data.run_dir = run.trainer, tmp_path
        asked = data.settings_for(run.model.model_path)
        load = open_material(asked).load_of(asked)
    assert load.trainer_bytes > 0
    data.servers.load, data.servers.machine = load, machine
    assert layout_of(facts, memory_of(facts)) == data.servers.layout()
    assert replace(facts.load, trainer_bytes=memory_of(facts).total) == load
