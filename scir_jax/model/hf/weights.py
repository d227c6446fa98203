"""Hugging Face model directories: config.json, safetensors and tokenizer files, in and out.

A tensor per layer there is a slice of one stacked array here; `_names` is the whole correspondence. Neither a host nor
a device needs to hold a whole model to read or write it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.model.architecture import LINEARS, Architecture
from scir_jax.model.hf import tensors as files
from scir_jax.model.hf.tensors import Names, Params, Stored, Tensor, Tensors

_READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = ("*.safetensors", _INDEX)
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def hf_config(directory: Path) -> dict[str, Any]:
    """Reads the config.json of a model directory.

    Raises:
      InputError: if the directory or the file is missing, or the file is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such model directory.")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory}: config.json is missing, so this is not a Hugging Face model directory.")
    return read_json(path)


def load(directory: Path, abstract: Params | None = None, *, reward: bool = False) -> tuple[Architecture, Params]:
    """Reads a model directory: float32, float16 or bfloat16 safetensors, in one file or several.

    Args:
      directory: a local Hugging Face directory.
      abstract: a jax.ShapeDtypeStruct with a sharding for every parameter of the model, as `Model.abstract` has them.
        Parameters are then read into these shardings and dtypes: a process reads what its own devices hold, each part
        once, and has no more than one part of one parameter on its host.
      reward: it is a reward model, with a score head of one output.

    Returns:
      The architecture, and the parameters, without `abstract` as float32 NumPy arrays: put them on devices with
      `jax.device_put(params, shardings)` before they are used, or each call copies them again.

    Raises:
      InputError: naming the file, and the tensors where some are missing, unknown or misshapen.
    """
    with _opened(directory, reward) as (arch, names, stored):
        return arch, files.load(names, stored, abstract)


@contextlib.contextmanager
def stored_tensors(directory: Path) -> Iterator[Tensors]:
    """Gives a function (path, layer) that reads a tensor of a model directory in the dtype in which it is stored.

    Raises:
      InputError: as `load` does.
    """
    with _opened(directory) as (_, names, stored):
        places = {(tensor.path, tensor.layer): (tensor, stored[name]) for name, tensor in names.items()}
        yield lambda path, layer: files.read(*places[path, layer])


@contextlib.contextmanager
def _opened(directory: Path, reward: bool = False) -> Iterator[tuple[Architecture, Names, dict[str, Stored]]]:
    """Opens a model directory, and checks that its tensors are those of its config.json."""
    directory = Path(directory)
    arch = families.read(hf_config(directory), str(directory / "config.json"), reward=reward)
    names = _names(arch)
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(directory, stack)
        _check_tensors(directory, arch, names, stored)
        _check_tied_head(directory, arch, stored)
        yield arch, names, stored


def dtype_of(directory: Path) -> str:
    """Returns the dtype of a model directory's weights: "float32", "float16" or "bfloat16"."""
    with contextlib.ExitStack() as stack:
        first = next(iter(_open_tensors(Path(directory), stack).values()))
        return _READABLE.get(first.dtype, "float32")


def save(
    directory: Path,
    arch: Architecture,
    tensors: Params | Tensors,
    *,
    config: dict[str, Any],
    source: Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    writer: bool = True,
) -> None:
    """Writes a model directory that transformers loads.

    It is written beside its place and renamed into it. An existing directory is replaced; files in
    it that are not written here (a README, say) are kept. The host holds one file's tensors at a time.

    Parameters on the devices of several processes are written by one of them, but all must call this alike. It raises
    where something is wrong, on the writer alone where that is its disk, after it has taken part in what the others do.

    Args:
      directory: where to; its parents are made.
      tensors: the parameters, NumPy or JAX arrays, or a function (path, layer) that gives a tensor of them.
      config: the config.json object that describes `arch`; its dtype is set to the tensors'.
      source: a model directory from which generation_config.json and the tokenizer's files are taken.
      dtype: "float32", "float16" or "bfloat16", of the tensors written.
      max_shard_bytes: the weights are split into files no larger than this (or than one tensor).
      writer: whether this process writes; one that does not leaves its disk and its host's memory alone.

    Raises:
      InputError: if `directory` is a file or has subdirectories.
    """
    names = _names(arch)
    tensors = tensors if callable(tensors) else files.of(tensors, wanted=writer)
    with files.fetched(names, tensors, files.DTYPES[dtype]) as fetched:
        if writer:
            shards = list(_shards(names, np.dtype(files.DTYPES[dtype]).itemsize, max_shard_bytes))
            with _replaced(directory, source) as new:
                config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
                _write_json(new / "config.json", config)
                _write_tensors(new, shards, fetched)


@contextlib.contextmanager
def _replaced(directory: Path, source: Path | None) -> Iterator[Path]:
    """Gives a new directory that becomes `directory` at the end, with its other files and the tokenizer of `source`."""
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: this is a file; give the name of a directory to write the model to.")
    kept = sorted(directory.iterdir()) if directory.is_dir() else []
    if any(path.is_dir() for path in kept):
        raise InputError(f"{directory}: this directory has subdirectories; give a new directory for the model.")

    copied: list[Path] = []
    if source is not None:
        wanted = (*TOKENIZER_FILES, "generation_config.json")
        copied = [p for p in sorted(Path(source).iterdir()) if _matches(p, wanted)]
        kept = [p for p in kept if not _matches(p, TOKENIZER_FILES)]
    kept = [p for p in kept if not _matches(p, _WEIGHT_FILES)]

    directory.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: what a killed process left is cleared by the next one.
    scratch = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir(parents=True)
        for path in (*kept, *copied):
            shutil.copy2(path, new / path.name)
        yield new
        if directory.exists():
            directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _names(arch: Architecture) -> Names:
    """Returns every tensor of a checkpoint, in the order in which transformers writes them."""
    d, v = arch.hidden_size, arch.vocab_size
    biased = dict.fromkeys(("q", "k", "v"), arch.qkv_bias) | {"o": arch.o_bias}
    biased |= dict.fromkeys(("gate", "up", "down"), arch.mlp_bias)
    axes = arch.linear_axes()
    in_layer: dict[str, Any] = {"input_layernorm.weight": (("attention_norm", "scale"), ((d,),))}
    for linear, (module, name) in LINEARS.items():
        prefix = f"{'self_attn' if module == 'attention' else module}.{linear}"
        in_layer[f"{prefix}.weight"] = ((module, name, "weight"), axes[linear])
        if biased[name]:
            in_layer[f"{prefix}.bias"] = ((module, name, "bias"), axes[linear][:1])
    if arch.qk_norm:
        for norm in ("q_norm", "k_norm"):
            in_layer[f"self_attn.{norm}.weight"] = (("attention", norm, "scale"), ((arch.head_dim,),))
    # With norms behind attention and feed-forward, transformers has another name for the one before the feed-forward.
    norms = {"post_attention_layernorm": "mlp_norm"}
    if arch.post_norms:
        norms = {
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    in_layer |= {f"{name}.weight": ((path, "scale"), ((d,),)) for name, path in norms.items()}
    names = {"model.embed_tokens.weight": Tensor(("embed",), None, ((v,), (d,)))}
    for layer in range(arch.num_layers):
        for name, (path, groups) in in_layer.items():
            names[f"model.layers.{layer}.{name}"] = Tensor(("layers", *path), layer, groups)
    names["model.norm.weight"] = Tensor(("norm", "scale"), None, ((d,),))
    if arch.reward:
        names["score.weight"] = Tensor(("head",), None, ((1,), (d,)))
    elif not arch.tie_embeddings:
        names["lm_head.weight"] = Tensor(("head",), None, ((v,), (d,)))
    return names


def _open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    stored = {}
    for path in _weight_files(directory):
        try:
            stored |= files.open_file(path, stack)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: this is not a readable safetensors file ({error}); download or export it again."
            ) from error
    return stored


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{index}: the key 'weight_map', from tensors to files, is missing or broken.")
        paths = [directory / name for name in sorted(set(shards.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise InputError(f"{directory}: {_INDEX} lists files that are missing: {_list(missing)}.")
        return paths
    if list(directory.glob("pytorch_model*.bin")):
        raise InputError(
            f"{directory}: the weights are in pytorch_model.bin, but only safetensors are read; "
            "save the model with transformers' save_pretrained first."
        )
    raise InputError(f"{directory}: no weights found; expected {_SINGLE} or {_INDEX}.")


def _check_tensors(directory: Path, arch: Architecture, expected: Names, stored: dict[str, Stored]) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise InputError(f"{directory}: the weights lack tensors that config.json asks for: {_list(missing)}.")
    # Old checkpoints store the rotary frequencies; a tied head is compared when it is read.
    ignored = ("rotary_emb.inv_freq", "lm_head.weight") if arch.tie_embeddings else ("rotary_emb.inv_freq",)
    unknown = [name for name in stored if name not in expected and not name.endswith(ignored)]
    if unknown:
        raise InputError(
            f"{directory}: the weights have tensors that the model of config.json does not: {_list(unknown)}."
        )
    for name, tensor in expected.items():
        found = stored[name]
        if found.shape != tensor.stored_shape:
            raise InputError(
                f"{found.path}: {name} has shape {list(found.shape)}, but config.json asks for "
                f"{list(tensor.stored_shape)}."
            )
        if found.dtype not in _READABLE:
            raise InputError(
                f"{found.path}: {name} has dtype {found.dtype}; only F32, F16 and BF16 weights can be read."
            )
    first = stored[next(iter(expected))]
    for name in expected:
        if stored[name].dtype != first.dtype:
            raise InputError(
                f"{stored[name].path}: {name} has dtype {stored[name].dtype}, other tensors {first.dtype}; "
                "save the model with one dtype (transformers: model.to(dtype) before save_pretrained)."
            )


def _check_tied_head(directory: Path, arch: Architecture, stored: dict[str, Stored], rows: int = 4096) -> None:
    """Checks that a tied head, where it is stored all the same, is the embedding; some rows are compared at a time."""
    if arch.tie_embeddings and "lm_head.weight" in stored:
        head, embed = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
        parts = [slice(start, min(start + rows, arch.vocab_size)) for start in range(0, arch.vocab_size, rows)]
        if head.shape != embed.shape or not all(np.array_equal(head.view[part], embed.view[part]) for part in parts):
            raise InputError(
                f"{directory}: config.json ties the head to the embedding, but lm_head.weight is "
                "different; set tie_word_embeddings to false in config.json or remove the tensor."
            )


def _write_tensors(directory: Path, shards: list[Names], fetched: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes the tensors, which come in the order of the shards."""
    weight_map, total = {}, 0
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        tensors = dict(itertools.islice(fetched, len(names)))
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors  # before the next file's come
    if len(shards) > 1:
        _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(names: Names, itemsize: int, limit: int) -> Iterator[Names]:
    shard, size = {}, 0
    for name, tensor in names.items():
        bytes_ = itemsize * int(np.prod(tensor.stored_shape))
        if shard and size + bytes_ > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += bytes_
    yield shard


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def _list(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model directory.

    Raises:
      InputError: it is not readable, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: this file is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: this file must hold a JSON object, not a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
