"""Orbax checkpoints: models between iterations, training states inside a stage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from scir_jax.data.jsonl import read_json, write_json
from scir_jax.engine.checksums import checksums, first_change
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import param_shardings
from scir_jax.errors import InputError
from scir_jax.model import lora

# A failed save reaches the caller as an exception; Orbax's background threads need not print it too.
absl_logging.set_verbosity(absl_logging.FATAL)

COMMITTED = "_CHECKPOINT_METADATA"
"""what Orbax writes last into a checkpoint's directory on a disk"""
COMMITTED_IN_BUCKET = "commit_success.txt"

ARRAYS = "arrays.json"
"""checksums of the arrays of each model, in each of DTYPES"""
DTYPES = ("float32", "bfloat16", "float16")


class ModelStore:
    """M0, M1, ... of a run, parameters only. A model is there completely or not at all."""

    def __init__(self, directory: Path):
        self.directory = _absolute(directory)

    def path(self, number: int | str) -> Path:
        """Returns the directory of M_number, or of a model that is kept by name."""
        return self.directory / (f"M{number}" if isinstance(number, int) else number)

    def exists(self, number: int | str) -> bool:
        """Checks whether M_number is there: its directory has the file that is written last."""
        last = COMMITTED if isinstance(self.directory, Path) else COMMITTED_IN_BUCKET
        return (self.path(number) / last).is_file()

    def numbers(self) -> list[int]:
        """Lists the numbers of the models that are there, in order."""
        found = (int(p.name[1:]) for p in self.directory.glob("M*") if p.name[1:].isdigit())
        return sorted(number for number in found if self.exists(number))

    def latest(self) -> int | None:
        """Returns the number of the newest model, or None without one."""
        return max(self.numbers(), default=None)

    def save(self, number: int | str, params: Any) -> None:
        """Saves parameters as M_number, in the place of an older one."""
        # Models are loaded in the dtype of the computation too.
        sums = {dtype: checksums(params, dtype) for dtype in DTYPES}
        if hosts.first():
            # Before the model: it is never there without them.
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / ARRAYS, {**self._recorded(), self.path(number).name: sums})
        ocp.save(self.path(number), params, overwrite=True)

    def _recorded(self) -> dict[str, dict[str, dict[str, int]]]:
        path = self.directory / ARRAYS
        return read_json(path) if path.exists() else {}

    def load(self, number: int | str, abstract: Any) -> Any:
        """Loads parameters straight into the shardings of `abstract`.

        Raises:
          InputError: the checkpoint is another model's, cannot be read, or its arrays are not those that were saved.
        """
        try:
            found = ocp.load(self.path(number), abstract)
        except Exception as error:
            if difference := self._difference(number, abstract):
                raise InputError(
                    f"{self.path(number)}: is a checkpoint of another model ({difference}); "
                    "take the run.directory or run.start_from that belongs to this model"
                ) from None
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.path(number)}: the checkpoint cannot be read: {reason}") from error
        dtype = str(jax.tree.leaves(found)[0].dtype)
        expected = self._recorded().get(self.path(number).name, {}).get(dtype)
        if expected is None:
            raise InputError(
                f"{self.directory / ARRAYS}: holds no checksums of {self.path(number).name} in {dtype}; restore it"
            )
        if name := first_change(checksums(found), expected):
            raise InputError(
                f"{self.path(number)}: was changed since it was saved ({name} is not what {ARRAYS} says); restore it"
            )
        return found

    def _difference(self, number: int | str, abstract: Any) -> str | None:
        """Names the first array that is not the same there and here."""

        def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
            leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
            return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}

        try:
            there = shapes(ocp.metadata(self.path(number)).metadata)
        except Exception:  # whatever it is that is broken
            return None
        here = shapes(abstract)
        # A checkpoint without a single array is not another model's, but broken.
        for name in sorted(there.keys() | here.keys()) if there else ():
            if there.get(name) != here.get(name):
                return f"{name} is {there.get(name) or 'not'} there, {here.get(name) or 'not'} here"
        return None


class StageCheckpoints:
    """Training states of one stage; saving goes on in the background while training does.

    A checkpoint holds the state, the step and the data iterator's position, so that training goes on to the bit, and
    checksums of all that.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = _absolute(directory)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=ocp.training.preservation_policies.LatestN(keep)
        )
        self._pending = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving `state` as of `step` completed steps; waits for the save before it."""
        self.wait()
        if self._checkpointer.latest is not None and self._checkpointer.latest.step == step:
            return
        meta = {**meta, "arrays": checksums(state)}
        content = dict(state=state, meta={**meta, "sha256": _sha256(meta)})
        self._pending = self._checkpointer.save_checkpointables_async(step, content)

    def wait(self) -> None:
        """Waits for the save that is under way, if there is one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Loads the newest checkpoint.

        Args:
          abstract: shapes and shardings of the state.

        Returns:
          (step, state, meta), or None without a checkpoint.

        Raises:
          InputError: it cannot be read, or is not what was saved.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        path = self.directory / str(latest.step)
        way = "remove it, and the same command goes on from the one before it"
        try:
            found = self._checkpointer.load_checkpointables(latest.step, dict(state=abstract, meta=None))
            meta = dict(found["meta"])
            digest = meta.pop("sha256")
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: the checkpoint cannot be read; {way}: {reason}") from error
        changed = "the record of its step"
        if digest == _sha256(meta):
            changed = first_change(checksums(found["state"]), meta.pop("arrays"))
        if changed:
            raise InputError(f"{path}: was changed since it was saved ({changed} is not what it was); {way}")
        return latest.step, found["state"], meta

    def close(self) -> None:
        """Waits for the save that is under way, and closes the checkpoints."""
        self.wait()
        self._checkpointer.close()

    def remove(self) -> None:
        """Closes and deletes the stage's checkpoints, once its model is saved."""
        self.close()
        hosts.barrier(f"left {self.directory}")
        if hosts.first():
            remove(self.directory)


def remove(directory: Path) -> None:
    """Deletes a directory with all that is in it, on a disk or in a bucket, if it is there."""
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.exists():
        directory.rmtree()


def _absolute(directory: Path) -> Path:
    return directory.absolute() if isinstance(directory, Path) else directory


def _sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def abstract_params(model, mesh) -> Any:
    """Returns the shapes and shardings of a model's parameters.

    Trained ones are float32, frozen ones have the dtype of the computation.
    """

    def as_dtype(part: Any, dtype: str) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=s.sharding), part)

    sharded = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        model.abstract(),
        param_shardings(model, mesh),
    )
    trained, frozen = lora.split(sharded, model.lora)
    return lora.join(as_dtype(trained, "float32"), as_dtype(frozen, model.compute_dtype))
