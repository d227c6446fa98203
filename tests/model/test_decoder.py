"""The decoder against transformers, and against itself: padding, cache, precision, rematerialisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from scir_jax.errors import InputError
from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture, Layer, Rope
from scir_jax.model.attention import attention
from scir_jax.model.families import read
from scir_jax.model.hf import weights
from tests.caches import prefilled

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window=None,
)
ARCH = Architecture("mistral", 61, 32, 44, 4, 2, 8, layers=(Layer(),) * 2)
WINDOWED = Architecture("mistral", 61, 32, 44, 4, 2, 8, layers=(Layer(window=4),) * 2)


def torch_model(family, **changes):
    """A random transformers model whose attention is far from uniform, unlike at initialisation."""
    torch.manual_seed(0)
    values = {**SMALL, **changes}
    if family == "llama":
        values.pop("sliding_window")
    config = {"mistral": transformers.MistralConfig, "llama": transformers.LlamaConfig}[family](**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids))).logits.numpy()


@functools.cache
def random_params(arch):
    """Parameters large enough for attention to matter."""
    params = jax.jit(decoder.define(arch).init)(jax.random.key(0))
    return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)


def random_ids(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 61)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("mistral", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("mistral", {"head_dim": 12, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": None}),
    ],
    ids=["grouped", "multi-head tied", "head_dim", "window", "llama", "llama tied"],
)
def test_logits_are_those_of_transformers(tmp_path, family, changes):
    reference = torch_model(family, **changes)
    reference.save_pretrained(tmp_path)
    arch, params = weights.load(tmp_path)
    model = decoder.define(arch)
    ids = random_ids(3, 17)
    logits = jax.jit(lambda params: model.hidden(params, ids) @ model.head(params).T)(params)
    expected = torch_logits(reference, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_parameters_are_plain_dictionaries_described_by_the_model():
    for arch in (ARCH, Architecture("llama", 61, 32, 44, 4, 4, 8, layers=(Layer(),) * 3, tie_embeddings=True)):
        model = decoder.define(arch)
        params = jax.jit(model.init)(jax.random.key(0))
        assert sum(p.size for p in jax.tree.leaves(params)) == arch.parameter_count()
        assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
            lambda p: (p.shape, p.dtype), model.abstract()
        )
        ranks = jax.tree.map(lambda p, axes: p.ndim == len(axes), params, model.logical_axes())
        assert all(jax.tree.leaves(ranks))
        assert {type(node) for node in (params, params["layers"], params["norm"])} == {dict}
        assert np.std(params["embed"]) == pytest.approx(0.02, rel=0.1)
        assert np.all(params["norm"]["scale"] == 1)
        q_L = params["layers"]["attention"]["q"]["weight"]
        assert not np.array_equal(q_L[0], q_L[1])
    assert hash(decoder.define(ARCH)) == hash(decoder.define(ARCH))


@pytest.mark.parametrize("arch", [ARCH, WINDOWED], ids=["full", "window"])
def test_padding_at_the_right_changes_nothing(arch):
    hidden = jax.jit(decoder.define(arch).hidden)
    params, ids = random_params(arch), random_ids(2, 9)
    alone = hidden(params, ids)
    for pad in (0, 7):
        padded = hidden(params, jnp.pad(ids, ((0, 0), (0, 20)), constant_values=pad))
        np.testing.assert_allclose(padded[:, :9], alone, atol=1e-5)
        assert np.isfinite(padded).all()


@pytest.mark.parametrize(
    ("arch", "stacks"),
    [
        (ARCH, [(2, 15)]),
        (WINDOWED, [(2, 4)]),
        (dataclasses.replace(ARCH, layers=tuple(map(Layer, (4, None, 6, 4)))), [(1, 15), (1, 6), (2, 4)]),
    ],
    ids=["full", "window", "mixed"],
)
def test_decoding_with_a_cache_equals_the_full_row(arch, stacks, few_functions):
    model = decoder.define(arch)
    params, ids = random_params(arch), random_ids(3, 14)
    full = jax.jit(model.hidden)(params, ids)
    lengths = np.array([2, 7, 5])  # of the prompts, padded to 7 with an id that is not there
    prompts = np.where(np.arange(7) < lengths[:, None], ids[:, :7], 60)
    first, cache = jax.jit(lambda params: prefilled(model, params, prompts, lengths, 15))(params)
    assert [(k.shape, v.shape) for k, v in cache] == [((layers, 3, n, 2, 8),) * 2 for layers, n in stacks]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first[row, :length], full[row, :length], atol=2e-5)
    step = jax.jit(model.decode, donate_argnums=3)
    rows = np.arange(3)
    for offset in range(7):
        positions = (lengths + offset).astype(np.int32)
        hidden, cache = step(params, ids[rows, positions], positions, cache)
        np.testing.assert_allclose(hidden, full[rows, positions], atol=2e-5)
    assert step._cache_size() == 1


def test_a_cache_too_short_for_the_prompts_is_refused():
    model = decoder.define(ARCH)
    with pytest.raises(ValueError, match="cache of 4 places"):
        jax.eval_shape(
            lambda params: prefilled(model, params, np.zeros((1, 5), np.int32), np.array([5]), 4), model.abstract()
        )


def test_bfloat16_compute_is_close_and_leaves_the_parameters_in_float32():
    params, ids = random_params(ARCH), random_ids(2, 12)
    exact = jax.jit(decoder.define(ARCH).hidden)(params, ids)
    model = decoder.define(ARCH, compute_dtype="bfloat16")

    def total(params):
        hidden = model.hidden(params, ids)
        return hidden.astype(jnp.float32).sum(), hidden

    gradient, hidden = jax.jit(jax.grad(total, has_aux=True))(params)
    assert hidden.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert np.abs(hidden.astype(np.float32) - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_value(remat):
    params, ids = random_params(WINDOWED), random_ids(2, 9)

    def value_and_gradient(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.hidden(p, ids)))))(params)

    plain = value_and_gradient(decoder.define(WINDOWED))
    again = value_and_gradient(decoder.define(WINDOWED, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


@pytest.mark.parametrize("option", ["compute_dtype", "attention", "remat"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=option):
        decoder.define(ARCH, **{option: "no"})


def test_attention_is_softmax_over_the_visible_keys():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 6, 4, 8)), rng.normal(size=(2, 6, 2, 8)), rng.normal(size=(2, 6, 2, 8))
    scores = np.einsum("bthd,bshd->bhts", q, k.repeat(2, axis=2)) / np.sqrt(8)
    distance = np.arange(6)[:, None] - np.arange(6)
    scores = np.where((distance >= 0) & (distance < 3), scores, -np.inf)
    weights_ = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights_, v.repeat(2, axis=2))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    np.testing.assert_allclose(attention(q, k, v, window=3), expected, atol=1e-5)
    positions = jnp.array([4, 1])
    one = attention(q[jnp.arange(2), positions][:, None], k, v, positions_B=positions, window=3)
    np.testing.assert_allclose(one[:, 0], expected[np.arange(2), positions], atol=1e-5)
    with pytest.raises(ValueError, match="flash"):
        attention(q, k, v, implementation="flash")


def test_both_spellings_of_a_config_mean_the_same():
    old = {**SMALL, "model_type": "mistral", "rope_theta": 7.0, "rope_scaling": None, "head_dim": None}
    new = {**SMALL, "model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    arch = read(old, "c")
    assert arch == read(new, "c")
    assert arch.layers == (Layer(window=None, rope=Rope(theta=7.0)),) * 2
    assert arch.head_dim == 8


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_absent_keys_mean_what_they_mean_to_transformers(family, tmp_path):
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {"model_type": family, **{key: SMALL[key] for key in required}, "num_attention_heads": 8}
    arch = read(config, "c")
    theirs = transformers.AutoConfig.for_model(**config)
    assert arch.num_kv_heads == theirs.num_key_value_heads
    assert arch.head_dim == theirs.head_dim
    assert arch.layers[0].window == getattr(theirs, "sliding_window", None)
    assert arch.max_positions == theirs.max_position_embeddings
    assert arch.norm_eps == theirs.rms_norm_eps
    assert arch.layers[0].rope.theta == theirs.rope_parameters["rope_theta"]
    assert arch.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2'; supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
        ),
        ({"architectures": ["MistralForSequenceClassification"]}, "architectures is"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling asks for the rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters asks for the rope type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "the key 'hidden_size' is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types mixes"),
    ],
)
def test_configs_that_the_decoder_does_not_compute_are_refused(change, message):
    with pytest.raises(InputError, match=message) as raised:
        read({**SMALL, "model_type": "mistral", **change}, "dir/config.json")
    assert str(raised.value).startswith("dir/config.json: ")
