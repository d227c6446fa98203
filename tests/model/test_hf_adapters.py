"""PEFT adapters against peft itself: logits, merged models, directories both ways, gradients, broken directories."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from scir_jax.engine import forward
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import LINEARS
from scir_jax.model.hf import adapters, weights
from tests.caches import prefilled
from tests.model.small_adapters import (
    ADAPTERS,
    ALL,
    CONFIG,
    FAMILIES,
    TENSORS,
    ids_of,
    our_logits,
    random_tree,
    torch_base,
    torch_logits,
)
from tests.processes import quick_jit
from tests.training import supervised_step

# --- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_peft(family, adapted):
    found, ids = adapted(family), ids_of()
    base = torch_base(found.base.directory)
    plain = torch_logits(base, ids)
    expected = torch_logits(peft.PeftModel.from_pretrained(base, found.directory), ids)
    assert np.abs(expected - plain).max() > 0.3
    model, params = found.model, found.params
    np.testing.assert_allclose(our_logits(model, params, ids), expected, atol=1e-4)
    # Prompts of 3 and 6 tokens, the rest a token at a time.
    lengths = np.array([3, 6])
    prompts = np.where(np.arange(6) < lengths[:, None], ids[:, :6], 60)
    hidden, cache = quick_jit(lambda p: prefilled(model, p, prompts, lengths, 12))(params)
    step = quick_jit(model.decode)
    for row, length in enumerate(lengths):
        logits = model.logits(params, hidden[row, :length])
        np.testing.assert_allclose(logits, expected[row, :length], atol=1e-4)
    for offset in range(5):
        at = lengths + offset
        decoded, cache = step(params, ids[np.arange(2), at], at, cache)
        np.testing.assert_allclose(model.logits(params, decoded), expected[np.arange(2), at], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_adapted_one(family, adapted, tmp_path):
    found, ids = adapted(family), ids_of()
    settings, arch, config = found.model.lora, found.base.arch, weights.hf_config(found.base.directory)
    with weights.stored_tensors(found.base.directory) as base:
        tensors = adapters.merged(base, found.trained, settings, wanted=True)
        weights.save(tmp_path / "merged", arch, tensors, config=config)
    expected = our_logits(found.model, found.params, ids)
    np.testing.assert_allclose(torch_logits(torch_base(tmp_path / "merged"), ids), expected, atol=1e-4)
    before, after = (load_file(path / "model.safetensors") for path in (found.base.directory, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(settings.targets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merged_weight_is_rounded_once(dtype):
    rng = np.random.default_rng(4)
    settings = lora.Lora(3, 5.0, ("q_proj",), rslora=True)
    weight, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 6, 10), (3, 10), (4, 6, 3)))
    weight = weight.astype(jnp.dtype(dtype))
    merged = lora.merge(weight, a, b, settings)
    assert merged.dtype == weight.dtype
    exact = weight.astype(np.float64) + 5 / 3**0.5 * np.einsum("hdr,ri->hdi", b.astype(np.float64), a)
    half_a_place = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(merged.astype(np.float64) - exact) <= half_a_place + 1e-5).all()
    assert np.abs(exact - weight.astype(np.float64)).max() > 1


THEIRS = {
    "list": dict(target_modules=["v_proj", "q_proj"], r=3, lora_alpha=5),
    "all-linear": dict(target_modules="all-linear", r=2, lora_alpha=8, use_rslora=True, task_type="CAUSAL_LM"),
    "expression": dict(target_modules=r".*\.mlp\.(up|down)_proj", r=5, lora_alpha=2.5, lora_dropout=0.1),
    "excluded": dict(target_modules="all-linear", exclude_modules=["o_proj"], init_lora_weights="gaussian"),
}
TARGETS = {
    "list": ("q_proj", "v_proj"),
    "all-linear": ALL,
    "expression": ("up_proj", "down_proj"),
    "excluded": tuple(name for name in ALL if name != "o_proj"),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_an_adapter_that_peft_saved(kind, models, tmp_path):
    base, ids, settings = models("qwen2"), ids_of(), THEIRS[kind]
    theirs = peft.get_peft_model(torch_base(base.directory), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    theirs.eval().save_pretrained(tmp_path)
    found = adapters.read_config(tmp_path)
    assert found == lora.Lora(
        settings.get("r", 8),
        settings.get("lora_alpha", 8),
        TARGETS[kind],
        settings.get("use_rslora", False),
        settings.get("lora_dropout", 0),
    )
    params = lora.join(adapters.load(tmp_path, base.arch, found), base.params)
    model = decoder.define(base.arch, lora=found)
    np.testing.assert_allclose(our_logits(model, params, ids), torch_logits(theirs, ids), atol=1e-4)


def test_adapters_in_half_precision_are_read(adapted, tmp_path):
    found = adapted("llama")
    theirs = peft.PeftModel.from_pretrained(torch_base(found.base.directory), found.directory)
    for dtype in (torch.bfloat16, torch.float16):
        theirs.to(dtype).save_pretrained(tmp_path)
        loaded = adapters.load(tmp_path, found.base.arch, adapters.read_config(tmp_path))
        for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(found.trained), strict=True):
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, torch.tensor(y).to(torch.bfloat16).to(dtype).float().numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_keeps_every_byte(family, adapted, tmp_path):
    found = adapted(family)
    settings = adapters.read_config(found.directory)
    assert settings == found.model.lora
    loaded = adapters.load(found.directory, found.base.arch, settings)
    assert jax.tree.structure(loaded) == jax.tree.structure(found.trained)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(found.trained), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
    # Into a directory that holds another adapter, from parameters that hold the whole model.
    other = dataclasses.replace(settings, rank=settings.rank, alpha=99.0)
    adapters.save(tmp_path, found.base.arch, other, random_tree(found.trained, 3), base_model="other")
    (tmp_path / "README.md").write_text("mine")
    adapters.save(tmp_path, found.base.arch, settings, found.params, base_model=str(found.base.directory))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, TENSORS]
    for name in (CONFIG, TENSORS):
        assert (tmp_path / name).read_bytes() == (found.directory / name).read_bytes()


def test_every_setting_of_peft_is_known():
    """One that is not is refused where it is on; the defaults of this version must not be."""
    settings = {
        f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(peft.LoraConfig)
        if not (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    }
    known = (*adapters._READ, *adapters._HARMLESS)
    assert set(known) <= settings.keys()
    assert all(value in adapters._OFF for name, value in settings.items() if name not in known)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral"])
def test_gradients_are_those_of_autograd(family, adapted):
    found, ids = adapted(family), ids_of(3, 9)
    mask = (np.random.default_rng(3).random(ids.shape) < 0.7).astype(np.float32)
    theirs = peft.PeftModel.from_pretrained(torch_base(found.base.directory), found.directory, is_trainable=True)
    theirs.eval()  # no dropout
    logps = theirs(torch.tensor(ids)).logits.log_softmax(-1)[:, :-1]
    picked = logps.gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]
    expected_loss = -(picked * torch.tensor(mask[:, 1:])).sum()
    expected_loss.backward()

    def loss(trained, frozen):
        batch = supervised_step(ids, mask)
        return forward.outputs(found.model, lora.join(trained, frozen), batch).sft["ift"][0]

    value, grads = quick_jit(jax.value_and_grad(loss))(found.trained, found.base.params)
    assert value == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    count = 0
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            assert "lora_" not in name
            continue
        linear, layer, side = adapters._parse(name.replace(".default", ""))
        module, place = LINEARS[linear]
        ours = np.asarray(grads["layers"][module][place][side][layer]).reshape(parameter.shape)
        theirs_ = parameter.grad.numpy()
        assert np.abs(ours - theirs_).max() < 1e-4 * np.abs(theirs_).max(), name
        count += 1
    assert count == 2 * 2 * len(found.model.lora.targets) == 2 * len(jax.tree.leaves(grads))


def test_the_number_of_trained_parameters(models):
    for family, settings in ADAPTERS.items():
        arch = models(family).arch
        queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        d, f = arch.hidden_size, arch.intermediate_size
        sizes = dict(q_proj=d + queries, k_proj=d + keys, v_proj=d + keys, o_proj=queries + d)
        sizes |= dict(gate_proj=d + f, up_proj=d + f, down_proj=f + d)
        trained, frozen = lora.split(decoder.define(arch, lora=settings).abstract(), settings)
        count = sum(x.size for x in jax.tree.leaves(trained))
        assert count == arch.num_layers * settings.rank * sum(sizes[name] for name in settings.targets)
        assert sum(x.size for x in jax.tree.leaves(frozen)) == arch.parameter_count()
