"""Hugging Face model directories: config.json, safetensors and tokenizer files, in and out.

A tensor per layer there is a slice of one stacked array here; `_names` is the whole correspondence.
Everything is NumPy on the host, so that no device needs to hold a model to read or write it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scir_jax.errors import InputError
from scir_jax.model.architecture import LINEARS, Architecture
from scir_jax.model.decoder import Params, define

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = ("*.safetensors", _INDEX)
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class _Tensor(NamedTuple):
    """Where a tensor of a checkpoint lives in the parameters."""

    path: tuple[str, ...]
    layer: int | None  # its index on the leading axis, None where there is no such axis
    stored_shape: tuple[int, ...]  # in the checkpoint: the output and the input axes flattened


def hf_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Raises:
      InputError: if the directory or the file is missing, or the file is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such model directory.")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory}: config.json is missing, so this is not a Hugging Face model directory.")
    return _read_json(path)


def load(directory: Path, *, put: Callable[[Any, tuple[str, ...]], Any] | None = None) -> tuple[Architecture, Params]:
    """Reads a model directory: float32, float16 or bfloat16 safetensors, in one file or several.

    Args:
      directory: a local Hugging Face directory.
      put: is given each parameter (NumPy, in the dtype of the files) and its path, and what it returns is kept in its
        place: a function that puts it on devices keeps the host from holding a whole model.

    Returns:
      The architecture, and the parameters, by default as float32 NumPy arrays: put them on devices with
      `jax.device_put(params, shardings)` before they are used, or each call copies them again.

    Raises:
      InputError: naming the file, and the tensors where some are missing, unknown or misshapen.
    """
    directory = Path(directory)
    arch = Architecture.from_hf_config(hf_config(directory), str(directory / "config.json"))
    names = _names(arch)
    put = put or (lambda value, path: value.astype(np.float32))
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(directory, stack)
        dtype = _check_tensors(directory, arch, names, stored)

        def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
            path = tuple(key.key for key in path)
            value = np.empty(shape.shape, dtype)
            for name, tensor in names.items():
                if tensor.path == path:
                    place = value if tensor.layer is None else value[tensor.layer]
                    place[...] = _read(stored, name).reshape(place.shape)
            if path == ("embed",):
                _check_tied_head(directory, arch, stored, value)
            return put(value, path)

        return arch, jax.tree_util.tree_map_with_path(leaf, define(arch).abstract())


def dtype_of(directory: Path) -> str:
    """The dtype of a model directory's weights: "float32", "float16" or "bfloat16"."""
    with contextlib.ExitStack() as stack:
        first = next(iter(_open_tensors(Path(directory), stack).values()))
        return _READABLE.get(first.dtype, "float32")


def save(
    directory: Path,
    arch: Architecture,
    params: Params,
    *,
    config: dict[str, Any],
    source: Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model directory that transformers loads.

    It is written beside its place and renamed into it. An existing directory is replaced; files in
    it that are not written here (a README, say) are kept.

    Args:
      directory: where to; its parents are made.
      params: NumPy or JAX arrays, each fully addressable from this process.
      config: the config.json object that describes `arch`; its dtype is set to the tensors'.
      source: a model directory from which generation_config.json and the tokenizer's files are taken.
      dtype: "float32", "float16" or "bfloat16", of the tensors written.
      max_shard_bytes: the weights are split into files no larger than this (or than one tensor).

    Raises:
      InputError: if `directory` is a file or has subdirectories.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: this is a file; give the name of a directory to write the model to.")
    kept = sorted(directory.iterdir()) if directory.is_dir() else []
    if any(path.is_dir() for path in kept):
        raise InputError(f"{directory}: this directory has subdirectories; give a new directory for the model.")

    copied: list[Path] = []
    if source is not None:
        wanted = (*_TOKENIZER_FILES, "generation_config.json")
        copied = [p for p in sorted(Path(source).iterdir()) if _matches(p, wanted)]
        kept = [p for p in kept if not _matches(p, _TOKENIZER_FILES)]
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
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
        _write_json(new / "config.json", config)
        _write_tensors(new, arch, params, _DTYPES[dtype], max_shard_bytes)
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


def _names(arch: Architecture) -> dict[str, _Tensor]:
    """Every tensor of a checkpoint, in the order in which transformers writes them."""
    d, v = arch.hidden_size, arch.vocab_size
    biased = dict.fromkeys(("q", "k", "v"), arch.qkv_bias) | {"o": arch.o_bias}
    biased |= dict.fromkeys(("gate", "up", "down"), arch.mlp_bias)
    sizes = {name: tuple(math.prod(axes) for axes in pair) for name, pair in arch.linear_axes().items()}
    in_layer = {"input_layernorm.weight": (("attention_norm", "scale"), (d,))}
    for linear, (module, name) in LINEARS.items():
        prefix = f"{'self_attn' if module == 'attention' else module}.{linear}"
        in_layer[f"{prefix}.weight"] = ((module, name, "weight"), sizes[linear])
        if biased[name]:
            in_layer[f"{prefix}.bias"] = ((module, name, "bias"), sizes[linear][:1])
    if arch.qk_norm:
        for norm in ("q_norm", "k_norm"):
            in_layer[f"self_attn.{norm}.weight"] = (("attention", norm, "scale"), (arch.head_dim,))
    # With norms behind attention and feed-forward, transformers calls the one before the feed-forward otherwise.
    norms = {"post_attention_layernorm": "mlp_norm"}
    if arch.post_norms:
        norms = {
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    in_layer |= {f"{name}.weight": ((path, "scale"), (d,)) for name, path in norms.items()}
    names = {"model.embed_tokens.weight": _Tensor(("embed",), None, (v, d))}
    for layer in range(arch.num_layers):
        for name, (path, shape) in in_layer.items():
            names[f"model.layers.{layer}.{name}"] = _Tensor(("layers", *path), layer, shape)
    names["model.norm.weight"] = _Tensor(("norm", "scale"), None, (d,))
    if not arch.tie_embeddings:
        names["lm_head.weight"] = _Tensor(("head",), None, (v, d))
    return names


def _leaf(params: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        params = params[key]
    return params


class _Stored(NamedTuple):
    """A tensor in an open file."""

    path: Path
    file: Any
    shape: tuple[int, ...]
    dtype: str


def _open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    stored = {}
    for path in _weight_files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            for name in file.keys():
                view = file.get_slice(name)
                stored[name] = _Stored(path, file, tuple(view.get_shape()), view.get_dtype())
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
        shards = _read_json(index).get("weight_map")
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


def _check_tensors(
    directory: Path, arch: Architecture, expected: dict[str, _Tensor], stored: dict[str, _Stored]
) -> str:
    """The one dtype of all tensors."""
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
    return _DTYPES[_READABLE[first.dtype]]


def _check_tied_head(directory: Path, arch: Architecture, stored: dict[str, _Stored], embed: np.ndarray) -> None:
    """A tied head that is stored all the same must be the embedding."""
    if arch.tie_embeddings and "lm_head.weight" in stored:
        head = _read(stored, "lm_head.weight")
        if head.shape != embed.shape or not np.array_equal(head, embed):
            raise InputError(
                f"{directory}: config.json ties the head to the embedding, but lm_head.weight is "
                "different; set tie_word_embeddings to false in config.json or remove the tensor."
            )


def _read(stored: dict[str, _Stored], name: str) -> np.ndarray:
    return stored[name].file.get_tensor(name)


def _write_tensors(directory: Path, arch: Architecture, params: Params, dtype: Any, max_shard_bytes: int) -> None:
    shards = list(_shards(_names(arch), np.dtype(dtype).itemsize, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        tensors = {}
        for name, tensor in names.items():
            array = _leaf(params, tensor.path)
            array = array if tensor.layer is None else array[tensor.layer]
            array = np.ascontiguousarray(np.asarray(array).astype(dtype))
            tensors[name] = array.reshape(tensor.stored_shape)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = arch.parameter_count() * np.dtype(dtype).itemsize
        _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(names: dict[str, _Tensor], itemsize: int, limit: int) -> Iterator[dict[str, _Tensor]]:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: this file is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: this file must hold a JSON object, not a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
