"""Blockwise and splash attention, whose operations are interpreted, against XLA's: values, gradients, whole models, a
mesh; and the choice between implementations."""

import functools
import importlib.util
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from scir_jax.config.checks import resolve
from scir_jax.config.schema import MeshConfig
from scir_jax.engine import mesh as meshes
from scir_jax.errors import InputError
from scir_jax.model import attention as attentions
from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.model.attention import attention, chosen, refusal
from scir_jax.model.logprobs import token_logprobs
from scir_jax.model.sharding import Layout
from scir_jax.model.splash import BLOCKS, LANES, blocks
from scir_jax.run.setup import prepare
from tests.processes import elsewhere, on_eight_devices, quick_jit

# Layers of one kind; and of two kinds, chosen at run time, one of which has a window and both a cap.
MISTRAL = Architecture("mistral", 61, 32, 44, 4, 2, 8, layers=(Layer(window=40),) * 2)
GEMMA = Architecture(
    "gemma2", 61, 32, 44, 4, 2, 16, layers=(Layer(window=40), Layer()), attention_cap=2.0, query_scale=0.3
)


def random_inputs(batch, tokens, heads, kv_heads, dim, dtype=jnp.float32):
    """Queries, keys, values and the gradient of the result."""
    shapes = [(batch, tokens, heads, dim), *[(batch, tokens, kv_heads, dim)] * 2, (batch, tokens, heads, dim)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def random_segments(batch, tokens):
    starts = np.random.default_rng(0).random((batch, tokens)) < 0.02
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def value_and_gradients(implementation, inputs, **settings):
    *qkv, cotangent = inputs

    def run(*qkv):
        mixed, pullback = jax.vjp(functools.partial(attention, implementation=implementation, **settings), *qkv)
        return mixed, *pullback(cotangent)

    return jax.jit(run)(*qkv)


def close(ours, theirs, tolerance):
    """The largest difference in units of the largest value."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0
        assert np.abs(a - b).max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "window", "cap", "segmented"),
    [
        (256, 4, 2, 16, None, None, False),
        (200, 4, 1, 8, 50, None, True),  # one block, padded
        (640, 2, 2, 24, 130, 3.0, False),  # two blocks, the second padded
        (1000, 3, 3, 8, 100, None, True),  # blocks that the window leaves empty
        (520, 6, 2, 16, None, 3.0, True),
        (2100, 2, 1, 8, 600, 3.0, True),  # so many blocks that two kernels go backward
    ],
)
@pytest.mark.parametrize("implementation", ["blocks", pytest.param("splash", marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_xla(implementation, tokens, heads, kv_heads, dim, window, cap, segmented):
    inputs = random_inputs(2, tokens, heads, kv_heads, dim)
    settings = dict(window=window, cap=cap, segments_BT=random_segments(2, tokens) if segmented else None)
    ours = value_and_gradients(implementation, inputs, scale=0.5, **settings)
    close(ours, expected_values(tokens, heads, kv_heads, dim, window, cap, segmented), 1e-5)


@functools.cache
def expected_values(tokens, heads, kv_heads, dim, window, cap, segmented):
    segments = random_segments(2, tokens) if segmented else None
    inputs = random_inputs(2, tokens, heads, kv_heads, dim)
    return value_and_gradients("xla", inputs, scale=0.5, window=window, cap=cap, segments_BT=segments)


@pytest.mark.parametrize(("backend", "tokens"), [("gpu", 100), ("gpu", 300), ("tpu", 530)])
@pytest.mark.parametrize("segmented", [False, True])
def test_blocks_of_every_backend_are_those_of_xla(backend, tokens, segmented):
    # Larger blocks than a CPU's, and all rows of a batch together.
    inputs = random_inputs(3, tokens, 4, 2, 8)
    settings = dict(window=90, cap=2.0, segments_BT=random_segments(3, tokens) if segmented else None)
    ours = value_and_gradients("blocks", inputs, backend=backend, **settings)
    close(ours, value_and_gradients("xla", inputs, **settings), 1e-5)


def test_blocks_hold_no_scores(optimised):
    def bytes_of(tokens, implementation):
        inputs = [jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16) for heads in (8, 2, 2, 8)]

        def run(q, k, v, cotangent):
            return jax.vjp(functools.partial(attention, implementation=implementation), q, k, v)[1](cotangent)

        return jax.jit(run).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    long, short = bytes_of(8192, "blocks"), bytes_of(2048, "blocks")
    assert long < 4.4 * short  # linear in the tokens
    assert bytes_of(8192, "xla") > 8 * long


def test_blocks_between_segments_are_skipped():
    q, k, v, cotangent = random_inputs(2, 512, 2, 1, 8)
    segments = jnp.repeat(jnp.arange(8), 64)[None].repeat(2, axis=0)
    # A key that is not a number spoils every block that it is computed in.
    k = k.at[:, :64].set(jnp.nan)
    mixed, dq, dk, dv = value_and_gradients("blocks", (q, k, v, cotangent), segments_BT=segments)
    for result in (mixed, dq, dk, dv):
        assert np.isnan(result[:, :64]).any()
        assert np.isfinite(result[:, 64:]).all()


def test_a_segment_sees_no_other_to_the_bit():
    q, k, v, cotangent = random_inputs(2, 300, 2, 1, 8)
    segments = random_segments(2, 300)
    inside = np.asarray(segments == segments[:, 150:151])[..., None, None]
    assert 0 < inside.sum() < inside.size
    results = [
        value_and_gradients(
            "blocks", [jnp.where(inside, x + shift, x) for x in (q, k, v, cotangent)], segments_BT=segments
        )
        for shift in (0.0, 1.0)
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(np.where(inside, 0, one), np.where(inside, 0, other))
        assert (np.where(inside, one, 0) != np.where(inside, other, 0)).any()


@pytest.mark.slow
def test_bfloat16_rounds_hardly_more_than_in_xla():
    # head_dim ** -0.5 is no power of two here, so that scaling the queries rounds them.
    inputs = random_inputs(1, 1024, 2, 1, 128)
    exact = value_and_gradients("xla", inputs)
    errors = {}
    for implementation in ("splash", "blocks", "xla"):
        rounded = value_and_gradients(implementation, [x.astype(jnp.bfloat16) for x in inputs])
        errors[implementation] = [
            np.sqrt(np.mean((np.asarray(a, np.float32) - b) ** 2)) for a, b in zip(rounded, exact, strict=True)
        ]
    for name in ("splash", "blocks"):
        assert all(0 < s < 1.3 * x for s, x in zip(errors[name], errors["xla"], strict=True)), name


@pytest.mark.parametrize("implementation", ["xla", "blocks", pytest.param("splash", marks=pytest.mark.slow)])
def test_segments_are_rows_of_their_own(implementation):
    q, k, v, _ = random_inputs(1, 128, 2, 1, 8)
    segments = jnp.repeat(jnp.array([[7, 0, 3]]), jnp.array([50, 8, 70]), axis=1)
    packed = jax.jit(functools.partial(attention, window=30, implementation=implementation))(
        q, k, v, segments_BT=segments
    )
    for start, end in ((0, 50), (50, 58), (58, 128)):
        alone = attention(*(x[:, start:end] for x in (q, k, v)), window=30, implementation="xla")
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocks", pytest.param("splash", marks=pytest.mark.slow)])
def test_padding_is_finite_and_seen_by_no_query(implementation):
    attend = jax.jit(functools.partial(attention, implementation=implementation))
    q, k, v, _ = random_inputs(1, 140, 2, 1, 8)
    whole = attend(q, k, v)
    k, v = (x.at[:, 100:].set(50.0) for x in (k, v))
    padded = attend(q, k, v)
    np.testing.assert_array_equal(padded[:, :100], whole[:, :100])
    assert np.isfinite(padded).all()


@pytest.mark.parametrize("tokens", [1, 128, 129, 512, 513, 600, 768, 1100, 1664, 2048, 2304, 4096, 5000])
def test_blocks_divide_rows_that_are_hardly_longer(tokens):
    length, block = blocks(tokens)
    assert block % LANES == 0
    assert length % block == 0
    assert block <= BLOCKS[0]
    assert 0 <= length - tokens < max(LANES, BLOCKS[-1])
    if tokens % BLOCKS[0] == 0:
        assert (length, block) == (tokens, BLOCKS[0])


# --- whole models -----------------------------------------------------------------------------------------------------


@functools.cache
def random_params(arch):
    """Parameters large enough for attention to matter."""
    params = jax.jit(decoder.define(arch).init)(jax.random.key(0))
    return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)


def random_ids(rows=8, length=150):
    return np.random.default_rng(1).integers(0, 61, (rows, length)).astype(np.int32)


def logps_and_gradient(model, micro=1):
    """(params, ids [B, T]) -> mean log-probability of the ids, and its gradient, over micro-batches."""

    def mean(params, ids):
        def part(carry, ids):
            hidden = model.hidden(params, ids)[:, :-1]
            logps = token_logprobs(hidden, model.head(params), ids[:, 1:])
            return carry + logps.mean() / micro, None

        return jax.lax.scan(jax.checkpoint(part, prevent_cse=False), 0.0, ids.reshape(micro, -1, ids.shape[-1]))[0]

    return jax.value_and_grad(mean)


@functools.cache
def expected(arch):
    """Log-probability and gradient of `random_ids` with XLA's attention, on one device."""
    return quick_jit(logps_and_gradient(decoder.define(arch, attention="xla")))(random_params(arch), random_ids())


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["blocks", "splash"])
@pytest.mark.parametrize(("arch", "remat"), [(GEMMA, "full"), (MISTRAL, "dots")], ids=["gemma", "mistral"])
def test_a_model_computes_the_same(arch, remat, attention):
    model = decoder.define(arch, attention=attention, remat=remat)
    params, ids = random_params(arch), random_ids()
    close(quick_jit(logps_and_gradient(model, micro=2))(params, ids), expected(arch), 2e-5)


def test_the_kernel_belongs_to_no_trace():
    params, ids = random_params(MISTRAL), random_ids(1)
    model = decoder.define(MISTRAL, attention="splash")
    first = quick_jit(model.hidden)(params, ids)
    again = quick_jit(lambda params, ids: model.prefill(params, ids)[0])(params, ids)
    close(again, first, 1e-6)
    q, k, v, _ = random_inputs(1, 150, 4, 2, 8)
    attention(q, k, v, window=40, implementation="splash")


def sharded(attention):
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = decoder.define(GEMMA, attention=attention, remat="full", layout=Layout(mesh))
    params = jax.device_put(random_params(GEMMA), meshes.param_shardings(model, mesh))
    result = quick_jit(logps_and_gradient(model))(params, meshes.put_batch(random_ids(), mesh))
    return list(map(np.asarray, jax.tree.leaves(result)))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["blocks", "splash"])
def test_a_mesh_changes_nothing(attention):
    close(on_eight_devices(sharded, attention), jax.tree.leaves(expected(GEMMA)), 2e-5)


# --- the choice -------------------------------------------------------------------------------------------------------


def taken(monkeypatch, backend, dtype=jnp.bfloat16, tokens=256, dim=16, **settings):
    """The implementation that "auto" takes, which is the one that `chosen` names."""
    calls = []
    monkeypatch.setattr(attentions, "splash", lambda q, *a, **k: calls.append("splash") or q)
    monkeypatch.setattr(attentions, "blockwise", lambda q, *a, **k: calls.append("blocks") or q)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *a, **k: calls.append(k["implementation"]) or q)
    q, k, v, _ = random_inputs(1, tokens, 2, 1, dim, dtype)
    shape = jax.eval_shape(lambda: attention(q, k, v, backend=backend, **settings)).shape
    assert shape == q.shape
    monkeypatch.undo()
    found = calls[0] if calls else "xla"
    segmented = settings.pop("segments_BT", None) is not None
    assert found == chosen("auto", backend, dtype, tokens=tokens, head_dim=dim, segmented=segmented, **settings)
    return found


def test_auto_takes_what_the_backend_has(monkeypatch):
    of = functools.partial(taken, monkeypatch)
    segments = jnp.zeros((1, 256), jnp.int32)
    assert of("cpu", tokens=128) == "xla"
    assert of("cpu") == of("cpu", jnp.float32) == "blocks"
    assert of("gpu") == of("gpu", jnp.float16) == of("gpu", tokens=8) == "cudnn"
    assert of("gpu", jnp.float32) == of("gpu", cap=2.0) == of("gpu", segments_BT=segments) == "xla"
    assert of("gpu", jnp.float32, 600) == of("gpu", tokens=600, cap=2.0) == of("gpu", tokens=600, dim=256) == "blocks"
    assert of("gpu", tokens=600, segments_BT=jnp.zeros((1, 600), jnp.int32)) == "blocks"
    assert of("gpu", dim=256) == "xla"
    assert of("tpu") == of("tpu", jnp.float32) == of("tpu", cap=2.0) == of("tpu", segments_BT=segments) == "splash"
    assert of("tpu", tokens=255) == of("tpu", jnp.float16) == "xla"
    assert of("tpu", jnp.float16, 600) == "blocks"
    q, k, v, _ = random_inputs(1, 1, 2, 1, 8)
    k, v = (jnp.repeat(x, 300, axis=1) for x in (k, v))
    positions = jnp.array([5])
    for backend in ("gpu", "tpu"):  # one query against a cache
        assert attention(q, k, v, positions_B=positions, backend=backend).shape == q.shape


def test_the_backend_is_that_of_the_layouts_devices(monkeypatch):
    layout = Layout(meshes.make_mesh(MeshConfig()))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attentions.backend_of(None) == "gpu"
    assert attentions.backend_of(layout) == "cpu"
    for platform, backend in (("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu")):
        devices = np.array([[SimpleNamespace(platform=platform)]])
        assert attentions.backend_of(SimpleNamespace(mesh=SimpleNamespace(devices=devices))) == backend


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("splash", "gpu", "bfloat16", None), "TPUs and this is a GPU"),
        (("splash", "tpu", "float16", None), "not in float16"),
        (("cudnn", "cpu", "bfloat16", None), "GPUs and this is a CPU"),
        (("cudnn", "gpu", "float32", None), "not in float32"),
        (("cudnn", "gpu", "bfloat16", 50.0), "capped"),
    ],
)
def test_what_cannot_be_computed_is_refused(case, words):
    implementation, backend, dtype, cap = case
    assert words in refusal(*case)
    q, k, v, _ = random_inputs(1, 8, 2, 1, 8, dtype)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, cap=cap, implementation=implementation, backend=backend)


def test_what_is_asked_for_is_chosen():
    for name in ("xla", "blocks", "cudnn", "splash"):
        assert chosen(name, "gpu", jnp.bfloat16, tokens=8, head_dim=16) == name


def test_what_can_be_computed_is_not_refused():
    for case in (
        ("splash", "tpu", "bfloat16", 50.0),
        ("splash", "cpu", "float32", None),
        ("cudnn", "gpu", "float16", None),
        ("auto", "gpu", "float32", 50.0),
        ("blocks", "gpu", "float32", 50.0),
        ("xla", "tpu", "float16", 50.0),
    ):
        assert refusal(*case) is None


def test_segments_that_are_not_supported_are_refused():
    q, k, v, _ = random_inputs(1, 8, 2, 1, 8, jnp.bfloat16)
    segments = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="cuDNN attention takes no segments"):
        attention(q, k, v, segments_BT=segments, implementation="cudnn", backend="gpu")
    with pytest.raises(ValueError, match="takes no segments"):
        attention(q[:, :1], k, v, segments_BT=segments, positions_B=jnp.array([3]))


def test_refusals_come_when_a_model_is_defined(monkeypatch, tiny_config, world_dir):
    config = tiny_config(world_dir, model=dict(path=f"{world_dir}/model", attention="cudnn"))
    with pytest.raises(InputError, match="model.attention is cudnn, but cuDNN runs on GPUs"):
        prepare(resolve(config))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="attention is splash, but splash attention runs on TPUs"):
        decoder.define(MISTRAL, attention="splash")


# --- compiled for TPUs ------------------------------------------------------------------------------------------------

TPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
# Head dimensions, windows, caps and grouping of Mistral 7B, Gemma 2 and Llama 3.2 1B, otherwise small; length of the
# rows, and the kernels that go backward: one up to 2048 tokens.
COMPILED = {
    "mistral": (Architecture("mistral", 512, 256, 512, 8, 2, 128, layers=(Layer(window=1024),) * 2), 4096, 2),
    "gemma": (
        Architecture("gemma2", 512, 256, 512, 4, 2, 256, layers=(Layer(window=1024), Layer()), attention_cap=50.0),
        2048,
        1,
    ),
    "llama": (Architecture("llama", 512, 256, 512, 8, 2, 64, layers=(Layer(),) * 2), 1000, 1),
}


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="needs libtpu")
def test_the_training_of_a_model_compiles_for_tpus():
    # The first lets a machine without TPUs load the compiler, the second two processes of one machine.
    found = elsewhere(compiled_for, "v5e:2x2", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    for name, (arch, _, backward) in COMPILED.items():
        # forward, forward again and backward, of each kind of layer
        assert found[name]["auto"]["kernels"] == (2 + backward) * len(arch.kinds), name
    assert found["mistral"]["xla"]["kernels"] == 0
    assert found["mistral"]["auto"]["bytes"] < 0.2 * found["mistral"]["xla"]["bytes"]


def compiled_for(topology):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(1, 2, 2), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    found = {}
    for name, (arch, tokens, _) in COMPILED.items():
        for implementation in ("auto", "xla") if name == "mistral" else ("auto",):
            model = decoder.define(
                arch, compute_dtype="bfloat16", attention=implementation, remat="full", layout=Layout(mesh)
            )
            shardings = meshes.param_shardings(model, mesh)
            params = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                model.abstract(),
                shardings,
            )
            ids = jax.ShapeDtypeStruct((4, tokens), jnp.int32, sharding=meshes.batch_sharding(mesh))
            gradient = jax.grad(lambda params, ids, model: model.hidden(params, ids).astype(jnp.float32).sum())
            step = jax.jit(gradient, static_argnums=2, out_shardings=shardings)
            compiled = step.lower(params, ids, model).compile()
            found.setdefault(name, {})[implementation] = {
                "kernels": compiled.as_text().count("tpu_custom_call"),
                "bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
    return found
