"""PEFT directories that are broken, of another model or of another kind: refused by name, with the file."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scir_jax.config.schema import LoraConfig
from scir_jax.errors import InputError
from scir_jax.model.hf import adapters
from scir_jax.run.models import adapters_of
from tests.model.small_adapters import CONFIG, TENSORS


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
