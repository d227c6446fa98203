"""config.json of every family: what it means to transformers, in any spelling, and what is refused."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from scir_jax.errors import InputError
from scir_jax.model import decoder
from scir_jax.model.families import read
from scir_jax.model.hf import weights
from tests import families
from tests.families import CASES, FOREMOST, TOLERANCE, refused
from tests.hub_configs import HUB
from tests.processes import quick_jit


def resolved(config):
    return transformers.AutoConfig.for_model(**copy.deepcopy(config))


def on_meta(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def means_the_same(arch, theirs):
    """Asserts every field against what transformers makes of the same config.json; the model on the meta device."""
    reference = on_meta(theirs)
    names = {name.removeprefix("model.layers.0.") for name in reference.state_dict()}
    attention = reference.model.layers[0].self_attn
    gemma = theirs.model_type.startswith("gemma")
    found = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    layers, query_scale = found.pop("layers"), found.pop("query_scale")
    assert found == {
        "family": theirs.model_type,
        "reward": False,
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": attention.head_dim,
        "max_positions": theirs.max_position_embeddings,
        "norm_eps": theirs.rms_norm_eps,
        "tie_embeddings": theirs.tie_word_embeddings,
        "qkv_bias": {f"self_attn.{x}_proj.bias" in names for x in "qkv"} == {True},
        "o_bias": "self_attn.o_proj.bias" in names,
        "mlp_bias": "mlp.up_proj.bias" in names,
        "qk_norm": "self_attn.q_norm.weight" in names,
        "post_norms": "post_feedforward_layernorm.weight" in names,
        "norm_offset": float(gemma),
        "activation": {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[
            theirs.hidden_activation if gemma else theirs.hidden_act
        ],
        "embed_scale": getattr(reference.model.embed_tokens, "scalar_embed_scale", 1.0),
        "attention_cap": getattr(theirs, "attn_logit_softcapping", None),
        "final_cap": getattr(theirs, "final_logit_softcapping", None),
    }
    assert (query_scale or arch.head_dim**-0.5) == pytest.approx(attention.scaling)
    rotary = type(reference.model.rotary_emb)(theirs)
    for layer, block in zip(layers, reference.model.layers, strict=True):
        window = getattr(block.self_attn, "sliding_window", None)
        if theirs.model_type == "mistral":
            window = theirs.sliding_window
        assert layer.window == window
        frequencies = getattr(rotary, f"{getattr(block.self_attn, 'layer_type', None)}_inv_freq", None)
        frequencies = rotary.inv_freq if frequencies is None else frequencies
        np.testing.assert_allclose(layer.rope.frequencies(arch.head_dim), frequencies, rtol=2e-6)


def old_spelling(config, key="rope_type"):
    """A config.json as repositories from before transformers 5 have it."""
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    rope = config["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
    rope_scaling = {key: rope["rope_type"], **scaling} if rope["rope_type"] != "default" else None
    return {**old, "rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("name", HUB)
def test_a_public_config_means_what_it_means_to_transformers(name):
    config, weights_in_all = HUB[name]
    arch, theirs = read(config, name), resolved(config)
    means_the_same(arch, theirs)
    reference = on_meta(theirs)
    assert type(reference).__name__ in config["architectures"]
    assert arch.parameter_count() == sum(p.numel() for p in reference.parameters()) == weights_in_all
    # As transformers writes it today.
    assert read(json.loads(theirs.to_json_string(use_diff=False)), name) == arch


@pytest.mark.parametrize(
    ("case", "key"),
    # transformers 5 ignores a rope_scaling of Gemma 3 whose kind is under "type"; no public file has one.
    [(case, key) for case in CASES for key in ("rope_type", "type") if key != "type" or case.family != "gemma3_text"],
    ids=str,
)
def test_old_and_new_spellings_mean_the_same(case, key):
    new = json.loads(case.hf_config().to_json_string(use_diff=False))
    old = old_spelling(new, key)
    arch = read(new, "new")
    assert read(old, "old") == arch
    means_the_same(arch, resolved(new))
    means_the_same(arch, resolved(old))
    assert arch.parameter_count() == sum(p.numel() for p in on_meta(resolved(old)).parameters())


@pytest.mark.parametrize("family", FOREMOST)
@pytest.mark.parametrize("given", [{}, {"use_sliding_window": True}], ids=["", "use_sliding_window"])
def test_absent_keys_mean_what_they_mean_to_transformers(family, given):
    sizes = {"vocab_size": 99, "hidden_size": 256, "intermediate_size": 96}
    config = {"model_type": family, **sizes, "num_hidden_layers": 30, "num_attention_heads": 32, **given}
    arch, theirs = read(config, "config.json"), resolved(config)
    means_the_same(arch, theirs)
    assert arch.parameter_count() == sum(p.numel() for p in on_meta(theirs).parameters())


SUPPORTED = [f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("Llama-2-7b-hf", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "'dynamic'"]),
        ("Qwen2.5-7B", {"rope_scaling": {**YARN, "type": "yarn"}}, ["rope_scaling", "'yarn'"]),
        ("Qwen3-8B", {"rope_parameters": {**YARN, "rope_theta": 1e6}}, ["rope_parameters", "'yarn'"]),
        ("Meta-Llama-3-8B", {"rope_parameters": LONG}, ["rope_parameters", "'longrope'"]),
        (
            "gemma-3-1b-it",
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT_ROPE}},
            ["rope_parameters", "'yarn'"],
        ),
        (
            "gemma-3-1b-it",
            {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": LONG}},
            ["rope_parameters", "'longrope'"],
        ),
        ("Llama-3.1-8B", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        (
            "Qwen3-0.6B",
            {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.25}},
            ["partial_rotary_factor is 0.25"],
        ),
        ("Qwen2-7B", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
        ("gemma-2-2b", {"quantization_config": {"load_in_8bit": True}}, ["quantization_config"]),
        ("Llama-3.2-1B", {"hidden_act": "relu"}, ["hidden_act is 'relu'"]),
        ("Qwen3-0.6B", {"hidden_act": ["silu"]}, ["hidden_act is ['silu']"]),
        ("gemma-2-2b", {"hidden_activation": "relu"}, ["hidden_activation is 'relu'"]),
        ("gemma-3-1b-it", {"hidden_activation": "gelu_new"}, ["hidden_activation is 'gelu_new'"]),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0"]),
        ("gemma-2-9b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("Qwen2-7B", {"layer_types": ["full_attention"] * 27 + ["chunked_attention"]}, ["layer_types", "'chunked_"]),
        ("Qwen3-0.6B", {"layer_types": ["linear_attention"] * 28}, ["layer_types", "'linear_attention'"]),
        ("gemma-3-1b-it", {"layer_types": ["full_attention"] * 25}, ["layer_types", "25", "26"]),
        ("Qwen3-8B", {"architectures": ["Qwen3ForSequenceClassification"]}, ["Qwen3ForSequenceClassification"]),
        (
            "Qwen3-8B",
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            ["'qwen3_moe'", *SUPPORTED],
        ),
        ("Mistral-7B-v0.1", {"model_type": "mixtral", "architectures": None}, ["'mixtral'", *SUPPORTED]),
        ("gemma-2-2b", {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, ["'gemma'", *SUPPORTED]),
        (
            "gemma-3-1b-it",
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
            ["'gemma3'", "image encoder", "Gemma3ForCausalLM"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_computed_is_refused_by_name(name, changes, parts):
    config = {**HUB[name][0], **changes}
    if "rope_parameters" in changes:
        for key in ("rope_scaling", "rope_theta", "rope_local_base_freq"):
            config.pop(key, None)
    refused(lambda: read(config, "dir/config.json"), "dir/config.json: ", *parts)


@pytest.mark.parametrize(
    "name", ["Llama-3.1-8B", "Mistral-7B-v0.1", "Qwen2.5-7B", "Qwen3-8B", "gemma-2-2b", "gemma-3-1b-it"]
)
def test_any_value_of_any_key_is_understood_or_refused(name):
    old = HUB[name][0]
    for config in (old, json.loads(resolved(old).to_json_string(use_diff=False)), {**old, "use_sliding_window": True}):
        for path in [(key,) for key in config] + [("rope_scaling", key) for key in config.get("rope_scaling") or {}]:
            for value in (None, "x", "", -1, 0, 1, 2.5, float("nan"), True, [], ["x"], [[]], {}, {"x": [1]}):
                changed = copy.deepcopy(config)
                (changed if len(path) == 1 else changed[path[0]])[path[-1]] = value
                try:
                    arch = read(changed, "dir/config.json")
                except InputError as error:
                    assert str(error).startswith("dir/config.json: ") and len(str(error)) < 400
                else:
                    hash(arch)
                    assert arch.parameter_count() > 0
                    for layer in arch.kinds:
                        assert np.isfinite(layer.rope.frequencies(arch.head_dim)).all()


def test_the_text_model_of_gemma3_with_images_is_taken_out_as_the_refusal_says(tmp_path):
    text_config = CASES[13].hf_config().to_dict()
    vision_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision_config |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text_config, vision_config=vision_config, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "full")
    refused(
        lambda: weights.load(tmp_path / "full"),
        str(tmp_path / "full" / "config.json"),
        "text = Gemma3ForCausalLM(full.config.text_config)",
        "text.model.load_state_dict(full.model.language_model.state_dict())",
        "text.save_pretrained",
    )
    full = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "full")
    text = transformers.Gemma3ForCausalLM(full.config.text_config)
    text.model.load_state_dict(full.model.language_model.state_dict())
    text.save_pretrained(tmp_path / "text")
    arch, params = weights.load(tmp_path / "text")
    model, (ids_BT, valid_BT) = decoder.define(arch), families.random_rows()
    logits = quick_jit(lambda params: model.logits(params, model.hidden(params, ids_BT)))(params)
    expected = families.torch_logits(full.eval(), ids_BT, valid_BT)
    assert families.worst(np.asarray(logits)[valid_BT], expected[valid_BT]) <= TOLERANCE
