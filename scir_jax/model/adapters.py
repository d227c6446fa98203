"""PEFT adapter directories (adapter_config.json, adapter_model.safetensors), in and out."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scir_jax.errors import InputError
from scir_jax.model.architecture import LINEARS, Architecture
from scir_jax.model.lora import Lora, Params

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SIDES = {"lora_A": "lora_a", "lora_B": "lora_b"}
# Variants of LoRA that change what an adapter computes, and the values under which they do not.
_VARIANTS = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
}


def read_config(directory: Path) -> Lora:
    """The adapters that a PEFT directory describes.

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
    except ValueError as error:
        raise InputError(f"{path}: not readable JSON ({error})") from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key, off in _VARIANTS.items():
        if key in config and config[key] not in off:
            raise InputError(f"{path}: {key} is {config[key]!r}, which is not supported")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if isinstance(rank, bool) or not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise InputError(f"{path}: r must be an integer and lora_alpha a number, not {rank!r} and {alpha!r}")
    targets = sorted({name for name, _, _ in map(_parse, _tensors(directory)) if name in LINEARS}, key=[*LINEARS].index)
    if not targets:
        raise InputError(
            f"{Path(directory) / _WEIGHTS}: no tensor adapts a layer of this decoder; there are {', '.join(LINEARS)}"
        )
    return Lora(rank, float(alpha), tuple(targets), bool(config.get("use_rslora")), float(dropout or 0))


def load(directory: Path, arch: Architecture, lora: Lora) -> Params:
    """The adapters' parameters as float32 NumPy arrays, in the structure that `lora.split` gives for the model.

    Raises:
      InputError: if they belong to a model of another shape.
    """
    path = Path(directory) / _WEIGHTS
    sizes = _sizes(arch)
    found: dict[tuple[str, str], dict[int, np.ndarray]] = defaultdict(dict)
    for name, tensor in _tensors(directory).items():
        linear, layer, side = _parse(name)
        if linear not in sizes or not 0 <= layer < arch.num_layers:
            raise InputError(
                f"{path}: {name} adapts a layer that the model does not have ({arch.num_layers} layers of "
                f"{', '.join(LINEARS)}); the adapter is for another model"
            )
        out, inputs = (int(np.prod(size)) for size in sizes[linear])
        expected = (lora.rank, inputs) if side == "lora_a" else (out, lora.rank)
        if tensor.shape != expected:
            raise InputError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model's layer asks for {list(expected)}; the "
                "adapter is for another model"
            )
        found[linear, side][layer] = tensor.astype(np.float32)
    params: Params = {}
    for linear in lora.targets:
        out, inputs = sizes[linear]
        for side, shape in (("lora_a", (lora.rank, *inputs)), ("lora_b", (*out, lora.rank))):
            layers = found[linear, side]
            missing = [i for i in range(arch.num_layers) if i not in layers]
            if missing:
                raise InputError(
                    f"{path}: {linear} of layer {missing[0]} has no {side}; adapt it in all layers or none"
                )
            module, name = LINEARS[linear]
            stacked = np.stack([layers[i].reshape(shape) for i in range(arch.num_layers)])
            params.setdefault("layers", {}).setdefault(module, {}).setdefault(name, {})[side] = stacked
    return params


def save(directory: Path, arch: Architecture, lora: Lora, params: Params, *, base_model: str) -> None:
    """Writes a directory that peft loads onto the base model.

    Args:
      params: anything that holds the adapters' arrays in their places; the rest of a model is ignored.
      base_model: name or directory of the base model, for peft's information.
    """
    tensors = {}
    for linear in lora.targets:
        module, name = LINEARS[linear]
        part = "self_attn" if module == "attention" else module
        adapters = params["layers"][module][name]
        for theirs, ours in _SIDES.items():
            stacked = np.asarray(adapters[ours], np.float32)
            rows = lora.rank if ours == "lora_a" else -1
            columns = -1 if ours == "lora_a" else lora.rank
            for layer in range(arch.num_layers):
                key = f"base_model.model.model.layers.{layer}.{part}.{linear}.{theirs}.weight"
                tensors[key] = np.ascontiguousarray(stacked[layer].reshape(rows, columns))
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
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (_WEIGHTS + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.replace(directory / _WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    path = Path(directory) / _WEIGHTS
    if not path.is_file():
        raise InputError(f"{directory}: no {_WEIGHTS}; adapters are read from safetensors only")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def _parse(name: str) -> tuple[str, int, str]:
    """(linear layer, layer number, lora_a or lora_b) of a tensor's name; ("", -1, "") for any other tensor."""
    parts = name.split(".")
    if parts[-1] == "weight" and len(parts) > 5 and parts[-2] in _SIDES and "layers" in parts:
        number = parts[parts.index("layers") + 1]
        if number.isdigit():
            return parts[-3], int(number), _SIDES[parts[-2]]
    return "", -1, ""


def _sizes(arch: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Output and input axes of every adaptable layer."""
    width, inner = (arch.hidden_size,), (arch.intermediate_size,)
    queries, keys = (arch.num_heads, arch.head_dim), (arch.num_kv_heads, arch.head_dim)
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
