"""Hugging Face directories: out and in again, against transformers, and every way they can be broken."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from scir_jax.errors import InputError
from scir_jax.model import decoder
from scir_jax.model.families import read
from scir_jax.model.hf import weights

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
MISTRAL = SIZES | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 500.0,
    "sliding_window": 4,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
ARCH, TIED = (read(config, "config.json") for config in (MISTRAL, LLAMA))
CONFIGS = {ARCH: MISTRAL, TIED: LLAMA}


def save(directory, arch, params, **options):
    weights.save(directory, arch, params, **{"config": CONFIGS[arch], **options})


@functools.cache
def random_params(arch):
    params = jax.jit(decoder.define(arch).init)(jax.random.key(0))
    return jax.tree.map(lambda p: np.asarray(p * 8 if p.ndim > 2 else p), params)


def tensors_of(directory):
    """name -> (dtype, bytes) over all safetensors files."""
    return {
        name: (array.dtype, array.shape, array.tobytes())
        for path in directory.glob("*.safetensors")
        for name, array in load_file(path).items()
    }


@pytest.fixture(scope="module", params=[ARCH, TIED], ids=["mistral", "llama tied"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "export"
    params = random_params(request.param)
    save(directory, request.param, params)
    return directory, request.param, params


@pytest.fixture
def broken(tmp_path):
    """A fresh export to be broken, and its tensors."""
    save(tmp_path / "model", ARCH, random_params(ARCH))
    return tmp_path / "model", load_file(tmp_path / "model" / "model.safetensors")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_transformers_loads_an_export_and_computes_the_same_logits(exported):
    directory, arch, params = exported
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values())
    assert reference.num_parameters() == arch.parameter_count()
    model = decoder.define(arch)
    ids = np.random.default_rng(0).integers(0, 61, (2, 11))
    logits = jax.jit(lambda params: model.hidden(params, ids) @ model.head(params).T)(params)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_loading_gives_back_what_was_saved(exported):
    directory, arch, params = exported
    loaded_arch, loaded = weights.load(directory)
    assert loaded_arch == arch
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_and_export_keep_every_byte(tmp_path, dtype):
    config = transformers.MistralConfig(**MISTRAL)
    reference = transformers.MistralForCausalLM(config).to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    arch, params = weights.load(tmp_path / "theirs")
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    theirs = tmp_path / "theirs"
    assert weights.dtype_of(theirs) == dtype
    weights.save(tmp_path / "ours", arch, params, config=weights.hf_config(theirs), source=theirs, dtype=dtype)
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    config = weights.hf_config(tmp_path / "ours")
    assert (config["dtype"], config["bos_token_id"], config["eos_token_id"]) == (dtype, 3, 5)
    assert (tmp_path / "ours" / "generation_config.json").is_file()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == getattr(torch, dtype)


def test_shards_are_small_enough_and_read_by_both(exported, tmp_path):
    _, arch, params = exported
    save(tmp_path / "sharded", arch, params, max_shard_bytes=16_000)
    files = sorted(tmp_path.glob("sharded/*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(a.nbytes for a in load_file(path).values()) <= 16_000 for path in files)
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for path in files for a in load_file(path).values())
    _, loaded = weights.load(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", output_loading_info=True)
    assert not any(report.values())


def test_tokenizer_files_come_from_the_source_and_old_weights_go(tmp_path):
    params = random_params(TIED)
    source, target = tmp_path / "source", tmp_path / "target"
    save(source, TIED, params, max_shard_bytes=16_000)
    copied = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json"]
    for name in (*copied, "generation_config.json", "training_log.txt"):
        (source / name).write_text(f"{name} of the source")
    edit_config(source, my_own_key=1, torch_dtype="bfloat16")
    save(target, TIED, params, max_shard_bytes=16_000)
    (target / "README.md").write_text("mine")
    (target / "added_tokens.json").write_text("of another tokenizer")
    save(target, TIED, params, config=weights.hf_config(source), source=source)
    assert {path.name for path in target.iterdir()} == {
        *copied,
        "generation_config.json",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert (target / "tokenizer.json").read_text() == "tokenizer.json of the source"
    config = weights.hf_config(target)
    assert config["my_own_key"] == 1
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_directory_can_be_its_own_source(tmp_path):
    params = random_params(TIED)
    save(tmp_path / "model", TIED, params)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    save(tmp_path / "model", TIED, params, source=tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "model")[1], params)


def test_a_failed_export_leaves_everything_as_it_was(tmp_path):
    params = random_params(TIED)
    save(tmp_path / "model", TIED, params)
    before = tensors_of(tmp_path / "model")
    wrong = {**params, "norm": {}}
    for name in ("model", "new"):
        with pytest.raises(KeyError):
            save(tmp_path / name, TIED, wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tensors_of(tmp_path / "model") == before


def test_places_that_cannot_take_an_export_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    params = random_params(TIED)
    with pytest.raises(InputError, match="file: this is a file"):
        save(tmp_path / "file", TIED, params)
    with pytest.raises(InputError, match="run: this directory has subdirectories"):
        save(tmp_path / "run", TIED, params)


def test_rotary_buffers_and_an_equal_tied_head_are_ignored(tmp_path):
    params = random_params(TIED)
    save(tmp_path / "model", TIED, params)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path)
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "model")[1], params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, path)
    with pytest.raises(InputError, match="ties the head to the embedding, but lm_head.weight is different"):
        weights.load(tmp_path / "model")


def refuses(directory, *parts):
    with pytest.raises(InputError) as raised:
        weights.load(directory)
    message = str(raised.value)
    assert message.startswith(str(directory))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_directory_without_a_model_is_refused(tmp_path):
    refuses(tmp_path / "nowhere", "there is no such model directory")
    refuses(tmp_path, "config.json is missing")
    (tmp_path / "config.json").write_text("{broken")
    refuses(tmp_path, "config.json: this file is not readable JSON")
    (tmp_path / "config.json").write_text("[]")
    refuses(tmp_path, "config.json: this file must hold a JSON object, not a list")


def test_a_directory_without_weights_is_refused(broken):
    directory, _ = broken
    (directory / "model.safetensors").unlink()
    refuses(directory, "no weights found; expected model.safetensors or model.safetensors.index.json")
    (directory / "pytorch_model.bin").write_text("")
    refuses(directory, "pytorch_model.bin", "only safetensors are read")


def test_a_broken_file_is_refused(broken):
    directory, _ = broken
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refuses(directory, "model.safetensors: this is not a readable safetensors file")


def test_missing_shards_and_a_broken_index_are_refused(tmp_path):
    save(tmp_path, ARCH, random_params(ARCH), max_shard_bytes=16_000)
    shutil.move(sorted(tmp_path.glob("*.safetensors"))[1], tmp_path / "elsewhere")
    refuses(tmp_path, "lists files that are missing: model-00002-of-")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refuses(tmp_path, "model.safetensors.index.json: the key 'weight_map'")


def test_missing_and_unknown_tensors_are_refused_by_name(broken):
    directory, tensors = broken
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, "the weights lack tensors", "model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = lost
    for layer in range(7):
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = lost
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, "that the model of config.json does not", "q_proj.bias", "and 2 more")


def test_misshapen_and_integer_tensors_are_refused(broken):
    directory, tensors = broken
    edit_config(directory, vocab_size=64)
    refuses(directory, "model.embed_tokens.weight has shape [61, 32], but config.json asks for [64, 32]")
    edit_config(directory, vocab_size=61)
    tensors["model.norm.weight"] = np.ones(32, np.float16)
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, "model.norm.weight has dtype F16, other tensors F32", "one dtype")
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, "model.norm.weight has dtype I8")
