"""Writes the embedded world as files, exactly as a user would bring a model and data.

    world.json                        the specification and the SHA-256 of every other file
    base.jsonl, ift.jsonl             {"messages": [user, assistant]}
    base_comparisons.jsonl, eft.jsonl, heldout_pairs.jsonl
                                      {"prompt", "chosen", "rejected"}
    prompts.jsonl, heldout_prompts.jsonl
                                      {"prompt"}
    judge.yaml, judge_continuation.yaml, judge_brief.yaml
                                      the judge's question in three forms
    untrained/                        config.json and the tokenizer of the model; no weights

No prompt of a held-out file, and no word of one, occurs in the other files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

from scir_jax.errors import InputError
from scir_jax.world.data import make_files
from scir_jax.world.spec import WorldSpec
from scir_jax.world.tokenizer import BOS, EOS, PAD, VOCABULARY, write_tokenizer

# Raised whenever the same specification would give other files.
FORMAT = 2

# The prompt is repeated before each answer: what the judge has to do at each answer is then
# what it does when it answers, so it can reuse what it knows from answering.
JUDGE = """\
# Two answers in a conversation of their own: "1" if the first is better, "2" if the second.
layout: standalone
question: "judge {prompt}{response_a};{prompt}{response_b}"
answer_prefix: ""
verdicts: ["1", "2"]
"""
JUDGE_CONTINUATION = """\
# The next user turn of the conversation that holds the first answer: "1" if that answer is
# better, "2" if the one in the question.
layout: continuation
question: "judge {prompt}{response_b}"
answer_prefix: ""
verdicts: ["1", "2"]
"""
# The base model has never seen it: SFT teaches it.
JUDGE_BRIEF = """\
# As judge.yaml in another word, with the prompt once.
layout: standalone
question: "verdict {prompt}{response_a};{response_b}"
answer_prefix: ""
verdicts: ["1", "2"]
"""


def write_world(directory: Path, spec: WorldSpec) -> None:
    """Writes the world of `spec`, or does nothing if `directory` already holds it.

    The files are written beside `directory` and moved there in one step, so no reader ever sees half a world.

    Raises:
      InputError: `directory` holds something else.
    """
    directory = Path(directory).absolute()
    if is_complete(directory, spec):
        return
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not an embedded world")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_files(temporary, spec)
        os.replace(temporary, directory)
    except OSError:
        # Another process may have put the same world there in the meantime.
        if not is_complete(directory, spec):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_complete(directory: Path, spec: WorldSpec) -> bool:
    """Checks whether `directory` holds the world of `spec`.

    Raises:
      InputError: it holds another world, or a file is not as it was written.
    """
    directory = Path(directory)
    manifest_path = directory / "world.json"
    if not manifest_path.exists():
        return False
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["spec"]
        hashes = dict(manifest["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{manifest_path} is not the manifest of an embedded world") from error
    if found != (FORMAT, as_json(spec)):
        raise InputError(
            f"{directory} holds an embedded world of another specification; remove it or name another directory"
        )
    for name, expected in hashes.items():
        path = directory / name
        if not path.is_file() or _sha256(path) != expected:
            raise InputError(f"{path} is missing or was changed after it was written")
    return True


def model_config(spec: WorldSpec) -> dict:
    """Returns the model's config.json: the Mistral architecture without a sliding window."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": len(VOCABULARY),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_value_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": VOCABULARY.index(BOS),
        "eos_token_id": VOCABULARY.index(EOS),
        "pad_token_id": VOCABULARY.index(PAD),
        "use_cache": True,
        "torch_dtype": "float32",
    }


def _write_files(directory: Path, spec: WorldSpec) -> None:
    (directory / "untrained").mkdir(parents=True)
    for name, rows in make_files(spec).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write_text(directory / name, "".join(lines))
    _write_text(directory / "judge.yaml", JUDGE)
    _write_text(directory / "judge_continuation.yaml", JUDGE_CONTINUATION)
    _write_text(directory / "judge_brief.yaml", JUDGE_BRIEF)
    write_tokenizer(directory / "untrained", spec.max_length)
    config = json.dumps(model_config(spec), indent=2) + "\n"
    _write_text(directory / "untrained" / "config.json", config)

    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "spec": as_json(spec),
        "sha256": {path.relative_to(directory).as_posix(): _sha256(path) for path in paths},
    }
    # Last: its presence says that everything else is there.
    _write_text(directory / "world.json", json.dumps(manifest, indent=2) + "\n")


def as_json(spec: WorldSpec) -> dict:
    """Returns the specification as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
