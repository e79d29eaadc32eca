"""GRPOModule without a Trainer: its hooks, its arguments, its optimizer."""

from __future__ import annotations

import functools
import json
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.compile import from_compiled

from lightning_grpo.algorithm.advantages import LeaveOneOutAdvantage
from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.losses import CISPOLoss, GRPOLoss, KLPenalty
from lightning_grpo.callbacks.recording import DEFAULT_CALLBACKS
from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from lightning_grpo.objective import ReferencePolicy
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from tests.fakes.causal_models import make_model_of
from tests.fakes.loops import NeverServers, make_data, make_module, make_trainer
from tests.fakes.tiny_model import make_tiny_model
from tests.fakes.tiny_run import make_group
from tests.fakes.user_objects import MaxRL, OwnTokenLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1, hidden_size=32)


def make_batch():
    groups = [make_group(0, (0.0, 1.0, 1.0)), make_group(1, (0.5, 0.5, 0.5))]
    return RolloutBatch.from_groups(groups, version=0)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("training_step", "token_loss"),
        ("optimizer_zero_grad", "configure_optimizers"),
        ("on_train_batch_start", "on_train_batch_end"),
    ],
)
def test_final_methods_name_the_hook_to_use(name, instead):
    with pytest.raises(ConfigError, match=rf"`Mine\.{name}` can't be.*Override `{instead}`"):
        type("Mine", (GRPOModule,), {name: lambda self: None})


def test_advantages_come_from_the_object_or_from_a_subclass():
    batch = make_batch()
    advantages, trained, *_ = make_module("m", advantage=LeaveOneOutAdvantage()).prepare_rollout(
        batch
    )
    assert advantages.tolist() == pytest.approx([-1.0, 0.5, 0.5, 0, 0, 0])
    assert trained.tolist() == [True] * 3 + [False] * 3
    advantages, *_ = make_module("m", MaxRL).prepare_rollout(batch)
    assert advantages.tolist() == pytest.approx([-1.0, 0.5, 0.5, 0, 0, 0])


def test_shaped_rewards_are_what_advantages_are_computed_from():
    class Shorter(GRPOModule):
        def shape_rewards(self, batch):
            return batch.rewards - 0.5 * (torch.arange(len(batch)) == 3)

    advantages, trained, *_ = make_module("m", Shorter).prepare_rollout(make_batch())
    assert advantages[3] < 0 < advantages[4]
    assert trained.all()


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (OwnTokenLoss, {}),
        (GRPOModule, {"loss": lambda logprobs, batch: (logprobs, {})}),
        (GRPOModule, {"kl": KLPenalty(0.1)}),
        (GRPOModule, {"entropy_coefficient": 0.1}),
    ],
)
def test_no_trajectory_is_left_out_where_a_zero_advantage_may_have_a_gradient(cls, settings):
    _, trained, *_ = make_module("m", cls, **settings).prepare_rollout(make_batch())
    assert trained.all()


def test_advantages_per_token_leave_nothing_out():
    class PerToken(GRPOModule):
        def advantages(self, rewards, group_ids):
            return torch.zeros(24)  # six sequences of four tokens

    advantages, trained, *_ = make_module("m", PerToken).prepare_rollout(make_batch())
    assert len(advantages) == 24
    assert trained.all()


def test_the_policy_is_built_once_by_the_hook(folder):
    class Counted(GRPOModule):
        built = 0

        def build_policy(self):
            self.built += 1
            return super().build_policy()

    module = make_module(folder, Counted)
    module.configure_model()
    module.configure_model()
    assert module.built == 1
    assert module.sharding_root() is module.policy
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_the_default_optimizer_is_adamw_for_rl_and_a_schedule_counts_steps(folder):
    module = GRPOModule(str(folder))
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 1e-6
    assert optimizer.defaults["weight_decay"] == 0.0
    module = make_module(
        folder, lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.5, 3)
    )
    module.configure_model()
    assert module.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_a_schedule_that_fails_at_the_first_step_is_refused_before_it(folder):
    module = make_module(folder, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 0))
    module.configure_model()
    with pytest.raises(ConfigError, match="`lr_scheduler` must last for the run's 1 steps"):
        module.configure_optimizers()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {
                "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
                "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 0),
            },
            "`lr_scheduler` must last for the run's 1 steps",
        ),
        (
            {"optimizer": functools.partial(torch.optim.AdamW, lr=-1.0)},
            "Invalid learning rate: -1.0",
        ),
        (
            {"optimizer": functools.partial(torch.optim.AdamW, rate=1.0)},
            "unexpected keyword .*rate",
        ),
    ],
)
def test_optimizer_and_schedule_are_tried_before_anything_is_started(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_module(folder, **arguments).check_model()


def test_an_optimizer_that_wants_the_real_parameters_is_no_mistake(folder):
    def by_name(parameters):
        known = {id(p): name for name, p in module.named_parameters()}
        return torch.optim.AdamW(
            [{"params": [p], "name": known[id(p)]} for p in parameters if id(p) in known]
        )

    module = make_module(folder, optimizer=by_name)
    module.check_model()
    module.configure_model()
    assert module.configure_optimizers().param_groups[0]["name"]


def test_arguments_are_kept_as_plain_data_and_a_class_without_arguments_is_none():
    module = make_module("shipped:quickstart", loss=CISPOLoss(clip_high=0.5))
    assert module.hparams["loss"]["class_path"].endswith("CISPOLoss")
    assert module.hparams["loss"]["init_args"]["clip_high"] == 0.5
    assert module.hparams["kl"] is None
    assert module.hparams["not_restored"] == []
    again = GRPOModule(**{k: v for k, v in module.hparams.items() if k != "not_restored"})
    assert again.loss == module.loss
    assert isinstance(GRPOModule("m").loss, GRPOLoss)


@pytest.mark.parametrize("bar", [True, False])
def test_the_callbacks_that_a_run_needs_are_supplied_unless_they_are_there(folder, tmp_path, bar):
    class Quicker(WeightSync):
        pass

    class Seen(Callback):
        names: list[str]

        def setup(self, trainer, pl_module, stage):
            self.names = [type(c).__name__ for c in trainer.callbacks]
            raise KeyError("seen")

    seen = Seen()
    trainer = make_trainer(tmp_path, callbacks=[seen, Quicker()], enable_progress_bar=bar)
    with pytest.raises(KeyError, match="seen"):
        trainer.fit(make_module(folder), make_data(SlowServers()))
    assert "Quicker" in seen.names
    assert "WeightSync" not in seen.names
    supplied = {c.__name__ for c in DEFAULT_CALLBACKS} - {"WeightSync", "GRPOProgress"}
    assert supplied <= set(seen.names)
    assert ("GRPOProgress" in seen.names) == bar


class SlowServers(NeverServers):
    """Asked to start in the background, and ended before anybody waits for them."""

    def start(self, model_path, run_dir):
        return []


def two(self):
    return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


@pytest.mark.parametrize(
    "configure",
    [
        two,
        lambda self: (two(self), []),
        lambda self: tuple({"optimizer": optimizer} for optimizer in two(self)),
    ],
)
def test_several_optimizers_are_refused_with_what_one_can_do(folder, configure):
    Mine = type("Mine", (GRPOModule,), {"configure_optimizers": configure})
    module = make_module(folder, Mine)
    module.configure_model()
    with pytest.raises(ConfigError, match=r"`Mine\.configure_optimizers` must return one.* got 2"):
        module.configure_optimizers()


def test_no_optimizer_is_refused(folder):
    Mine = type("Mine", (GRPOModule,), {"configure_optimizers": lambda self: None})
    with pytest.raises(ConfigError, match=r"`Mine\.configure_optimizers` must return one.* got 0"):
        make_module(folder, Mine).configure_optimizers()


@pytest.mark.parametrize(
    ("setting", "made"),
    [
        ("optimizer", lambda params: [torch.optim.SGD([p]) for p in params]),
        ("optimizer", lambda params: {"optimizer": torch.optim.SGD(params)}),
        ("optimizer", lambda params: None),
        ("lr_scheduler", lambda optimizer: [torch.optim.lr_scheduler.LinearLR(optimizer)]),
        ("lr_scheduler", lambda optimizer: None),
    ],
)
def test_a_function_must_build_one_optimizer_or_schedule(folder, setting, made):
    module = make_module(folder, **{setting: made})
    module.configure_model()
    with pytest.raises(ConfigError, match=f"`{setting}` must build one (Optimizer|LRScheduler)"):
        module.configure_optimizers()


def test_one_optimizer_of_a_subclass_is_taken_as_it_is(folder):
    class Mine(GRPOModule):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.25)]

    module = make_module(folder, Mine)
    module.configure_model()
    (optimizer,) = module.configure_optimizers()
    assert optimizer.defaults["lr"] == 0.25


def test_manual_optimization_is_refused(folder, tmp_path):
    module = make_module(folder)
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match=r"`GRPOModule\.automatic_optimization` must be true"):
        make_trainer(tmp_path).fit(module, make_data(NeverServers()))


def test_a_plateau_must_be_one_of_a_metric_by_name(folder):
    module = make_module(folder, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    module.configure_model()
    with pytest.raises(ConfigError, match=r"ReduceLROnPlateau\(optimizer, monitor='eval/avg_at_1'"):
        module.configure_optimizers()


def test_the_model_of_a_module_is_checked_and_so_is_a_reference_of_another_one(folder, tmp_path):
    make_module(folder).check_model()
    make_model_of("nemotron").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="NemotronForCausalLM doesn't pass on"):
        make_module(tmp_path).check_model()
    with pytest.raises(ConfigError, match="NemotronForCausalLM doesn't pass on"):
        make_module(folder, kl=KLPenalty(0.1, reference=str(tmp_path))).check_model()

    make_model_of("jetmoe").config.save_pretrained(tmp_path / "jetmoe")
    with pytest.raises(ConfigError, match="`gradient_checkpointing` must be false for JetMoe"):
        make_module(tmp_path / "jetmoe", gradient_checkpointing=True).check_model()

    class Own(GRPOModule):
        def build_policy(self):
            raise AssertionError("it was built")

    make_module(tmp_path, Own).check_model()


def test_sequences_that_grew_beyond_a_switch_of_rope_are_refused(folder):
    module = make_module(folder)
    module.configure_model()
    module.prepare_rollout(make_batch())
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 3}
    module.policy.model.config.rope_parameters = rope
    with pytest.raises(ConfigError, match=r"at most 3 tokens, at which .* got one of 4"):
        module.prepare_rollout(make_batch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": 0.1}, "`kl` must be an object such as `KLPenalty(0.001)`, got 0.1"),
        ({"loss": "grpo"}, "`loss` must be an object such as `GRPOLoss()`, got 'grpo'"),
        ({"loss": GRPOLoss}, "got the class GRPOLoss. Call it."),
        ({"advantage": 1.0}, "`advantage` must be an object such as `GroupAdvantage()`"),
        ({"correction": 2.0}, "`correction` must be an object such as `TokenTIS()`"),
        ({"truncation": "mask"}, "`truncation` must be an object such as `Truncation("),
        ({"lora": {"rank": 8}}, "`lora` must be an object such as `LoRA(rank=16)`"),
        ({"optimizer": 1e-4}, "`optimizer` must be a function that builds it"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1)])},
            "`optimizer` must be a function that builds it",
        ),
    ],
)
def test_what_is_no_part_of_its_kind_is_refused_by_the_constructor(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        GRPOModule("anything", **settings)


def test_a_model_in_memory_is_refused_with_the_ways_out():
    said = r"got Linear. Save model and tokenizer with `save_pretrained\(FOLDER\)`"
    with pytest.raises(ConfigError, match=said):
        GRPOModule(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="`model` must be a hub id, a folder"):
        GRPOModule(None)


def test_a_model_s_folder_may_be_a_path(tmp_path):
    module = GRPOModule(tmp_path)
    assert module.model_path == module.hparams["model"] == str(tmp_path)


def test_what_compiles_needs_a_compiler(monkeypatch):
    GRPOModule("shipped:quickstart").check_model()
    monkeypatch.setenv("PATH", "")
    GRPOModule("shipped:quickstart").check_model()
    with pytest.raises(ConfigError, match=r"`compile` needs a C compiler.* Install one"):
        GRPOModule("shipped:quickstart", compile=True).check_model()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
def test_the_policy_is_compiled_where_that_is_asked():
    for asked in (False, True):
        module = GRPOModule("shipped:quickstart", compile=asked)
        module.configure_model()
        assert module.policy.compiled is asked
        assert (module.policy.model.model.layers[0]._compiled_call_impl is not None) is asked


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_module_that_was_compiled_whole_is_refused_with_the_way_that_works():
    module = from_compiled(torch.compile(GRPOModule("shipped:quickstart")))
    with pytest.raises(ConfigError, match=r"Set `GRPOModule\(compile=True\)`"):
        module.check_model()


# ---- the reference of a KL penalty, held beside the module --------------------------------------

CPU = torch.device("cpu")


def test_a_reference_is_no_part_of_the_module_and_loaded_once(folder):
    module = make_module(folder, kl=KLPenalty(0.1))
    module.configure_model()
    before = {name: p.shape for name, p in module.state_dict().items()}
    with module._reference.on(module.policy, CPU) as reference:
        assert reference is not module.policy
    with module._reference.on(module.policy, CPU) as again:
        assert again is reference
    assert not any(p.requires_grad for p in reference.parameters())
    assert {name: p.shape for name, p in module.state_dict().items()} == before
    with make_module(folder)._reference.on(module.policy, CPU) as none:
        assert none is None


def test_another_model_may_be_the_reference(folder, tmp_path):
    other = make_tiny_model(tmp_path, num_layers=1, hidden_size=32, seed=5)
    held = ReferencePolicy(KLPenalty(0.1, reference=str(other), offload=True), str(folder), {})
    module = make_module(folder)
    module.configure_model()
    with held.on(module.policy, CPU) as reference:  # on a CPU there is nowhere to go from
        same = zip(reference.parameters(), module.policy.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in same)


def test_a_model_whose_heads_ranks_can_t_share_out_is_refused_before_servers_are_started(folder):
    module = make_module(folder)
    strategy = FSDP2Strategy(sequence_parallel_size=3)
    module.trainer = L.Trainer(accelerator="cpu", devices=3, strategy=strategy, logger=False)
    with pytest.raises(
        ConfigError, match=r"`sequence_parallel_size` must divide the 2 query heads"
    ):
        module.check_model()


def swapped(other):
    """The tokenizer with other texts for the same ids."""
    path = other / "tokenizer.json"
    whole = json.loads(path.read_text())
    words, ids = zip(*whole["model"]["vocab"].items(), strict=True)
    whole["model"]["vocab"] = dict(zip(words, reversed(ids), strict=True))
    whole["model"]["merges"] = []
    path.write_text(json.dumps(whole))


def weights_alone(other):
    for file in other.glob("tokenizer*"):
        file.unlink()


def test_a_reference_of_other_tokens_is_refused_before_servers_are_started(folder, tmp_path):
    def check(name, change=lambda other: None, **settings):
        other = make_tiny_model(tmp_path / name, num_layers=1, hidden_size=32, **settings)
        change(other)
        make_module(folder, kl=KLPenalty(0.1, reference=str(other))).check_model()

    check("same", seed=5)
    check("padded to more rows", vocab=640)
    check("padded to fewer", vocab=320)
    check("weights", weights_alone)
    with pytest.raises(ConfigError, match=r"`kl.reference` .* of 300 rows, too few for"):
        check("few", vocab=300)
    with pytest.raises(
        ConfigError, match=r"`kl.reference` must have the policy's tokenizer, .* is"
    ):
        check("swapped", swapped)
