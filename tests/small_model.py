"""Writes a small random model of a family, with a tokenizer and a chat template like its family's, and some data.

    python -m tests.small_model qwen3 models/small

makes models/small/model (a Hugging Face directory) and prompts.jsonl, ift.jsonl, eft.jsonl, heldout_prompts.jsonl,
heldout_pairs.jsonl beside it: enough to go through every command before the real model is there. Its answers are noise.
"""

import argparse
import json
import random
from pathlib import Path

import jax
import numpy as np
import transformers

from scir_jax.data.jsonl import write_rows
from scir_jax.model import decoder, families
from scir_jax.model.hf import weights
from scir_jax.text.chat import load_tokenizer
from tests import chat_templates

# family -> configuration class, its own settings, tokenizer and template of tests.chat_templates, the stop token
FAMILIES = {
    "llama": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        ("llama-3", "llama-3", "<|eot_id|>"),
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 64}, ("llama-2", "mistral-3", "</s>")),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}, ("qwen-2", "qwen-2", "<|im_end|>")),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}, ("qwen-2", "qwen-3", "<|im_end|>")),
    "gemma2": (
        transformers.Gemma2Config,
        {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
        ("gemma", "gemma-2", "<end_of_turn>"),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
        ("gemma", "gemma-3", "<end_of_turn>"),
    ),
}
THINGS = ("the sea", "a stone", "two birds", "an old bridge", "the first snow", "a quiet street")


def write_model(family: str, directory: Path, seed: int = 0) -> None:
    """A model directory with random weights, larger than at initialisation so that answers differ."""
    make, own, (kind, template, stop) = FAMILIES[family]
    directory.mkdir(parents=True)
    chat_templates.save(kind, directory)
    (directory / "chat_template.jinja").write_text(chat_templates.TEMPLATES[template], encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    sizes = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(stop),
        "pad_token_id": None,
    }
    config = json.loads(make(**{**sizes, **own}).to_json_string(use_diff=False))
    config["architectures"] = [f"{make.__name__.removesuffix('Config').removesuffix('Text')}ForCausalLM"]
    arch = families.read(config, "config.json")
    params = jax.jit(decoder.define(arch).init)(jax.random.key(seed))
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: np.asarray(p if path[-1].key in ("scale", "bias") else 5 * p), params
    )
    weights.save(directory, arch, params, config=config)
    generation = {"eos_token_id": [config["eos_token_id"]]}
    (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


def write_data(directory: Path, rows: int = 24, seed: int = 0) -> None:
    """Data files as a user might have them: plain and conversational rows, several turns, judging examples."""
    rng = random.Random(seed)

    def prompt(i: int) -> str | list[dict]:
        text = f"Write {rng.choice(('a line', 'a question', 'one word'))} about {rng.choice(THINGS)}. ({i})"
        if i % 3:
            return text
        turns = ("Hello there.", "Hello! What shall I write?", text)
        return [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]

    def answer() -> str:
        return f"{rng.choice(THINGS).capitalize()}, and then {rng.choice(THINGS)}."

    def pair(i: int) -> dict:
        return {"prompt": prompt(i), "chosen": answer(), "rejected": "No."}

    write_rows(directory / "prompts.jsonl", [{"prompt": prompt(i)} for i in range(rows)])
    write_rows(directory / "heldout_prompts.jsonl", [{"prompt": prompt(i)} for i in range(rows, rows + 8)])
    write_rows(directory / "ift.jsonl", [{"prompt": prompt(i), "response": answer()} for i in range(rows)])
    write_rows(directory / "eft.jsonl", [pair(i) for i in range(rows)])
    write_rows(directory / "heldout_pairs.jsonl", [pair(i) for i in range(rows, rows + 16)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.small_model", description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("directory", type=Path, help="to write model/ and the data files into")
    arguments = parser.parse_args()
    write_model(arguments.family, arguments.directory / "model")
    write_data(arguments.directory)
    print(f"{arguments.directory}: model/ ({arguments.family}, random weights) and five data files")


if __name__ == "__main__":
    main()
