"""One module for each family of models: what its config.json says in terms of an Architecture.

A new family is a module with MODEL_TYPE, HF_CLASS, REWARD_CLASS and `read(Reader) -> Architecture`, listed here.
Tensor names are those that transformers gives to every family here (scir_jax.model.hf.weights).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture
from scir_jax.model.families import gemma2, gemma3, llama, mistral, qwen2, qwen3
from scir_jax.model.families.reader import Reader

FAMILIES = {module.MODEL_TYPE: module for module in (llama, mistral, qwen2, qwen3, gemma2, gemma3)}


def read(config: dict[str, Any], where: str, *, reward: bool = False) -> Architecture:
    """Reads the architecture that a parsed config.json describes, in its old or new spelling.

    Args:
      config: the parsed JSON object.
      where: the file it came from, for messages.
      reward: it is a reward model, with a score head of one output instead of the head over the vocabulary.

    Raises:
      InputError: for a model, a setting or a value that the decoder does not compute.
    """
    classes = {(module.REWARD_CLASS if reward else module.HF_CLASS): name for name, module in FAMILIES.items()}
    supported = ", ".join(classes)
    name = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(entry, str) for entry in architectures):
        raise InputError(f"{where}: architectures must be a list of names of classes, not {architectures!r}")
    if name is None and len(architectures) == 1:
        name = classes.get(architectures[0])
    if name == "gemma3":
        raise InputError(
            f"{where}: model_type is 'gemma3', with an image encoder; take the text model out in transformers: "
            "full = Gemma3ForConditionalGeneration.from_pretrained(...), "
            "text = Gemma3ForCausalLM(full.config.text_config), "
            "text.model.load_state_dict(full.model.language_model.state_dict()), text.save_pretrained(...)"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        found = config.get("model_type") or architectures or "nothing"
        raise InputError(f"{where}: model_type is {found!r}; supported are {supported}")
    if architectures and (FAMILIES[name].REWARD_CLASS if reward else FAMILIES[name].HF_CLASS) not in architectures:
        raise InputError(f"{where}: architectures is {architectures!r}; supported are {supported}")
    if reward:
        _check_outputs(config, where)
    reader = Reader(config, where)
    if config.get("quantization_config"):
        raise InputError(
            f"{where}: quantization_config is set, but quantized weights cannot be trained; "
            "give a directory with bfloat16, float16 or float32 weights"
        )
    arch = FAMILIES[name].read(reader)
    return dataclasses.replace(arch, reward=True, tie_embeddings=False, final_cap=None) if reward else arch


def _check_outputs(config: dict[str, Any], where: str) -> None:
    labels = config.get("id2label")
    # transformers leaves the key out for its default, two labels.
    outputs = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if outputs != 1:
        raise InputError(
            f"{where}: the score head has {outputs} outputs, but a reward model gives one number; "
            "take one that was trained with num_labels=1"
        )
