import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from lightning_grpo.certify.tiny import tiny_config, tiny_model
from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.check import check_architecture
from lightning_grpo.policy.load import (
    export_policy,
    load_policy,
    load_tokenizer,
    materialize_from_folder,
    without_bars,
)
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.session.material import load_config
from tests.fakes.causal_models import (
    ARCHITECTURES,
    make_causal_model,
    make_model_of,
    make_sequences,
    pack,
    plain_logprobs,
)
from tests.fakes.ranks import start_ranks
from tests.fakes.tiny_model import make_tiny_model, make_tiny_tokenizer


def test_a_folder_loads_in_fp32_with_packed_attention_and_no_dropout(tmp_path):
    model = make_causal_model(attention_dropout=0.5, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    assert policy.config._attn_implementation == "packed"
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.training
    assert not policy.config.use_cache
    assert all(m.p == 0.0 for m in policy.modules() if isinstance(m, nn.Dropout))


def test_from_pretrained_gets_the_model_arguments(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), model_kwargs={"attn_implementation": "eager"})
    assert policy.config._attn_implementation == "eager"


def test_a_meta_policy_has_shapes_alone(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), meta=True, dtype=torch.bfloat16)
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert policy.config._attn_implementation == "packed"


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_a_folder_that_is_missing_or_holds_no_model_is_a_config_error(load, tmp_path):
    with pytest.raises(ConfigError, match="`model` must be a folder that exists"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(str(tmp_path))


def test_a_folder_without_weights_is_a_config_error(tmp_path):
    make_causal_model().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="causal language model"):
        load_policy(str(tmp_path))


def test_an_argument_that_the_model_does_not_take_is_a_config_error(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tourch_dtype"):
        load_policy(str(tmp_path), model_kwargs={"tourch_dtype": "float32"})


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "device_map", "load_in_8bit"])
def test_an_argument_that_is_decided_elsewhere_is_refused_by_name(name, meta, tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"`model_kwargs` must leave out `{name}`: "):
        load_policy(str(tmp_path), meta=meta, model_kwargs={name: "auto"})


def test_a_folder_without_tokenizer_is_a_config_error(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_comes_back_from_its_folder(tmp_path):
    tokenizer = load_tokenizer(str(make_tiny_model(tmp_path)))
    assert tokenizer.decode(tokenizer("3 + 4")["input_ids"]) == "3 + 4"


def change(folder, edit, **settings):
    """A checkpoint whose tensors were edited; its config is that of the model."""
    make_causal_model(**settings).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def layer(tensors, index):
    return [name for name in tensors if name.startswith(f"model.layers.{index}.")]


def drop_layer(tensors):
    for name in layer(tensors, 1):
        del tensors[name]


def drop_head(tensors):
    del tensors["lm_head.weight"]


def add_layer(tensors):
    for name in layer(tensors, 1):
        tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()


def add_layer_of_a_base_model(tensors):
    add_layer(tensors)
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def add_biases(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(31)


def untie(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


UNFIT = [
    (drop_layer, {}, r"lacks model\.layers\.1\.input_layernorm\.weight, .* and 8 more"),
    (drop_head, {"tie_word_embeddings": False}, r"lacks lm_head\.weight\. Way out"),
    (add_layer, {}, r"has beside the layers of the config model\.layers\.2\."),
    (add_layer_of_a_base_model, {}, r"has beside the layers of the config layers\.2\."),
    (add_biases, {}, r"has beside the layers of the config model\.layers\.0\.self_attn\.q_proj\.b"),
    (reshape, {}, r"has in another shape model\.norm\.weight \(31, by the config 32\)"),
    (untie, {}, "holds two that differ"),
]


@pytest.mark.parametrize(("edit", "settings", "message"), UNFIT)
def test_weights_that_the_config_does_not_describe_are_refused_by_name(
    edit, settings, message, tmp_path
):
    folder = change(tmp_path, edit, **settings)
    with pytest.raises(ConfigError, match=message):
        load_policy(folder)
    model = load_policy(folder, meta=True)  # as under fsdp2
    with pytest.raises(ConfigError, match=message):
        materialize_from_folder(model, folder)


def other_heads(tensors):
    tensors["v_head.summary.weight"] = torch.ones(1, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.0.self_attn.masked_bias"] = torch.ones(1)


def head_of_a_tied_model(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def without_prefix(tensors):
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("edit", [other_heads, head_of_a_tied_model, without_prefix])
def test_weights_of_other_heads_and_old_buffers_do_no_harm(edit, tmp_path):
    policy = load_policy(change(tmp_path, edit))
    expected = make_causal_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())


def lose_a_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def lose_the_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def cut_a_shard(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:200])


def forget_in_the_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    shards = {k: load_file(folder / k) for k in set(index["weight_map"].values())}
    for name, tensors in shards.items():
        tensors.pop("model.norm.weight", None)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, r"model-00001-of-\d+\.safetensors"),
        (lose_the_index, "model.safetensors"),
        (cut_a_shard, r"model-00001-of-\d+\.safetensors' can't be read .*again"),
        (forget_in_the_index, r"lacks model\.norm\.weight"),
    ],
)
def test_shards_that_are_not_whole_are_refused(damage, message, tmp_path):
    make_causal_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_policy(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_policy(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_policy),
        ("model.safetensors", load_policy),
        ("tokenizer.json", load_tokenizer),
    ],
)
def test_a_pointer_of_git_lfs_is_named_in_the_place_of_what_reads_it(name, load, tmp_path):
    folder = make_tiny_model(tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match=rf"{name}' is a pointer of Git LFS .*`git lfs pull`"):
        load(str(folder))


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter \(adapter_config\.json\)"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="must be a whole model"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8"},
    ],
)
def test_quantized_weights_are_refused_by_their_method(quantization, tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization})
    )
    message = rf"are quantized \({quantization['quant_method']}\)"
    for meta in (False, True):
        with pytest.raises(ConfigError, match=message):
            load_policy(str(tmp_path), meta=meta)
    make_causal_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_policy(str(tmp_path), model_kwargs={"quantization_config": quantization})


def in_eight_bits(dtype):
    def edit(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = (tensors[name].clamp(0, 1) * 100).to(dtype)

    return edit


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_eight_bits_are_refused_also_where_no_config_says_it(dtype, pickled, tmp_path):
    folder = change(tmp_path, in_eight_bits(dtype))
    if pickled:
        tensors = load_file(tmp_path / "model.safetensors")
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    for meta in (False, True):
        with pytest.raises(ConfigError, match=r"model.layers.1.mlp.up_proj.weight .* quantized"):
            load_policy(folder, meta=meta)


def test_packed_weights_are_refused_also_where_no_config_says_it(tmp_path):
    def pack(tensors):
        weight = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.layers.1.mlp.up_proj.qweight"] = torch.zeros(4, len(weight), dtype=torch.int)

    folder = change(tmp_path, pack)  # as AutoGPTQ wrote them, with a quantize_config.json
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.up_proj.qweight .* quantized"):
        load_policy(folder, meta=True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_hidden_layers": 1}, r"`num_hidden_layers` \(1\) must be equal"),
        ({"hidden_size": "wide"}, "hidden_size.* expected int, got str"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_with_what_transformers_says(
    change, why, tmp_path
):
    file = make_tiny_model(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for load in (load_policy, load_config, load_tokenizer):
        with pytest.raises(ConfigError, match=why):
            load(str(tmp_path))


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_a_model_that_also_sees_is_refused_with_the_way_to_its_text_part(kind, tmp_path):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    for load in (load_policy, load_config):
        with pytest.raises(ConfigError, match=rf"\({kind}\) consists of parts: text, vision"):
            load(str(tmp_path))


def vision_hybrid(kind):
    text = tiny_config(CONFIG_MAPPING[f"{kind}_text"]()).to_dict()
    sees = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    sees["out_hidden_size"] = text["hidden_size"]
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=sees)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def vision_model(kind):
    if kind.startswith("qwen3_5"):
        return vision_hybrid(kind)
    text = {
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    sees = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    more = {"gemma3": {"mm_tokens_per_image": 4}, "mistral3": {}}
    names = {"gemma3": ("gemma3_text", "siglip_vision_model"), "mistral3": ("mistral", "pixtral")}
    parts = {
        "text_config": {"model_type": names[kind][0], **text},
        "vision_config": {"model_type": names[kind][1], **sees},
    }
    config = CONFIG_MAPPING[kind](**parts, **more[kind], image_token_index=300)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen3_5", "qwen3_5_moe"])
def test_the_page_s_way_to_the_text_part_gives_the_model_s_own_logprobs(kind, tmp_path):
    torch.manual_seed(0)
    whole = vision_model(kind)
    whole.save_pretrained(tmp_path / "whole")
    make_tiny_tokenizer().save_pretrained(tmp_path / "whole")
    page = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text()
    recipe = page.split("```python text-part\n")[1].split("```")[0]
    places = {"google/gemma-3-4b-it": tmp_path / "whole", "gemma-3-4b-text": tmp_path / "text"}
    for name, place in places.items():
        assert f'"{name}"' in recipe
        recipe = recipe.replace(f'"{name}"', repr(str(place)))
    exec(recipe, {})
    ids = torch.arange(5, 20)
    expected = whole(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)[:-1]
    check_architecture(str(tmp_path / "text"))
    found, _ = PackedPolicy(load_policy(str(tmp_path / "text")))(ids)
    assert torch.allclose(found[1:], expected.gather(1, ids[1:, None])[:, 0], atol=1e-5)
    load_tokenizer(str(tmp_path / "text"))


# ---- materialize --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_materialized_model_computes_the_same_bits_as_a_loaded_one(architecture, tied, tmp_path):
    make_causal_model(architecture, tie_word_embeddings=tied).save_pretrained(tmp_path)
    packed = pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(load_policy(str(tmp_path)))(*packed)
    policy = load_policy(str(tmp_path), meta=True)
    materialize_from_folder(policy, str(tmp_path))
    found, _ = PackedPolicy(policy)(*packed)
    assert torch.equal(found, expected)


def test_the_values_of_the_meta_device_come_from_where_model_kwargs_say(tmp_path):
    for place, seed in ((tmp_path, 0), (tmp_path / "older", 1)):
        make_causal_model(seed=seed).save_pretrained(place)
    kwargs = {"subfolder": "older"}  # a hub's `revision` goes the same way
    loaded, sharded = (GRPOModule(str(tmp_path), model_kwargs=kwargs) for _ in range(2))
    loaded.configure_model()
    with torch.device("meta"):
        sharded.configure_model()
    sharded.materialize(sharded.sharding_root(), torch.device("cpu"))
    expected = dict(loaded.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in sharded.named_parameters())


def test_long_context_frequencies_are_made_again_too(tmp_path):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    make_causal_model("llama", rope_parameters=scaled).save_pretrained(tmp_path)
    packed = pack(make_sequences([9, 40]))
    policy = load_policy(str(tmp_path), meta=True)
    materialize_from_folder(policy, str(tmp_path))
    expected, _ = PackedPolicy(load_policy(str(tmp_path)))(*packed)
    assert torch.equal(PackedPolicy(policy)(*packed)[0], expected)


def tiny_folder(kind, folder):
    with without_bars():
        tiny_model(tiny_config(CONFIG_MAPPING[kind]())).save_pretrained(folder)
    return str(folder)


# In embeddings, and in recurrent layers: modules that their config alone doesn't make.
@pytest.mark.parametrize("kind", ["gemma3_text", "falcon_h1"])
def test_buffers_that_no_checkpoint_holds_come_with_the_values(kind, tmp_path):
    folder = tiny_folder(kind, tmp_path)
    packed = pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(load_policy(folder))(*packed)
    policy = load_policy(folder, meta=True)
    materialize_from_folder(policy, folder)
    assert torch.equal(PackedPolicy(policy)(*packed)[0], expected)
    for buffer in policy.buffers():
        buffer.zero_()
    assert not torch.allclose(PackedPolicy(policy)(*packed)[0], expected, atol=1e-3)


def test_a_buffer_that_the_loaded_model_lacks_is_refused(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    model = load_policy(str(tmp_path), meta=True)
    model.model.extra = nn.Module()
    model.model.extra.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(ConfigError, match=r"lacks model\.extra\.scale and 0 more"):
        materialize_from_folder(model, str(tmp_path))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    make_causal_model(num_hidden_layers=1).save_pretrained(tmp_path / "small")
    make_causal_model().save_pretrained(tmp_path / "whole")
    policy = load_policy(str(tmp_path / "whole"), meta=True)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1"):
        materialize_from_folder(policy, str(tmp_path / "small"))


def sharded(folder):
    """One rank of FSDP2 from the meta device: its logprobs, and whole gradients."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        model = load_policy(folder, meta=True)
        policy = PackedPolicy(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        root = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(policy, mesh=mesh, mp_policy=root)
        materialize_from_folder(model, folder)
        packed = pack(make_sequences([9, 12, 5], seed=distributed.get_rank()))
        logprobs, entropy = policy(*packed, 0.7, with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        return logprobs.tolist(), {n: g.tolist() for n, g in gradients.items()}
    finally:
        distributed.destroy_process_group()


def test_two_sharded_ranks_from_the_meta_device_equal_one_whole_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gemma3_text", tmp_path))
    with start_ranks(sharded, 2, str(tmp_path)) as ranks:
        results = ranks.join(timeout_s=50)
    assert [r.returncode for r in results] == [0, 0], results[0].output + results[1].output
    total = 0.0
    for result in results:
        sequences = make_sequences([9, 12, 5], seed=result.rank)
        expected, entropy = plain_logprobs(model, sequences, 0.7)
        assert torch.allclose(torch.tensor(result.value[0]), expected, atol=1e-5)
        total = total + (expected.sum() + entropy.sum()) / 2
    total.backward()
    for name, parameter in model.named_parameters():
        for result in results:
            found = torch.tensor(result.value[1][name])
            assert torch.allclose(found, parameter.grad, atol=1e-4), name


def fill_from_an_incomplete_folder(folder):
    """One rank of FSDP2: what it is told."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        model = load_policy(folder, meta=True)
        fully_shard(PackedPolicy(model), mesh=mesh)
        with pytest.raises(ConfigError) as refused:
            materialize_from_folder(model, folder)
        return str(refused.value)
    finally:
        distributed.destroy_process_group()


def test_weights_that_are_missing_are_named_on_every_rank(tmp_path):
    model = make_causal_model(tie_word_embeddings=False)
    values = {n: v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=values)
    with start_ranks(fill_from_an_incomplete_folder, 2, str(tmp_path)) as ranks:
        results = ranks.join(timeout_s=50)
    assert [r.returncode for r in results] == [0, 0], results[0].output + results[1].output
    for result in results:
        assert "lacks lm_head.weight" in result.value


# ---- export -------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 9, 30, 2, 77, 15]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_transformers_loads_an_exported_policy_with_equal_logits(folder, tmp_path):
    wrapped = PackedPolicy(load_policy(str(folder)))
    with torch.no_grad():
        wrapped.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    out = export_policy(wrapped.model, load_tokenizer(str(folder)), tmp_path / "a" / "out")

    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert loaded.config._attn_implementation == "sdpa"
    logits = loaded(IDS).logits[0]
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, IDS[0, 1:].unsqueeze(1)).squeeze(1)
    found, _ = wrapped(*pack([IDS[0]]))
    assert torch.allclose(found[1:], expected, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is True
    assert "packed" not in json.dumps(config)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("9 * 5")["input_ids"]) == "9 * 5"


def test_the_model_goes_on_as_it_was(folder, tmp_path):
    model = load_policy(str(folder))
    export_policy(model, None, tmp_path / "out")
    assert not model.config.use_cache
    assert model.config._attn_implementation == "packed"


def test_given_tensors_are_written_in_the_place_of_the_models_own(folder, tmp_path):
    model = load_policy(str(folder))
    state = {name: value * 2 for name, value in model.state_dict().items()}
    out = export_policy(model, None, tmp_path / "out", state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_an_older_folder_is_replaced_whole_and_nothing_else_is_left(folder, tmp_path):
    model = load_policy(str(folder))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.bin").touch()
    export_policy(model, None, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.bin").exists()


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise OSError("no space left on device")


@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_an_export_is_in_the_layout_of_checkpoints_whichever_its_base_was_in(
    as_checkpoint, tmp_path
):
    base = make_model_of("qwen3_moe")
    with without_bars():
        base.save_pretrained(tmp_path / "expected")
        base.save_pretrained(tmp_path / "base", save_original_format=as_checkpoint)
    model = load_policy(str(tmp_path / "base"))
    before = dict(vars(model))
    export_policy(model, None, tmp_path / "out")
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert vars(model) == before


LINEAR, FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize(
    ("kind", "layers", "interval"),
    [
        ("qwen3_next", [LINEAR, LINEAR, FULL] * 2, 3),
        ("qwen3_5_text", [LINEAR, FULL, LINEAR], 2),
        ("qwen3_5_text", [LINEAR, FULL, FULL], None),  # there is no such number
        ("qwen3_5_text", [LINEAR, LINEAR], None),
    ],
)
def test_an_export_says_in_sglang_s_way_which_layers_attend(kind, layers, interval, tmp_path):
    config = tiny_config(CONFIG_MAPPING[kind]())
    config.layer_types, config.num_hidden_layers = layers, len(layers)
    export_policy(tiny_model(config), None, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.get("full_attention_interval") == interval
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == layers


def test_a_failed_export_leaves_the_older_folder_and_no_rest(folder, tmp_path):
    model = load_policy(str(folder))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older").touch()
    with pytest.raises(OSError, match="no space"):
        export_policy(model, BrokenTokenizer(), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "older"]
    assert not model.config.use_cache
