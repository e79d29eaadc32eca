"""The session's settings, material and state, without servers."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import anyio
import pytest
import torch
from transformers import AutoTokenizer

from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.distributed import RankChannel
from lightning_grpo.errors import ConfigError, PromptError, ServerStartError
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import PerDatasetWorkflow, RLVRWorkflow, RolloutWorkflow
from lightning_grpo.servers.base import Servers
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.session.assembly import (
    SHARE,
    QuietHeap,
    _open_pool,
    from_checkpoint,
    to_checkpoint,
)
from lightning_grpo.session.material import (
    _longest,
    check_ends,
    check_sampling,
    open_material,
    room_for_prompts,
)
from lightning_grpo.session.session import RolloutSession
from lightning_grpo.types import Sampling
from lightning_grpo.validation import Evaluation
from tests.fakes.loops import NeverServers, make_data, make_prompts, odd_reward
from tests.fakes.server import FakeServer
from tests.fakes.tiny_model import make_tiny_model


def test_state_survives_a_checkpoint_that_is_loaded_with_weights_only(tmp_path):
    state = {"a": b"\x00\x01\xff", "empty": b"", "list": [1, {"deep": b"x"}], "n": None, "f": 0.5}
    torch.save(to_checkpoint(state), tmp_path / "file")
    assert from_checkpoint(torch.load(tmp_path / "file", weights_only=True)) == state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1, hidden_size=32)


def in_folder(data, run_dir):
    """As if its run had this folder."""
    data.run_dir = run_dir
    return data


def settings_of(folder, tmp_path, **kwargs):
    return in_folder(make_data(NeverServers(), **kwargs), tmp_path).settings_for(str(folder))


def test_material_holds_prompts_and_the_starts_of_some_as_the_probe(folder, tmp_path):
    settings = settings_of(folder, tmp_path, val_prompts=make_prompts(3))
    material = open_material(settings)
    assert len(material.prompts[""]) == 12
    assert {name: len(p) for name, p in material.val_prompts.items()} == {"": 3}
    assert material.vocab_size == 512
    assert material.greedy == Sampling(max_new_tokens=6, temperature=0.0)
    probed, alone = material.probe.sequences
    (prompts,) = material.prompts.values()
    starts = [prompts[k].input_ids[:32] for k in range(4)]
    assert probed == tuple(i for start in starts for i in start)
    assert alone == starts[0][:12]
    assert _longest(material.prompts) == max(len(prompts[i].input_ids) for i in range(12))


def test_the_probe_is_made_once_and_no_prompt_again_at_each_weight_sync(folder, tmp_path):
    made = []

    class Counting(RolloutDataModule):
        def make_prompt(self, row, tokenizer):
            made.append(row)
            return super().make_prompt(row, tokenizer)

    data = make_data(NeverServers())
    counting = Counting(data.prompts, data.workflow, data.servers)
    material = open_material(in_folder(counting, tmp_path).settings_for(str(folder)))
    first, made_for_it = material.probe, len(made)
    assert material.probe == first
    assert len(made) == made_for_it


def test_a_prompt_that_a_subclass_makes_is_asked(folder, tmp_path):
    class Shouting(RolloutDataModule):
        def make_prompt(self, row, tokenizer):
            return super().make_prompt({**row, "question": row["question"].upper()}, tokenizer)

    data = make_data(NeverServers())
    shouting = Shouting(data.prompts, data.workflow, data.servers)
    material = open_material(in_folder(shouting, tmp_path).settings_for(str(folder)))
    assert "WHAT IS 0 + 0?" in material.prompts[""][0].text


@pytest.mark.parametrize(
    "name_and_value", [("top_p", 0.9), ("top_k", 5), ("min_new_tokens", 1)], ids=str
)
def test_sampling_that_biases_the_ratio_is_refused_unless_allowed(folder, tmp_path, name_and_value):
    name, value = name_and_value
    sampling = Sampling(max_new_tokens=6, **{name: value})
    with pytest.raises(ConfigError, match=rf"`sampling\.{name}` must be .* got {value}"):
        check_sampling(sampling)


@pytest.mark.parametrize(
    ("sampling", "rule"),
    [
        (Sampling(stop=("",)), "stop` must hold texts"),
        (Sampling(temperature=0.0), "temperature` must be > 0 for more than one sample"),
    ],
)
def test_an_evaluation_refuses_what_no_sampling_is(sampling, rule):
    with pytest.raises(ConfigError, match=rf"`evaluation\.sampling\.{rule}"):
        Evaluation(num_samples=2, sampling=sampling)


def test_held_out_prompts_may_be_sampled_as_training_must_not(folder, tmp_path):
    wanted = Sampling(max_new_tokens=20, temperature=0.6, top_p=0.95, top_k=20, min_new_tokens=2)
    held_out = make_prompts(3)
    evaluation = Evaluation(num_samples=4, sampling=wanted)
    settings = settings_of(folder, tmp_path, val_prompts=held_out, evaluation=evaluation)
    material = open_material(settings)
    assert material.sampling == Sampling(max_new_tokens=6)
    assert material.greedy == Sampling(max_new_tokens=20, temperature=0.0, min_new_tokens=2)
    longest = max(len(prompt.input_ids) for prompt in material.val_prompts[""])
    assert material.requirements("run").max_tokens == longest + 20
    alike = open_material(settings_of(folder, tmp_path, val_prompts=held_out))
    longer = Evaluation(sampling=Sampling(max_new_tokens=200))
    settings = settings_of(folder, tmp_path, val_prompts=held_out, evaluation=longer)
    asked = open_material(settings).load_of(settings).context_tokens
    assert asked >= longest + 200 > alike.load_of(settings).context_tokens


def test_servers_are_asked_for_a_context_that_takes_every_input_of_the_run(folder, tmp_path):
    """Of SGLang's context six tokens are no input; the probe may be longer than what is sampled."""
    for new_tokens in (1, *range(30, 50, 4)):
        data = make_data(NeverServers(), sampling=Sampling(max_new_tokens=new_tokens))
        settings = in_folder(data, tmp_path).settings_for(str(folder))
        material = open_material(settings)
        inputs = [_longest(material.prompts) + new_tokens - 1]
        inputs += [len(ids) for ids in (*material.probe.sequences, *material.probe.thorough)]
        assert max(inputs) <= material.load_of(settings).context_tokens - 6
        assert material.load_of(settings).context_tokens % 64 == 0


def test_prompts_are_the_same_ones_on_another_day(folder, tmp_path):
    dated = shutil.copytree(folder, tmp_path / "dated")
    tokenizer = AutoTokenizer.from_pretrained(dated)
    tokenizer.chat_template = "{{ strftime_now('%f') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(dated)
    first, again = (open_material(settings_of(dated, tmp_path)) for _ in range(2))
    assert first.prompts[""].prompt(0).text != again.prompts[""].prompt(0).text
    assert first.fingerprint == again.fingerprint
    other = open_material(settings_of(dated, tmp_path, prompts=make_prompts(suffix="?")))
    assert first.fingerprint != other.fingerprint


def test_a_row_that_turns_out_to_be_none_is_left_to_be_given_up(folder, tmp_path):
    class Choosy(RolloutDataModule):
        def make_prompt(self, row, tokenizer):
            if row["answer"] == "8":
                raise KeyError("hint")
            return super().make_prompt(row, tokenizer)

    data = make_data(NeverServers(), cls=Choosy)
    settings = in_folder(data, tmp_path).settings_for(str(folder))
    material = open_material(settings)
    with pytest.raises(PromptError, match=r"row 4 of .*KeyError\('hint'\)"):
        material.prompts[""].prompt(4)
    assert material.fingerprint.startswith("12 prompts")
    assert material.load_of(settings).context_tokens > _longest(material.prompts) > 0


def test_held_out_completions_that_end_earlier_than_those_of_training_are_told(
    folder, tmp_path, caplog
):
    def opened(sampling):
        caplog.clear()
        evaluation = Evaluation(greedy=False, sampling=sampling)
        workflow = RLVRWorkflow(odd_reward, Sampling(max_new_tokens=20, stop=("a",)))
        open_material(settings_of(folder, tmp_path, workflow=workflow, evaluation=evaluation))
        return caplog.text

    assert "has max_new_tokens 6 for 20. What is not" in opened(Sampling(6, stop=("a",)))
    assert "has stop () for ('a',). What is not" in opened(Sampling(20))
    assert not opened(Sampling(20, top_p=0.9, stop=("a",)))
    assert not opened(Sampling(40, stop=("a",)))
    assert "has stop () for ('a',)" in opened(Sampling(40))


class Turns(RLVRWorkflow):
    """May ask several times."""

    async def run(self, prompt, context):
        raise NotImplementedError


class Secretive(RolloutWorkflow):
    """Keeps its sampling to itself."""

    async def run(self, prompt, context):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("workflow", "evaluation", "rule"),
    [
        (Secretive(), Evaluation(), "`evaluation.greedy` must be false for Secretive"),
        (
            Secretive(),
            Evaluation(greedy=False, sampling=Sampling(max_new_tokens=6)),
            "`evaluation.sampling` must be null for Secretive",
        ),
        (
            Turns(odd_reward, Sampling(max_new_tokens=6)),
            Evaluation(sampling=Sampling(max_new_tokens=7)),
            "`evaluation.sampling.max_new_tokens` must be at most the workflow's 6",
        ),
        (
            PerDatasetWorkflow({"": Turns(odd_reward, Sampling(max_new_tokens=6))}),
            Evaluation(sampling=Sampling(max_new_tokens=7)),
            "must be at most the workflow's 6 where an episode has several turns",
        ),
        (
            RLVRWorkflow(odd_reward, Sampling(max_new_tokens=6)),
            Evaluation(sampling=Sampling(max_new_tokens=512)),
            "`evaluation.sampling.max_new_tokens` must leave room for a prompt",
        ),
    ],
)
def test_an_evaluation_that_a_workflow_cannot_serve_is_refused(
    folder, tmp_path, workflow, evaluation, rule
):
    settings = settings_of(folder, tmp_path, workflow=workflow, evaluation=evaluation)
    with pytest.raises(ConfigError, match=rule):
        open_material(settings)


@pytest.fixture(scope="module")
def with_an_image_token(folder, tmp_path_factory):
    """A model folder like Gemma 3 1B's: its tokenizer has a token that the embedding lacks."""
    copy = tmp_path_factory.mktemp("model") / "copy"
    shutil.copytree(folder, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    vocab_size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    return copy, vocab_size


def test_a_tokenizer_may_have_tokens_that_no_prompt_holds(with_an_image_token, tmp_path):
    folder, vocab_size = with_an_image_token
    material = open_material(settings_of(folder, tmp_path))
    assert (len(material.tokenizer), material.vocab_size) == (vocab_size + 1, vocab_size)
    assert material.requirements("run").vocab_size == vocab_size


def test_a_prompt_that_holds_such_a_token_is_refused_with_its_row_and_id(
    with_an_image_token, tmp_path
):
    folder, vocab_size = with_an_image_token
    rows = [{"question": f"What is {i}?", "answer": "1"} for i in range(200)]
    rows[150]["question"] = "What is on <image>?"
    settings = settings_of(folder, tmp_path, prompts=Prompts(rows, column="question"))
    with pytest.raises(ConfigError, match=rf"row 150 .* token id {vocab_size}, .* {vocab_size} r"):
        open_material(settings)


@pytest.mark.parametrize("place", ["workflow", "evaluation"])
def test_a_stop_that_could_never_be_sampled_is_refused(folder, tmp_path, place):
    sampling = Sampling(max_new_tokens=6, stop_token_ids=(5, 512))
    changed = {"workflow": {"sampling": sampling}, "evaluation": {"evaluation": Evaluation(
        sampling=sampling)}}[place]  # fmt: skip
    name = {"workflow": "sampling", "evaluation": "evaluation.sampling"}[place]
    settings = settings_of(folder, tmp_path, **changed)
    with pytest.raises(ConfigError, match=rf"`{name}.stop_token_ids` must be in \[0, 512\).*512"):
        open_material(settings)


def test_a_model_that_could_never_end_is_refused():
    with pytest.raises(ConfigError, match=r"end tokens \[512, 600\] must be in its embed"):
        check_ends(frozenset([600, 512]), {}, 512)
    check_ends(frozenset([600, 2]), {}, 512)
    check_ends(frozenset(), {}, 512)


def test_a_batch_of_more_prompts_than_there_are_is_told(folder, tmp_path, caplog):
    open_material(settings_of(folder, tmp_path, batch_size=12))
    assert not caplog.text
    open_material(settings_of(folder, tmp_path, batch_size=30))
    assert "`batch_size` 30 is more than the 12 prompts there are" in caplog.text
    assert "asks some of them 3 times" in caplog.text


def test_a_held_out_row_that_turns_out_to_be_none_is_named_by_the_answer(folder, tmp_path):
    """On every rank, where the answer is waited for."""
    rows = [{"question": [{"role": role, "content": "hi"}]} for role in ("user", "x")]
    said = "messages[0]['content']"
    template = f"{{{{ raise_exception('no') if messages[0]['role'] == 'x' else {said} }}}}"
    held_out = Prompts(rows, column="question")
    settings = settings_of(folder, tmp_path, val_prompts=held_out)
    session = RolloutSession(settings, RankChannel())
    session._lead.material.tokenizer.chat_template = template
    session.ask("", 0, 2)
    with pytest.raises(PromptError, match=r"row 1 of .* can't be made a prompt.*no"):
        session.answer("", 0, 2)
    session.close()


def test_an_empty_stop_is_refused():
    with pytest.raises(ConfigError, match=r"`sampling\.stop` must hold texts .* got \['a', ''\]"):
        check_sampling(Sampling(stop=("a", "")))


def test_room_for_prompts_is_what_the_context_leaves():
    assert room_for_prompts(Sampling(max_new_tokens=10), 64) == 54
    assert room_for_prompts(None, 64) is None
    assert room_for_prompts(Sampling(), None) is None
    with pytest.raises(ConfigError, match="must leave room for a prompt"):
        room_for_prompts(Sampling(max_new_tokens=64), 64)


class SlowServers(Servers):
    """Come up after 20 s unless they are stopped before."""

    can_restart = True
    handles = ()

    def __init__(self):
        self.begun, self.stopped, self.outcomes = threading.Event(), threading.Event(), []

    def start(self, model_path, run_dir):
        self.begun.set()
        self.outcomes.append("stopped" if self.stopped.wait(20) else "up")
        raise ServerStartError("The start was given up.")

    def restart(self, url):
        return self.start("", None)

    def stop(self):
        self.stopped.set()


def test_closing_does_not_wait_until_servers_come_up(folder, tmp_path):
    servers = SlowServers()
    session = RolloutSession(
        in_folder(make_data(servers), tmp_path).settings_for(str(folder)), RankChannel()
    )
    session.start()
    assert servers.begun.wait(20)
    session.close()
    assert servers.outcomes == ["stopped"]


def test_closing_does_not_wait_until_a_server_is_restarted(folder, tmp_path):
    servers = SlowServers()
    settings = in_folder(make_data(servers), tmp_path).settings_for(str(folder))
    material = SimpleNamespace(requirements=Requirements, tokenizer=None)

    async def close_during_a_restart():
        async with FakeServer(pid=2**30) as server:  # no process has that number
            async with _open_pool(settings, material, "run", [server]):
                await anyio.to_thread.run_sync(servers.begun.wait, 20)
            closed_before = not servers.outcomes
            servers.stop()
            return closed_before

    assert anyio.run(close_during_a_restart)


@pytest.mark.parametrize(("new_tokens", "reached"), [(16, False), (100, True), (300, True)])
def test_a_first_proof_has_long_sequences_on_both_sides_of_a_window(
    folder, tmp_path, new_tokens, reached
):
    windowed = tmp_path / "windowed"
    shutil.copytree(folder, windowed)
    config = json.loads((windowed / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 0}
    config["layer_types"] = ["sliding_attention"]
    (windowed / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    settings = settings_of(windowed, tmp_path, sampling=Sampling(max_new_tokens=new_tokens))
    material = open_material(settings)
    found = [len(ids) for ids in material.probe.thorough]
    assert (112 in found) == reached
    longest = _longest(material.prompts) + new_tokens
    assert all(len(material.probe.sequences[0]) < n <= longest for n in found)
    assert (longest in found) == reached


# ---- how often the garbage collector looks at everything ----------------------------------------


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Cycle:
    """Garbage that only the collector frees."""

    def __init__(self):
        self.itself = self


def look(heap, clock, generation, seconds):
    heap.space_out("start", {"generation": generation})
    clock.now += seconds
    heap.space_out("stop", {"generation": generation})


def test_a_look_at_everything_is_put_off_by_what_the_last_one_took():
    clock, before = Clock(), gc.get_threshold()
    heap = QuietHeap(clock)
    try:
        look(heap, clock, 2, 0.5)
        assert gc.get_threshold()[:2] == before[:2]
        assert gc.get_threshold()[2] > 1000 * before[2]
        clock.now += 0.5 / SHARE - 1.0
        look(heap, clock, 1, 0.0)
        assert gc.get_threshold() != before
        clock.now += 1.0
        look(heap, clock, 0, 0.0)
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*before)


@pytest.fixture
def nothing_frozen():
    gc.unfreeze()
    yield
    gc.freeze()


def test_however_much_is_frozen_garbage_goes_when_there_is_little_of_it(nothing_frozen):
    frozen = [[] for _ in range(100_000)]  # a quarter of them as garbage was too little for a look
    before, heap = gc.get_threshold(), QuietHeap()
    gc.set_threshold(100, 2, 2)
    try:
        heap.freeze()
        cycle = Cycle()
        gone = weakref.ref(cycle.itself)
        gc.collect(1)  # grows old, as what a step holds until the next one
        del cycle
        new = [[] for _ in range(len(frozen) // 10)]
        assert gone() is None, f"still there after {len(new)} new objects"
    finally:
        heap.thaw()
        gc.set_threshold(*before)


def test_everything_is_as_before_once_it_is_thawed(nothing_frozen):
    callbacks, thresholds = list(gc.callbacks), gc.get_threshold()
    heap = QuietHeap()
    heap.freeze()
    heap.freeze()
    assert gc.get_freeze_count() > 0
    assert len(gc.callbacks) == len(callbacks) + 1
    gc.collect()
    heap.thaw()
    heap.thaw()
    assert gc.callbacks == callbacks
    assert gc.get_threshold() == thresholds
    assert gc.get_freeze_count() == 0


def test_what_python_freezes_as_it_starts_is_no_heap_that_a_program_has_frozen():
    program = (
        "import gc; gc.freeze()  # as 3.12 does\n"
        "from lightning_grpo._compat import is_heap_frozen\n"
        "print(is_heap_frozen()); gc.freeze(); print(is_heap_frozen())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ended.stdout.split() == [b"False", b"True"]


def test_a_heap_that_somebody_else_has_frozen_stays_as_it_is(nothing_frozen):
    gc.freeze()
    count = gc.get_freeze_count()
    heap = QuietHeap()
    heap.freeze()
    assert gc.get_freeze_count() == count
    heap.thaw()
    assert gc.get_freeze_count() == count
