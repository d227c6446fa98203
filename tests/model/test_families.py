"""Every model family against transformers: logits, cache, sampling, gradients, files, and on a mesh."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from scir_jax.config.schema import MeshConfig
from scir_jax.data.batches import SlotSpec
from scir_jax.engine import mesh as meshes
from scir_jax.engine.sampler import Sampler, Sampling, stream_key
from scir_jax.model import decoder
from scir_jax.model.hf import weights
from scir_jax.model.logprobs import log_normalizer, read_verdicts, token_logprobs, verdict_logits
from scir_jax.model.sharding import Layout
from tests import families
from tests.families import CASES, FOREMOST, PROMPTS, TOLERANCE, refused
from tests.processes import on_eight_devices, quick_jit

RESPONSE = 11


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """imported(case) -> families.Imported, made once."""
    return functools.cache(lambda case: families.import_case(case, tmp_path_factory.mktemp("model") / "theirs"))


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_family = pytest.mark.parametrize("case", FOREMOST.values(), ids=FOREMOST.keys())


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "feature"), [(case, feature) for case in CASES for feature in case.off], ids=lambda value: str(value)
)
def test_every_feature_shows_in_the_reference(imported, case, feature):
    ids_BT, valid_BT = families.random_rows()
    without = families.altered(imported(case).reference, case.hf_config(**case.off[feature]))
    difference = families.torch_logits(without, ids_BT, valid_BT) - imported(case).expected
    assert np.abs(difference[valid_BT]).max() > 10 * TOLERANCE


@each_case
def test_logits_are_those_of_transformers(imported, case):
    assert families.forward_difference(imported(case)) <= TOLERANCE


@each_case
def test_cached_decoding_is_the_whole_row_of_transformers(imported, case):
    assert families.decoding_difference(imported(case)) <= TOLERANCE


@each_family
def test_bfloat16_rounds_no_more_than_in_transformers(imported, case):
    ids_BT, valid_BT = families.random_rows()
    theirs = families.torch_logits(families.random_reference(case, torch.bfloat16), ids_BT, valid_BT)
    model = decoder.define(imported(case).arch, compute_dtype="bfloat16")
    run = quick_jit(lambda params: model.logits(params, model.hidden(params, ids_BT)))
    ours = run(imported(case).params)
    exact = imported(case).expected[valid_BT]
    error, their_error = (np.sqrt(np.mean((np.asarray(x)[valid_BT] - exact) ** 2)) for x in (ours, theirs))
    assert 0 < error < 1.3 * their_error


@each_case
def test_an_export_is_the_model_that_was_imported(imported, case, tmp_path):
    assert families.export_difference(imported(case), tmp_path / "ours") <= TOLERANCE
    directories = (imported(case).directory, tmp_path / "ours")
    theirs, ours = (transformers.AutoConfig.from_pretrained(d).to_dict() | {"_name_or_path": ""} for d in directories)
    assert ours == theirs


@each_family
def test_samples_have_the_logprobs_of_transformers(imported, case):
    here = imported(case)
    prompts_BP, starts_B = families.random_rows()[0][:, : max(PROMPTS)], np.array(PROMPTS, np.int32)
    spec = SlotSpec(len(PROMPTS), len(PROMPTS), (max(PROMPTS),), RESPONSE, max(PROMPTS) + RESPONSE)
    numbered = [(i, ids[:length]) for i, (ids, length) in enumerate(zip(prompts_BP, PROMPTS, strict=True))]
    coming = spec.arrays(max(PROMPTS), numbered, {i: (i, 0) for i in range(len(PROMPTS))}, 7)
    sampler = Sampler(here.model, meshes.make_mesh(MeshConfig()), spec, stop_ids=(), pad_id=7)
    places_BR = starts_B[:, None] + np.arange(RESPONSE)

    def sample(temperature):
        """The tokens [B, R], their summed log-probabilities [B], and those of all tokens in transformers [B, R, V]."""
        setting = Sampling.of(temperature)
        slots = sampler.admit(here.params, sampler.empty(), coming)
        key, until = stream_key(0, "responses", 1), np.int32(len(PROMPTS))
        samples = sampler.read(sampler.decode(here.params, slots, key, setting, until)[0])
        assert (np.asarray(samples.lengths) == RESPONSE).all()
        tokens_BR = np.asarray(samples.ids)
        rows = np.pad(prompts_BP, [(0, 0), (0, RESPONSE)])
        np.put_along_axis(rows, places_BR, tokens_BR, axis=1)
        valid = np.arange(rows.shape[1]) < starts_B[:, None] + RESPONSE
        table = torch.tensor(families.torch_logits(here.reference, rows, valid)).log_softmax(-1).numpy()
        return tokens_BR, np.asarray(samples.logps), np.take_along_axis(table, places_BR[..., None] - 1, axis=1)

    for temperature in (0.0, 1.0):
        tokens_BR, logps_B, table_BRV = sample(temperature)
        taken_BR = np.take_along_axis(table_BRV, tokens_BR[..., None], axis=2)[..., 0]
        np.testing.assert_allclose(logps_B, taken_BR.sum(axis=1), rtol=0, atol=10 * TOLERANCE)
        if temperature == 0:
            # Not by its number: two tokens may be equally good up to rounding.
            np.testing.assert_allclose(taken_BR, table_BRV.max(axis=2), rtol=0, atol=TOLERANCE)
    assert len(np.unique(tokens_BR)) > 10


@each_family
def test_gradients_are_those_of_transformers(imported, case, tmp_path):
    here = imported(case)
    ids_BT, valid_BT = families.random_rows()
    targets_BT, counted_BT = ids_BT[:, 1:], valid_BT[:, 1:]
    model = here.model

    def total(params):
        hidden_BTD = model.hidden(params, ids_BT)[:, :-1]
        logprobs_BT = token_logprobs(hidden_BTD, model.head(params), targets_BT, chunk=37, cap=here.arch.final_cap)
        return jnp.where(counted_BT, logprobs_BT, 0).sum()

    value, gradients = quick_jit(jax.value_and_grad(total))(here.params)

    reference = copy.deepcopy(here.reference)
    logits = reference(torch.tensor(ids_BT, dtype=torch.long)).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, torch.tensor(targets_BT, dtype=torch.long)[..., None])[..., 0]
    expected = (picked * torch.tensor(counted_BT)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    # Their gradients travel as a checkpoint does, into a tree like that of the parameters.
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    reference.save_pretrained(tmp_path)
    _, expected_gradients = weights.load(tmp_path)
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        largest = np.abs(expected).max()
        assert largest > 0, path
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * largest, err_msg=jax.tree_util.keystr(path))


def test_every_read_out_of_the_head_is_capped(imported):
    here = imported(FOREMOST["gemma2"])
    cap = here.arch.final_cap
    assert cap == 2.0
    ids_BT, valid_BT = families.random_rows()
    logits = torch.tensor(here.expected[valid_BT], dtype=torch.float64)
    verdict_ids = np.array([int(logits[0].argmax()), 3])  # a capped logit and another
    hidden = quick_jit(here.model.hidden)(here.params, ids_BT)[valid_BT]
    head = here.model.head(here.params)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE)
    close(verdict_logits(hidden, head, verdict_ids, cap=cap), logits[:, verdict_ids])
    close(read_verdicts(hidden, head, [verdict_ids], cap=cap)[0][1], logits.softmax(-1)[:, verdict_ids].sum(-1))
    close(log_normalizer(hidden, head, cap=cap), logits.logsumexp(-1))
    close(log_normalizer(hidden, head, chunk=37, cap=cap), logits.logsumexp(-1))


# --- files ------------------------------------------------------------------------------------------------------------


def tensors_of(directory):
    """name -> (dtype, shape, bytes) over all safetensors files."""
    return {
        name: (array.dtype, array.shape, array.tobytes())
        for path in directory.glob("*.safetensors")
        for name, array in load_file(path).items()
    }


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_byte_of_every_tensor_is_kept(case, dtype, tmp_path):
    families.random_reference(case, getattr(torch, dtype)).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    arch, params = weights.load(tmp_path / "theirs")
    config = weights.hf_config(tmp_path / "theirs")
    weights.save(tmp_path / "ours", arch, params, config=config, dtype=dtype, max_shard_bytes=20_000)
    for directory in ("theirs", "ours"):
        assert len(list((tmp_path / directory).glob("*.safetensors"))) > 1
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == getattr(torch, dtype)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (3, "mlp.down_proj.bias"),
        (6, "self_attn.k_proj.bias"),
        (9, "self_attn.q_norm.weight"),
        (10, "self_attn.o_proj.bias"),
        (11, "pre_feedforward_layernorm.weight"),
        (14, "self_attn.k_norm.weight"),
    ],
    ids=lambda value: str(CASES[value]) if isinstance(value, int) else value,
)
def test_a_tensor_of_the_family_that_is_missing_or_misshapen_is_named(imported, number, name, tmp_path):
    directory = imported(CASES[number]).directory
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    name = f"model.layers.2.{name}"
    tensor = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(lambda: weights.load(tmp_path), str(tmp_path), "lack tensors", name)
    save_file({**tensors, name: tensor[1:]}, tmp_path / "model.safetensors")
    refused(lambda: weights.load(tmp_path), str(tmp_path), f"{name} has shape [{len(tensor) - 1}]", f"[{len(tensor)}]")


# --- sharding ---------------------------------------------------------------------------------------------------------

SHARDED = {"qwen3": CASES[10], "gemma3_text": CASES[13]}


@pytest.fixture(scope="module")
def sharded(imported):
    """family -> hidden states on a 2x2x2 mesh."""
    return on_eight_devices(on_a_mesh, {family: str(imported(case).directory) for family, case in SHARDED.items()})


def on_a_mesh(models):
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    hidden = {}
    for family, model_directory in models.items():
        arch, params = weights.load(model_directory)
        model = decoder.define(arch, layout=Layout(mesh))
        params = jax.device_put(params, meshes.param_shardings(model, mesh))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"]):
            if path[-1].key == "weight":  # split over fsdp and tensor
                assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes / 4, path
        ids = meshes.put_batch(rows_to_share(), mesh)
        hidden[family] = np.asarray(jax.jit(model.hidden)(params, ids))
    return hidden


def rows_to_share():
    """ids [8, T]: as many rows as make two a device of the batch's axes."""
    return np.random.default_rng(1).integers(0, 101, (8, 13)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("family", SHARDED)
def test_a_mesh_does_not_change_the_hidden_states(sharded, imported, family):
    here = imported(SHARDED[family])
    alone = quick_jit(here.model.hidden)(here.params, rows_to_share())
    np.testing.assert_allclose(sharded[family], alone, rtol=0, atol=2e-5)
