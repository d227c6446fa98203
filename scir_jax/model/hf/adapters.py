"""PEFT adapter directories (adapter_config.json, adapter_model.safetensors), in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from scir_jax.errors import InputError
from scir_jax.model.architecture import LINEARS, Architecture
from scir_jax.model.hf import tensors as files
from scir_jax.model.hf import transfer
from scir_jax.model.hf.tensors import Names, Stored, Tensor, Tensors
from scir_jax.model.lora import ADAPTER, Lora, Params, merge

_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"  # written last: where it is, a directory is complete
_SIDES = {"lora_A": "lora_a", "lora_B": "lora_b"}
# Keys that are read, and keys that change nothing in what an adapter computes. Any other key is a variant of LoRA,
# known or yet to come, and must be off.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
_HARMLESS = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    # the tensors say which layers are adapted
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    # settings of initialisations; init_lora_weights says which one is meant
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)
_OFF = (None, False, "none", [], {})
# Other initialisations change the model's own weights, and the adapter then belongs to the changed ones.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_config(directory: Path) -> Lora:
    """Reads which adapters a PEFT directory describes.

    Raises:
      InputError: for a directory that is none, another kind of adapter, or a variant of LoRA that is not computed here.
    """
    path = Path(directory) / _CONFIG
    if not path.is_file():
        raise InputError(f"{directory}: no {_CONFIG}, so this is not a PEFT adapter directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key, value in config.items():
        if key not in (*_READ, *_HARMLESS) and value not in _OFF:
            raise InputError(f"{path}: {key} is {value!r}, which is not supported")
    if (beginning := config.get("init_lora_weights")) not in _BEGINNINGS:
        raise InputError(
            f"{path}: init_lora_weights is {beginning!r}, which changes the model's own weights; save the adapter with "
            "peft's path_initial_model_for_weight_conversion"
        )
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout") or 0
    if isinstance(rank, bool) or not isinstance(rank, int) or not _number(alpha) or not _number(dropout):
        raise InputError(
            f"{path}: r must be an integer, lora_alpha and lora_dropout numbers, not {rank!r}, {alpha!r} and "
            f"{dropout!r}"
        )
    rslora = config.get("use_rslora") or False
    if rslora is not True and rslora is not False:
        raise InputError(f"{path}: use_rslora must be true or false, not {rslora!r}")
    with contextlib.ExitStack() as stack:
        found = {linear for linear, _, _ in map(_parse, _open_tensors(directory, stack))}
    if not found & LINEARS.keys():
        raise InputError(
            f"{Path(directory) / WEIGHTS}: no tensor adapts a layer of this decoder; there are {', '.join(LINEARS)}"
        )
    targets = tuple(name for name in LINEARS if name in found)
    try:
        return Lora(rank, float(alpha), targets, rslora, float(dropout))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load(directory: Path, arch: Architecture, lora: Lora, abstract: Params | None = None) -> Params:
    """Reads the adapters' parameters, in the structure that `lora.split` gives for the model.

    Args:
      abstract: a jax.ShapeDtypeStruct with a sharding for each, into which they are read, each part by the processes
        whose devices hold it. Without it they are float32 NumPy arrays.

    Raises:
      InputError: if they belong to a model of another shape.
    """
    path = Path(directory) / WEIGHTS
    anywhere = _names(arch, dataclasses.replace(lora, targets=tuple(LINEARS)))
    shapes = {(tensor.path, tensor.layer): tensor.stored_shape for tensor in anywhere.values()}
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(directory, stack)
        found: dict[tuple[tuple[str, ...], int], str] = {}
        for name, tensor in stored.items():
            linear, layer, side = _parse(name)
            if linear not in LINEARS or not 0 <= layer < arch.num_layers:
                raise InputError(
                    f"{path}: {name} adapts a layer that the model does not have ({arch.num_layers} layers of "
                    f"{', '.join(LINEARS)}); the adapter is for another model"
                )
            place = ("layers", *LINEARS[linear], side), layer
            if tensor.shape != shapes[place]:
                raise InputError(
                    f"{path}: {name} has shape {list(tensor.shape)}, the model's layer asks for "
                    f"{list(shapes[place])}; the adapter is for another model"
                )
            found[place] = name
        names = {}
        for name, wanted in _names(arch, lora).items():
            if (wanted.path, wanted.layer) not in found:
                linear, layer, side = _parse(name)
                raise InputError(f"{path}: {linear} of layer {layer} has no {side}; adapt it in all layers or none")
            names[found[wanted.path, wanted.layer]] = wanted
        return files.load(names, stored, abstract)


def merged(base: Tensors, params: Params, lora: Lora, *, wanted: bool) -> Tensors:
    """Gives the tensors of a model without adapters that computes what `base` does with them.

    They are merged one layer at a time.

    Args:
      base: the base model's tensors; called only where they are wanted.
      params: the adapters, NumPy or JAX arrays; those on several processes are fetched by all of them together.
      wanted: whether this process wants the result; otherwise it gets None.
    """
    adapted = {("layers", *LINEARS[linear], "weight") for linear in lora.targets}

    def tensor(path: tuple[str, ...], layer: int | None) -> np.ndarray | None:
        weight = base(path, layer) if wanted else None
        if path not in adapted:
            return weight
        place = files.leaf(params, path[:-1])
        a, b = (transfer.fetch(place[side], layer, wanted=wanted) for side in ADAPTER)
        return merge(weight, a, b, lora) if wanted else None

    return tensor


def save(
    directory: Path, arch: Architecture, lora: Lora, params: Params, *, base_model: str, writer: bool = True
) -> None:
    """Writes a directory that peft loads onto the base model.

    Parameters on the devices of several processes are written by one of them, but all must call this alike.

    Args:
      params: anything that holds the adapters' arrays in their places; the rest of a model is ignored.
      base_model: name or directory of the base model, for peft's information.
      writer: whether this process writes; one that does not leaves its disk alone.

    Raises:
      InputError: if `directory` is a file.
    """
    names = _names(arch, lora)
    with files.fetched(names, files.of(params, wanted=writer), np.float32) as fetched:
        if writer:
            _write(Path(directory), lora, dict(fetched), base_model)


def _write(directory: Path, lora: Lora, tensors: dict[str, np.ndarray], base_model: str) -> None:
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{directory}: is a file, or below one; give a directory to write the adapter to") from None
    partial = directory / (WEIGHTS + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.replace(directory / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(arch: Architecture, lora: Lora) -> Names:
    """Returns every tensor of an adapter, as peft names it."""
    names = {}
    for linear in lora.targets:
        module, name = LINEARS[linear]
        part = "self_attn" if module == "attention" else module
        out, inputs = arch.linear_axes()[linear]
        for theirs, ours in _SIDES.items():
            groups = ((lora.rank,), inputs) if ours == "lora_a" else (out, (lora.rank,))
            for layer in range(arch.num_layers):
                key = f"base_model.model.model.layers.{layer}.{part}.{linear}.{theirs}.weight"
                names[key] = Tensor(("layers", module, name, ours), layer, groups)
    return names


def _open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise InputError(f"{directory}: no {WEIGHTS}; adapters are read from safetensors only")
    try:
        return files.open_file(path, stack)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def _parse(name: str) -> tuple[str, int, str]:
    """Returns (linear layer, layer number, lora_a or lora_b) of a tensor's name; ("", -1, "") for any other tensor."""
    parts = name.split(".")
    if parts[-1] == "weight" and len(parts) > 5 and parts[-2] in _SIDES and "layers" in parts:
        number = parts[parts.index("layers") + 1]
        if number.isdigit():
            return parts[-3], int(number), _SIDES[parts[-2]]
    return "", -1, ""
