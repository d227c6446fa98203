"""The run directory: its files, its lock, and the refusal to mix two configurations in one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from scir_jax.config.files import to_dict, to_yaml
from scir_jax.config.schema import Config
from scir_jax.data import sources
from scir_jax.data.jsonl import read_json, write_json
from scir_jax.engine.hosts.hosts import SEEN
from scir_jax.errors import InputError
from scir_jax.run import hub
from scir_jax.run.changes import ADDED, MODELS, Change, compare, settings_hash
from scir_jax.run.trackers import IDENTITY

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


LAYOUT = 3
"""of the files of a run; a directory of another one is refused"""


class RunDirectory:
    """Paths of a run. Iteration 0 is SFT; iteration t turns M_t into M_{t+1}.

    Attributes:
      changes: harmless changes of the configuration that `open` found; `check_manifest` records them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.changes: list[Change] = []
        self._config: Config | None = None
        self._lock: FileLock | None = None

    def stage_checkpoints(self, iteration: int) -> Path:
        """Returns where a training stage keeps its checkpoints; iteration 0 is SFT."""
        return self.checkpoints / (f"iteration_{iteration:02d}" if iteration else "sft")

    @property
    def shares(self) -> int:
        """Into how many parts prompts and given pairs are divided: the iterations that the run began with."""
        return max(read_json(self.path / "manifest.json")["iterations"], 1)

    def keep_models(self, config: Config) -> None:
        """Lets the hub's names of a begun run stand for the commits that it began with.

        Raises:
          InputError: such a commit is not within reach.
        """
        manifest = self.path / "manifest.json"
        if manifest.exists():
            hub.keep(config, read_json(manifest).get("hub", {}))

    def iteration(self, number: int) -> Path:
        """Returns the directory of an iteration's files, made if it is not there."""
        directory = self.path / f"iteration_{number:02d}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def open(self, config: Config) -> bool:
        """Locks the directory and records the configuration; True if a run is there to be resumed.

        On which devices and how many hosts a run goes on is no part of its configuration, nor where it lies.

        Raises:
          InputError: another process uses the directory, it holds a run of a configuration that would give other
            results (the keys that differ are listed), or it holds other files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.path}: is a file, or below one; choose another run.directory") from None
        except PermissionError:
            raise InputError(f"{self.path}: may not be written; choose another run.directory") from None
        # The lock is held until the process ends, however it ends: the kernel frees it.
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{self.path}: another process is running here; wait for it or choose another run.directory"
            ) from None
        recorded = self.path / "config.yaml"
        # Until the first model is imported nothing depends on the configuration: a corrected one may take its place.
        if recorded.exists() and any(self.checkpoints.glob("M0")):
            found = compare(self._recorded(recorded), to_dict(config))
            if found.refused:
                raise InputError(
                    f"{self.path}: holds a run of another configuration; these keys differ: "
                    f"{', '.join(map(str, found.refused))}"
                )
            self.changes, self._config = found.allowed, config
            return True
        own = {".lock", "config.yaml.partial"}
        if self._is_ours(recorded):
            own |= {
                "config.yaml",
                "manifest.json",
                "manifest.json.partial",
                "files.json",
                "files.json.partial",
                "data.json",
                "data.json.partial",
                "checkpoints",
                "metrics.jsonl",
                "tensorboard",
                "wandb",
                IDENTITY,
            }
        others = sorted(p.name for p in self.path.iterdir() if p.name not in own and not p.name.startswith(SEEN))
        if others:
            raise InputError(
                f"{self.path}: holds files of something else ({', '.join(others[:3])}); choose another run.directory"
            )
        for name in ("manifest.json", "files.json"):
            (self.path / name).unlink(missing_ok=True)
        _write_config(recorded, config)
        return False

    def close(self) -> None:
        """Unlocks the directory."""
        if self._lock is not None:
            self._lock.release()

    def summarise(
        self, rows: list[dict[str, Any]], best: str, select: str, settings: dict[str, Any], costs: dict[str, Any]
    ) -> None:
        """Writes summary.json; what was exported of another model than the best one is removed.

        Args:
          rows: the table of models.
          best: name of the model to export.
          select: what it was chosen by.
          settings: the configuration as plain mappings, of which the hash is written.
          costs: see run.counts.table.
        """
        if self.best not in (None, best):
            self._remove_exports()
        digest = settings_hash(settings, read_json(self.path / "manifest.json")["sha256"])
        summary = {"rows": rows, "best": best, "select": select, "settings": digest, "costs": costs}
        write_json(self.path / "summary.json", summary)

    @property
    def best(self) -> str | None:
        """The name of the model that a finished run exports, else None."""
        path = self.path / "summary.json"
        return read_json(path).get("best") if path.exists() else None

    def _remove_exports(self) -> None:
        for name in ("export", "adapter"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def check_manifest(self, manifest: dict[str, Any]) -> None:
        """Records what the run is made of; on resuming, refuses files that have changed, and records harmless changes.

        Raises:
          InputError: files have changed; they are named.
        """
        path = self.path / "manifest.json"
        if not path.exists():
            write_json(path, manifest)
            return
        before = read_json(path)
        names = sorted(before["sha256"].keys() | manifest["sha256"].keys())
        added = {change.key for change in self.changes if change.key in ADDED and change.before is None}
        changed = [k for k in names if before["sha256"].get(k) != manifest["sha256"].get(k) and k not in added]
        if changed:
            raise InputError(
                f"{self.path}: changed since this run began: {', '.join(changed)}; "
                "restore them or choose another run.directory"
            )
        if self.changes:
            self._record(before | {"sha256": manifest["sha256"]})

    def _record(self, manifest: dict[str, Any]) -> None:
        """Writes the changed configuration, and the changes with the step at which they came into the manifest."""
        if any(change.key == "run.iterations" for change in self.changes):
            # What was made of the last model so far is made again.
            self._remove_exports()
            (self.path / "summary.json").unlink(missing_ok=True)
        step = self._last_step()
        found = [{"step": step, "key": c.key, "before": c.before, "now": c.now} for c in self.changes]
        write_json(self.path / "manifest.json", {**manifest, "changes": [*manifest.get("changes", []), *found]})
        _write_config(self.path / "config.yaml", self._config)

    def _last_step(self) -> int:
        """Returns the last training step of the run so far."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return max((json.loads(line).get("step") or 0 for line in lines[-50:] if line.endswith("}")), default=0)

    def _is_ours(self, recorded: Path) -> bool:
        """Checks whether a config.yaml is one that `open` wrote: it has every section with every key."""
        try:
            content = yaml.safe_load(recorded.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        ours = to_dict(Config())
        return (
            isinstance(content, dict)
            and content.keys() == ours.keys()
            and all(isinstance(content[name], dict) and content[name].keys() == ours[name].keys() for name in ours)
        )

    def _recorded(self, path: Path) -> dict[str, dict[str, Any]]:
        """Reads the recorded configuration.

        Raises:
          InputError: another version of this program wrote it, or it cannot be read.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError):
            raise InputError(f"{path}: cannot be read; restore it or choose another run.directory") from None
        manifest = self.path / "manifest.json"
        layout = read_json(manifest).get("layout") if manifest.exists() else LAYOUT
        if layout != LAYOUT or not self._is_ours(path):
            raise InputError(
                f"{path}: was written by another version of scir_jax, whose files have another layout, or changed "
                "since; finish it with that version, restore it, or choose another run.directory"
            )
        return content


def _write_config(path: Path, config: Config) -> None:
    partial = path.with_name("config.yaml.partial")
    # Where this command ends, and what it accepts, is nothing of the run's.
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, until=None, accept_replaced=()))
    partial.write_text(to_yaml(config), encoding="utf-8")
    partial.replace(path)


def manifest(config: Config, templates: dict[str, Any], *, weights: bool = True) -> dict[str, Any]:
    """Collects versions, seeds, and the SHA-256 of the model's, tokenizer's and data files and of the judge templates.

    Args:
      weights: read the model's weights too; else their bytes are counted.
    """
    models = {"model.path": config.model.path}
    if config.pairs.scorer and not hub.is_function(config.pairs.scorer):
        models["pairs.scorer"] = config.pairs.scorer
    hashes = {
        f"{key}/{file}": value
        for key, name in models.items()
        for file, value in _hashes(hub.directory(name, key), weights).items()
    }
    for key in ("prompts", "ift", "eft", "heldout_prompts", "heldout_pairs", "pairs"):
        if name := getattr(config.data, key):
            hashes[f"data.{key}"] = sources.sha256(name)
    for key, name in (("implicit", config.implicit.reference), ("preference", config.preference.reference)):
        if name not in MODELS:
            hashes |= {f"{key}.reference/{file}": value for file, value in _hashes(Path(name), weights).items()}
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


def _hashes(directory: Path, weights: bool) -> dict[str, str]:
    """Computes the SHA-256 of the files of a model directory that are read, by name."""
    read = (".json", ".jinja", ".safetensors", ".model", ".txt")  # configurations, templates, weights, vocabularies
    return {
        path.name: sha256(path) if weights or path.suffix != ".safetensors" else f"{path.stat().st_size} bytes"
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in read
    }


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
