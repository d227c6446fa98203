"""What may change under a run that has begun: where it lies, what it looks at, and how long it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

HERE = (
    *("run.directory", "run.distributed", "run.host_timeout", "run.lease", "run.compilation_cache"),
    *("run.until", "run.auto", "run.proposed", "run.accept_replaced"),
)
"""keys that say where a run is computed and how far, beside the mesh; they are not compared"""
HARMLESS = ("run.tensorboard", "run.wandb", "run.trackio")
"""keys that change no result, beside those of HARMLESS_SECTIONS"""
HARMLESS_SECTIONS = ("checkpoint", "evaluate")
ADDED = ("data.heldout_prompts", "data.heldout_pairs")
"""files that may be added"""
MOVED = (
    *("model.path", "lora.adapter", "world.directory", "generative.templates", "generative.pointwise"),
    *("data.prompts", "data.ift", "data.eft", "data.pairs", *ADDED),
    *("implicit.reference", "preference.reference", "pairs.scorer"),
)
"""paths, which may change where the manifest's hashes do not"""
MODELS = ("previous", "start", "sft", "base")
"""references that are no paths"""


class Change(NamedTuple):
    """A setting that is not what it was when the run began."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} ({self.before!r} there, {self.now!r} here)"


class Changes(NamedTuple):
    """The settings that differ, those that may and those that may not."""

    allowed: list[Change]
    refused: list[Change]


def compare(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Changes:
    """Compares two configurations, as plain mappings: the recorded one and that of the command."""
    result = Changes([], [])
    for section, name in sorted({(s, k) for c in (before, now) for s, values in c.items() for k in values}):
        key = f"{section}.{name}"
        change = Change(key, before.get(section, {}).get(name), now.get(section, {}).get(name))
        if change.before == change.now or section == "mesh" or key in HERE:
            continue
        (result.allowed if _harmless(change) else result.refused).append(change)
    return result


def settings_hash(settings: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]) -> str:
    """Computes the SHA-256 of what decides a run's results: two runs with the same one differ in where they ran alone.

    Args:
      settings: the configuration as plain mappings; a path in it counts by its file's name.
      files: SHA-256 of the model's and the data's files, by name, as in the manifest.
    """
    told: dict[str, Any] = {}
    for section, values in settings.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if section in ("mesh", "checkpoint") or key in (*HERE, *HARMLESS):
                continue
            if key in MOVED and value is not None:
                value = [PurePath(path).name for path in ([value] if isinstance(value, str) else value)]
            told[key] = value
    content = json.dumps([told, dict(files)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _harmless(change: Change) -> bool:
    key, before, now = change
    if key == "run.iterations":
        return now > before
    if key in ADDED and before is None:
        return True
    if key in MOVED:
        return _named_alike(before, now)
    return key in HARMLESS or key.partition(".")[0] in HARMLESS_SECTIONS


def _named_alike(before: Any, now: Any) -> bool:
    """Checks that two values are paths, or as many paths that end alike."""
    if isinstance(before, list):
        return len(before) == len(now) and all(PurePath(a).stem == PurePath(b).stem for a, b in zip(before, now))
    return None not in (before, now) and not {before, now} & set(MODELS)
