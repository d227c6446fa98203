"""The run directory: its files, its lock, and the refusal to mix two configurations in one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from scir_jax.bucket.lease import Lease
from scir_jax.bucket.working import copy_of, place
from scir_jax.config import cli
from scir_jax.config.files import to_dict, to_yaml
from scir_jax.config.schema import Config
from scir_jax.data.jsonl import read_json, write_json
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.hosts import hosts
from scir_jax.engine.hosts.hosts import SEEN
from scir_jax.errors import InputError
from scir_jax.run import console, hub
from scir_jax.run.changes import ADDED, Change, compare, settings_hash
from scir_jax.run.manifest import LAYOUT, hashes_of
from scir_jax.run.places import checkpoints_of
from scir_jax.run.trackers import IDENTITY


class RunDirectory:
    """Paths of a run. Iteration 0 is SFT; iteration t turns M_t into M_{t+1}.

    Attributes:
      changes: harmless changes of the configuration that `open` found; `check_manifest` records them.
    """

    def __init__(self, path: str | Path):
        """
        Args:
          path: of a disk, or gs://BUCKET/PATH, or the working copy of a run there.
        """
        self.path = place(path)
        self._copy = copy_of(self.path)
        self.checkpoints = checkpoints_of(self.path)
        self.changes: list[Change] = []
        self._config: Config | None = None
        self._lock: FileLock | Lease | None = None

    @property
    def begun(self) -> bool:
        """Whether the first model is there; on a disk its directory appears with all that is in it."""
        return (self.path / "checkpoints" / "M0").is_dir() or ModelStore(self.checkpoints).exists(0)

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

    def check_layout(self) -> None:
        """Refuses a run whose files have another layout.

        Raises:
          InputError: another version of this program wrote it.
        """
        manifest = self.path / "manifest.json"
        if manifest.exists() and read_json(manifest).get("layout") != LAYOUT:
            raise InputError(
                f"{self.path}: was written by another version of scir_jax, whose files have another layout; use that "
                "version"
            )

    def check_models(self, config: Config) -> None:
        """Refuses to compute with another model than the run's: its weights count where they are not trained.

        Raises:
          InputError: the run is not complete, or its model is gone or has changed.
        """
        path, adapted = self.path / "manifest.json", bool(config.lora.rank or config.lora.adapter)
        if not path.exists():
            raise InputError(f"{self.path}: holds no models, or manifest.json was removed; restore it")
        self.check_places(config, ("model.path", *(("lora.adapter",) if config.lora.adapter else ())))
        recorded = read_json(path)["sha256"]
        found = hashes_of(hub.directory(config.model.path, "model.path"), adapted)
        for file, value in found.items():
            if recorded.get(f"model.path/{file}") != value and (adapted or not file.endswith(".safetensors")):
                raise InputError(
                    f"{self.path}: changed since this run began: model.path/{file} in {config.model.path}; restore it"
                )

    def check_places(self, config: Config, wanted: Sequence[str]) -> None:
        """Refuses a run whose model or data are not where it has them.

        Args:
          wanted: keys of the configuration; those without a value, and names that may be the hub's, are let be.

        Raises:
          InputError: one is gone; it is named.
        """
        for key in wanted:
            section, field = key.split(".")
            name = getattr(getattr(config, section), field)
            elsewhere = not name or "://" in name or (section != "data" and hub.NAME.fullmatch(name))
            # A name of data that is no path may be that of a data set.
            if elsewhere or Path(name).exists() or (section == "data" and not Path(name).suffix):
                continue
            raise InputError(
                f"{self.path}: {key} is {name}, which is not there; restore it, or tell the run where it lies now: "
                f"python -m scir_jax.train --config {self.path}/config.yaml --run {self.path} --{key} PLACE"
            )

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
        self._take(config.run.lease)
        recorded = self.path / "config.yaml"
        # Until the first model is imported nothing depends on the configuration: a corrected one may take its place.
        if recorded.exists() and self.begun:
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

    def _take(self, lease: float) -> None:
        """Makes the directory, and keeps other processes out of it."""
        if self._copy is not None:
            self._lock = self._copy.lease = Lease(self._copy.folder, lease)
            self._copy.lease.acquire(console.say)
            # What was here when the command began may have been another process's in the middle of its work.
            self._copy.pull()
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.path}: is a file, or below one; choose another run.directory") from None
        except PermissionError:
            raise InputError(f"{self.path}: may not be written; choose another run.directory") from None
        # The lock is held until the process ends, however it ends: the kernel frees it.
        self._lock = lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{self.path}: another process is running here; wait for it or choose another run.directory"
            ) from None

    def share(self) -> None:
        """Lets the hosts have one directory, after the first of them has opened it. All hosts call it.

        Raises:
          InputError: on all hosts, where they have no disk in common and the directory is in no bucket.
        """
        if self._copy is None:
            hosts.shares(self.path)
        elif not hosts.first():
            self._copy.pull()

    def close(self) -> None:
        """Brings what was written to where the run lies, and unlocks the directory."""
        if self._copy is not None and (self._lock is not None or not hosts.first()):
            self._copy.push()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

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


def settings_of(path: Path, several: bool = False) -> Config:
    """Reads the settings that a run directory records, with run.directory and run.distributed as they are here.

    Args:
      several: whether this is one of several processes.

    Raises:
      InputError: the directory is no run's, or that of another version.
    """
    RunDirectory(path).check_layout()
    return cli.of_run(path, several)


def _write_config(path: Path, config: Config) -> None:
    partial = path.with_name("config.yaml.partial")
    # Where this command ends, and what it accepts, is nothing of the run's.
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, until=None, accept_replaced=()))
    partial.write_text(to_yaml(config), encoding="utf-8")
    partial.replace(path)
