"""PEFT adapters against peft itself: logits, merged models, directories both ways, gradients, broken directories."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from scir_jax.config.schema import LoraConfig
from scir_jax.engine import forward
from scir_jax.errors import InputError
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import LINEARS
from scir_jax.model.hf import adapters, weights
from scir_jax.run.models import adapters_of
from tests.processes import quick_jit
from tests.training import supervised_step

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
FAMILIES = {
    "llama": dict(head_dim=12, tie_word_embeddings=True),
    "qwen2": dict(use_sliding_window=False),
    "gemma2": dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=4, attn_logit_softcapping=3.0),
    "mistral": dict(sliding_window=5, num_key_value_heads=1),
}
ALL = tuple(LINEARS)
ADAPTERS = {
    "llama": lora.Lora(3, 7.0, ALL),
    "qwen2": lora.Lora(4, 3.0, ("k_proj", "v_proj", "down_proj"), rslora=True),
    "gemma2": lora.Lora(2, 3.0, ("q_proj", "o_proj", "gate_proj", "up_proj")),
    "mistral": lora.Lora(1, 0.5, ALL, rslora=True, dropout=0.25),
}


def ids_of(rows=2, length=11):
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], (rows, length))


def random_tree(tree, seed):
    """Normal arrays in the places of `tree`, of a size that shows in the logits."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> its random model: directory, architecture, our parameters."""
    made = {}

    def make(family):
        if family not in made:
            directory = tmp_path_factory.mktemp("base") / family
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.uniform_(-0.4, 0.4).add_(0 if family == "gemma2" else 1)
                    else:
                        parameter.normal_(0, 0.5 if parameter.ndim == 1 else 1.3 * parameter.shape[-1] ** -0.5)
            model.save_pretrained(directory)
            arch, params = weights.load(directory)
            made[family] = SimpleNamespace(directory=directory, arch=arch, params=params)
        return made[family]

    return make


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """adapted(family) -> its random model with ADAPTERS[family]: exported adapter directory, joined parameters."""
    made = {}

    def make(family):
        if family not in made:
            base, settings = models(family), ADAPTERS[family]
            model = decoder.define(base.arch, lora=settings)
            trained = random_tree(lora.split(model.abstract(), settings)[0], 2)
            directory = tmp_path_factory.mktemp("adapter") / family
            adapters.save(directory, base.arch, settings, trained, base_model=str(base.directory))
            params = lora.join(trained, base.params)
            made[family] = SimpleNamespace(base=base, model=model, directory=directory, params=params, trained=trained)
        return made[family]

    return make


def torch_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def our_logits(model, params, ids):
    return np.asarray(quick_jit(lambda p: model.logits(p, model.hidden(p, ids)))(params))


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
    hidden, cache = quick_jit(lambda p: model.prefill(p, prompts, 12))(params)
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


# --- broken directories -----------------------------------------------------------------------------------------------


@pytest.fixture
def broken(adapted, models, tmp_path):
    """A fresh export to be broken: its tensors, edit(config changes), write(tensors), refused(*words)."""
    found = adapted("mistral")
    arch = found.base.arch
    adapters.save(tmp_path, arch, found.model.lora, found.trained, base_model="base")

    def edit(**changes):
        path = tmp_path / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def refused(*words, arch=arch):
        with pytest.raises(InputError) as raised:
            adapters.load(tmp_path, arch, adapters.read_config(tmp_path))
        message = str(raised.value)
        assert message.startswith(str(tmp_path)) and "\n" not in message
        for word in words:
            assert word in message

    return SimpleNamespace(
        path=tmp_path,
        tensors=load_file(tmp_path / TENSORS),
        edit=edit,
        write=lambda tensors: save_file(tensors, tmp_path / TENSORS),
        refused=refused,
    )


def test_an_adapter_of_another_model_is_refused(broken, models):
    arch = models("mistral").arch
    for changes in (dict(hidden_size=64), dict(num_kv_heads=2), dict(intermediate_size=40), dict(head_dim=10)):
        broken.refused(TENSORS, "has shape", "for another model", arch=dataclasses.replace(arch, **changes))
    broken.refused(
        "adapts a layer that the model does not have (1 layers", arch=dataclasses.replace(arch, layers=arch.layers[:1])
    )
    more = dataclasses.replace(arch, layers=arch.layers * 2)
    broken.refused("q_proj of layer 2 has no lora_a; adapt it in all layers or none", arch=more)
    broken.edit(r=2)
    broken.refused("has shape [1, ", "the model's layer asks for [2, ")


def test_an_adapter_of_some_layers_is_refused(broken):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    del broken.tensors[name]
    broken.write(broken.tensors)
    broken.refused("up_proj of layer 1 has no lora_b")


def test_an_adapter_of_other_modules_is_refused(broken):
    theirs = {name.replace("self_attn", "attn").replace("_proj", ""): x for name, x in broken.tensors.items()}
    broken.write(theirs)
    broken.refused("no tensor adapts a layer of this decoder; there are q_proj, k_proj")
    extra = "base_model.model.lm_head.lora_A.weight"
    broken.write({**broken.tensors, extra: np.zeros((1, 32), np.float32)})
    broken.refused(f"{extra} adapts a layer that the model does not have")


VARIANTS = {
    "use_dora": True,
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 1], [0, 1]],
    "trainable_token_indices": [3],
    "a_variant_of_tomorrow": {"on": 1},
}


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_of_lora_are_refused_by_name(key, broken):
    broken.edit(**{key: VARIANTS[key]})
    broken.refused(f"{CONFIG}: {key} is {VARIANTS[key]!r}, which is not supported")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'; only LORA is supported"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(r=0), "rank must be at least 1"),
        (dict(r="8"), "r must be an integer"),
        (dict(r=True), "r must be an integer"),
        (dict(lora_alpha=None), "lora_alpha and lora_dropout numbers"),
        (dict(lora_alpha=0), "alpha positive"),
        (dict(lora_alpha=float("nan")), "alpha positive"),
        (dict(lora_dropout=1), "dropout in [0, 1)"),
        (dict(lora_dropout="0.1"), "lora_alpha and lora_dropout numbers"),
        (dict(use_rslora="no"), "use_rslora must be true or false, not 'no'"),
        *((dict(init_lora_weights=n), f"init_lora_weights is '{n}'") for n in ("pissa_niter_4", "olora", "loftq")),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(changes, words, broken):
    broken.edit(**changes)
    broken.refused(CONFIG, words)


def test_missing_and_unreadable_files_are_refused(broken, tmp_path):
    path = broken.path / TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    broken.refused(f"{TENSORS}: not a readable safetensors file")
    path.unlink()
    broken.refused(f"no {TENSORS}; adapters are read from safetensors only")
    for content, words in (
        ("{", "not readable JSON"),
        ("[1]", "not readable JSON (not an object)"),
        ("[" * 10**5, "JSON"),
    ):
        (broken.path / CONFIG).write_text(content)
        broken.refused(f"{CONFIG}: ", words)
    (broken.path / CONFIG).unlink()
    broken.refused(f"no {CONFIG}, so this is not a PEFT adapter directory")


def test_an_adapter_is_not_written_over_a_file(adapted, tmp_path):
    found = adapted("llama")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file, or below one"):
            adapters.save(place, found.base.arch, found.model.lora, found.trained, base_model="")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(rank=-1), "lora.rank must not be negative, not -1"),
        (dict(rank=4, alpha=0.0), "alpha positive"),
        (dict(rank=4, alpha=float("inf")), "alpha positive"),
        (dict(rank=4, dropout=1.0), "dropout in [0, 1)"),
        (dict(rank=4, dropout=-0.1), "dropout in [0, 1)"),
        (dict(rank=4, targets=("q_proj", "wq")), "no layer is called 'wq'; there are q_proj, k_proj"),
        (dict(rank=4, targets=()), "no layer is called nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(InputError) as raised:
        adapters_of(LoraConfig(**settings))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_configuration_with_an_adapter(adapted):
    found = adapted("qwen2")
    assert adapters_of(LoraConfig()) is None
    for rank in (0, found.model.lora.rank):
        assert adapters_of(LoraConfig(rank=rank, alpha=9.0, adapter=str(found.directory))) == found.model.lora
    with pytest.raises(InputError, match="lora.rank is 5, but the adapter .* has rank 4"):
        adapters_of(LoraConfig(rank=5, adapter=str(found.directory)))
