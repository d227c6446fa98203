"""What a run is made of: versions, seeds, and hashes of its model, data and judge templates."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from scir_jax.bucket.fetched import weights_of
from scir_jax.config.schema import Config
from scir_jax.data import sources
from scir_jax.run import hub
from scir_jax.run.changes import MODELS

LAYOUT = 3
"""of the files of a run; a directory of another one is refused"""
PACKAGES = (
    "scir_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
)
DATA = tuple(f"data.{key}" for key in ("prompts", "ift", "eft", "heldout_prompts", "heldout_pairs", "pairs"))
"""keys of files"""


def manifest(config: Config, templates: dict[str, Any], *, weights: bool = True) -> dict[str, Any]:
    """Collects versions, seeds, and the SHA-256 of the model's, tokenizer's and data files and of the judge templates.

    Args:
      weights: read the model's weights too; else their bytes are counted.
    """
    models = {"model.path": config.model.path}
    if config.pairs.scorer and not hub.is_function(config.pairs.scorer):
        models["pairs.scorer"] = config.pairs.scorer
    references = {"implicit.reference": config.implicit.reference, "preference.reference": config.preference.reference}
    models |= {key: name for key, name in references.items() if name not in MODELS}
    hashes = {
        f"{key}/{file}": value
        for key, name in models.items()
        for file, value in hashes_of(hub.directory(name, key), weights).items()
    }
    for key in DATA:
        if name := getattr(config.data, key.removeprefix("data.")):
            hashes[key] = sources.sha256(name)
    if config.lora.adapter:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            hashes[f"lora.adapter/{name}"] = sha256(hub.directory(config.lora.adapter, "lora.adapter") / name)
    for number, (name, content) in enumerate(templates.items(), start=1):
        # A file of the same content may lie elsewhere.
        text = json.dumps({key: value for key, value in content.items() if key != "name"}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        hashes[f"generative.templates/{number} {Path(name).stem}"] = digest
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "versions": {"python": platform.python_version(), **versions},
        "layout": LAYOUT,
        "seed": config.run.seed,
        "iterations": config.run.iterations,
        "sha256": hashes,
        "hub": hub.commits(config),
        "templates": templates,
    }


def hashes_of(directory: Path, weights: bool) -> dict[str, str]:
    """Computes the SHA-256 of the files of a model directory that are read, by name."""
    read = (".json", ".jinja", ".safetensors", ".model", ".txt")  # configurations, templates, weights, vocabularies
    return {
        path.name: _digest(path) if weights or path.suffix != ".safetensors" else f"{path.stat().st_size} bytes"
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in read
    }


def _digest(path: Path) -> str:
    """Computes the SHA-256 of a file; of weights in a bucket it takes what the store says that they hold."""
    if in_bucket := weights_of(path):
        size, crc = in_bucket.holds()
        return f"{size} bytes, crc32c {crc}"
    return sha256(path)


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
