"""What can't work is refused before a server is started, message by message."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from lightning.pytorch.tuner import Tuner

from lightning_grpo.algorithm.losses import GRPOLoss
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError, ServerStartError
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.types import Sampling
from tests.fakes.causal_models import make_model_of
from tests.fakes.loops import NeverServers, make_data, make_module, make_prompts, make_trainer
from tests.fakes.rank_forkserver import python_with_imports
from tests.fakes.ranks import run_ranks
from tests.fakes.tiny_model import make_tiny_model, make_tiny_tokenizer


def raises(completion: str, answer: str) -> float:
    return {}[answer]


def needs_solution(completion: str, solution: str) -> float:
    return float(completion == solution)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reward": needs_solution},
            "reward 'needs_solution' asks for 'solution', which is no column. Columns: ['answer', "
            "'question']",
        ),
        (
            {"prompts": make_prompts(), "sampling": Sampling(max_new_tokens=512)},
            "`sampling.max_new_tokens` must leave room for a prompt in the model's context of 512 "
            "tokens, got 512.",
        ),
        (
            {"sampling": Sampling(max_new_tokens=505)},
            "have more than the 7 tokens that the context leaves beside `max_new_tokens`: row 0 (",
        ),
        (
            {"sampling": Sampling(top_p=0.9)},
            "`sampling.top_p` must be 1.0 in training (it changes the distribution that tokens "
            "come from, which biases the ratio), got 0.9.",
        ),
        ({"reward": raises}, "reward 'raises' failed: KeyError: '"),
        ({"reward": raises}, "in raises: return {}[answer])"),
        ({"sampling": Sampling(top_k=20)}, "`sampling.top_k` must be -1 in training"),
        (
            {"sampling": Sampling(temperature=0.0)},
            "`sampling.temperature` must be > 0 in training (a group of greedy completions has no "
            "variance), got 0.0.",
        ),
        (
            {"prompts": make_prompts(), "batch_size": 2, "val_prompts": make_prompts(2),
             "reward": needs_solution},
            "asks for 'solution'",
        ),
    ],
)  # fmt: skip
def test_prompts_rewards_and_sampling_that_don_t_fit_are_refused(
    tiny_model, tmp_path, settings, message
):
    servers = NeverServers()
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_trainer(tmp_path).fit(make_module(tiny_model), make_data(servers, **settings))
    assert not servers.started
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 2}, "`trainer.accumulate_grad_batches` must be 1"),
        ({"precision": "bf16-true"}, "`trainer.precision` must be `32-true`"),
        ({"reload_dataloaders_every_n_epochs": 1}, "`trainer.reload_dataloaders_every_n_epochs`"),
        ({"max_steps": 3}, "`trainer.max_steps` must be a multiple of 2"),
        ({"limit_train_batches": 5}, "`trainer.limit_train_batches` must be a multiple of 2"),
    ],
)
def test_trainer_settings_that_can_t_work_are_refused(tiny_model, tmp_path, settings, message):
    servers = NeverServers()
    data = make_data(servers, minibatches_per_batch=2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_trainer(tmp_path, **settings).fit(make_module(tiny_model), data)
    assert not servers.started


def test_the_model_is_not_even_looked_at_where_the_trainer_can_t_work(tmp_path):
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match="accumulate_grad_batches"):
        trainer.fit(make_module("no-such-organization/no-such-model"), make_data(NeverServers()))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model", vocab=270)
    make_tiny_tokenizer(320).save_pretrained(folder)
    servers = NeverServers()
    with pytest.raises(ConfigError, match=r"must come with its own tokenizer: .* 320 tok.* 270\."):
        make_trainer(tmp_path).fit(make_module(folder), make_data(servers))
    assert not servers.started


def test_a_folder_without_a_model_is_refused(tmp_path):
    servers, folder = NeverServers(), tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"`model` must be .*empty"):
        make_trainer(tmp_path).fit(make_module(folder), make_data(servers))
    assert not servers.started


class NoLaunches(EmbeddedServers):
    """For models that the engine can't run."""

    def launches(self, model_path, run_dir):
        raise AssertionError("a process was about to be started")


def write_model(folder, kind, **settings):
    """A config alone, with the tokenizer: nothing needs the weights."""
    model = make_model_of(kind, vocab_size=320, **settings)
    model.config.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 60},
    **{"short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}


@pytest.mark.parametrize(
    ("kind", "settings", "servers", "message"),
    [
        ("nemotron", {}, NoLaunches, "must leave its attention to transformers"),
        ("doge", {}, NoLaunches, "gives it a mask of its own"),
        ("gptj", {"rotary_dim": 8}, NoLaunches, "must let transformers choose its attention"),
        ("opt", {}, NoLaunches, "must be one that the embedded engine runs"),
        ("deepseek_v3", {}, NoLaunches, "multi-head latent attention"),
        ("seed_oss", {"quantization_config": {"quant_method": "gptq"}}, NoLaunches, "(gptq)"),
        (
            "phi3",  # answers of 40 tokens would pass the switch
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 60},
            NeverServers,
            "more than the 20 tokens that the context leaves beside `max_new_tokens`",
        ),
    ],
)
def test_a_model_that_can_t_be_trained_or_served_is_refused_before_a_server_is_started(
    kind, settings, servers, message, tmp_path
):
    folder = write_model(tmp_path / "model", kind, **settings)
    data = make_data(servers(), sampling=Sampling(max_new_tokens=40))
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_trainer(tmp_path).fit(make_module(folder), data)


def test_the_learning_rate_finder_and_the_batch_size_scaler_are_refused(tiny_model, tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match="must not hold LearningRateFinder"):
        Tuner(trainer).lr_find(make_module(tiny_model), datamodule=make_data(NeverServers()))
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match="must not hold BatchSizeFinder"):
        Tuner(trainer).scale_batch_size(
            make_module(tiny_model), datamodule=make_data(NeverServers())
        )


def test_predict_is_refused_with_the_way_out(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.predict.*trainer\.validate"):
        make_trainer(tmp_path).predict(make_module(tiny_model), make_data(NeverServers()))


def test_validating_without_held_out_prompts_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"`val_prompts` must be given for `trainer.validate`"):
        make_trainer(tmp_path).validate(make_module(tiny_model), make_data(NeverServers()))


def test_plain_dataloaders_are_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="needs the rollouts of a RolloutDataModule"):
        make_trainer(tmp_path).fit(make_module(tiny_model), train_dataloaders=[1, 2])


def test_a_url_where_nothing_listens_is_named(tiny_model, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    data = make_data(url)
    data.servers.connect_timeout_s = 0.3
    with pytest.raises(ServerStartError, match=f"Nothing healthy answers at {url} after 0.3 s"):
        make_trainer(tmp_path).fit(make_module(tiny_model), data)


def test_a_server_of_another_model_is_refused(server, tmp_path):
    other = make_tiny_model(tmp_path / "other", vocab=300)
    with pytest.raises(ConfigError, match=r"vocab.*512.*300|300.*512"):
        make_trainer(tmp_path).fit(make_module(other), make_data(server))


def test_a_port_in_use_is_named_without_a_traceback(tiny_model):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = subprocess.run(
            python_with_imports(
                *("-m", "lightning_grpo.engine", "--model", str(tiny_model), "--port", str(port))
            ),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0
    assert str(port) in done.stderr
    assert "in use" in done.stderr


def test_a_budget_without_tokens_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="`max_tokens_per_microbatch` must be >= 1, got 0"):
        make_module(tiny_model, max_tokens_per_microbatch=0, loss=GRPOLoss())


def test_a_model_folder_whose_weights_are_missing_is_refused(tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    servers = NeverServers()
    with pytest.raises(ConfigError, match=r"`model` must be .*model"):
        make_trainer(tmp_path).fit(make_module(folder), make_data(servers))


# ---- checkpoints that a run can't go on from, each refused in one sentence ----------------------


@pytest.fixture(scope="module")
def checkpoint(tiny_model, loop_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.fit(make_module(tiny_model), make_data(loop_engine.url))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 4}, "`data.group_size` must be what the checkpoint's run had (finished"),
        ({"batch_size": 4}, "`data.batch_size` must be what the checkpoint's run had (versions"),
        ({"minibatches_per_batch": 2}, "`data.minibatches_per_batch` must be what"),
        ({"passes_per_batch": 2}, "`data.passes_per_batch` must be what"),
        ({"prompts": make_prompts(seed=1)}, "`data.prompts.seed` must be what"),
        ({"prompts": make_prompts(shuffle=False)}, "`data.prompts.shuffle` must be what"),
        ({"prompts": make_prompts(11)}, "would be another prompt), 12 prompts ("),
        ({"prompts": make_prompts(suffix="?")}, "got 12 prompts ("),
    ],
)
def test_settings_that_positions_depend_on_may_not_change(
    tiny_model, server, tmp_path, checkpoint, settings, message
):
    trainer = make_trainer(tmp_path, max_steps=4)
    with pytest.raises(ConfigError, match=re.escape(message)) as refusal:
        trainer.fit(make_module(tiny_model), make_data(server, **settings), ckpt_path=checkpoint)
    assert "Set it back, or begin a new run from these weights" in str(refusal.value)
    assert trainer.global_step == 0


def test_other_settings_may_change(tiny_model, server, tmp_path, checkpoint):
    trainer = make_trainer(tmp_path, max_steps=4, gradient_clip_val=1.0)
    data = make_data(server, max_staleness=2)
    trainer.fit(make_module(tiny_model), data, ckpt_path=checkpoint)
    assert trainer.global_step == 4
    held_out = make_data(server, val_prompts=make_prompts(2), group_size=4)
    make_trainer(tmp_path).validate(make_module(tiny_model), held_out, ckpt_path=checkpoint)
    assert held_out.evaluations[-1].step == 2


def test_a_checkpoint_of_another_model_is_refused(server, tmp_path, checkpoint):
    other = make_tiny_model(tmp_path / "other", num_layers=1, hidden_size=16)
    with pytest.raises(ConfigError, match=r"checkpoint of the same model as `model\.model`, and"):
        make_trainer(tmp_path).fit(make_module(other), make_data(server), ckpt_path=checkpoint)


class Renamed(RolloutDataModule):
    """Lightning keeps states under the names of classes."""


def test_a_checkpoint_of_another_class_of_data_module_is_refused(
    tiny_model, server, tmp_path, checkpoint
):
    data = make_data(server, cls=Renamed)
    with pytest.raises(ConfigError, match=r"would begin anew\), RolloutDataModule, got Renamed\."):
        make_trainer(tmp_path).fit(make_module(tiny_model), data, ckpt_path=checkpoint)
    held_out = make_data(server, cls=Renamed, val_prompts=make_prompts(2))
    make_trainer(tmp_path).validate(make_module(tiny_model), held_out, ckpt_path=checkpoint)
    assert held_out.evaluations[-1].step == 2


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_model, server, tmp_path, checkpoint):
    with pytest.raises(ConfigError, match=r"is a folder without meta\.pt.*In it lies .*run\.ckpt"):
        make_trainer(tmp_path).fit(
            make_module(tiny_model), make_data(server), ckpt_path=checkpoint.parent
        )


def fit_on_too_few_sequences(model: str, folder: str) -> tuple[str, bool, list[str]]:
    servers = NeverServers()
    trainer = make_trainer(Path(folder), devices=3, strategy="ddp")
    with pytest.raises(ConfigError) as refusal:
        trainer.fit(make_module(model), make_data(servers, batch_size=1))
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("grpo-")]
    return str(refusal.value), servers.started, left


@pytest.mark.slow
def test_more_ranks_than_sequences_are_refused_before_a_server_starts(tiny_model, tmp_path):
    for said, started, left in run_ranks(
        fit_on_too_few_sequences, 3, str(tiny_model), str(tmp_path)
    ):
        assert "at most the sequences of a minibatch" in said
        assert said.endswith("got 3 ranks. Use fewer devices, or raise `data.batch_size`.")
        assert not started
        assert left == []
