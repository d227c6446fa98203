"""Between the parameters and the tensors of safetensors files, in the parts in which devices hold them.

A tensor of a layer is a slice of an array that stacks all layers; groups of an array's axes are one axis in a file.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from scir_jax.bucket.fetched import weights_of
from scir_jax.model.hf import transfer
from scir_jax.model.hf.transfer import Index

Params = dict[str, Any]
Names = dict[str, "Tensor"]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# (path, layer) -> the tensor there, with the axes that the parameters have
Tensors = Callable[[tuple[str, ...], int | None], np.ndarray | None]


class Tensor(NamedTuple):
    """Where a tensor of a file lives in the parameters."""

    path: tuple[str, ...]
    layer: int | None  # its index on the leading axis, None where there is no such axis
    groups: tuple[tuple[int, ...], ...]  # sizes of the axes there; in the file each group is one axis

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(map(math.prod, self.groups))

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(self.groups, ())


class Stored(NamedTuple):
    """A tensor in an open file."""

    path: Path
    view: Any  # reads what it is indexed with
    shape: tuple[int, ...]
    dtype: str


def open_file(path: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Opens a file and returns its tensors; only its header is read.

    Args:
      stack: closes the file.

    Raises:
      SafetensorError or OSError: the file cannot be read.
    """
    if in_bucket := weights_of(path):
        views: dict[str, Any] = dict(in_bucket.tensors())
    else:
        file = stack.enter_context(safe_open(path, framework="numpy"))
        views = {name: file.get_slice(name) for name in file.keys()}
    return {name: Stored(path, view, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}


def leaf(params: Params, path: tuple[str, ...]) -> Any:
    """Returns the part of nested parameters at a path."""
    return functools.reduce(lambda part, key: part[key], path, params)


def read(tensor: Tensor, stored: Stored, index: Index | None = None) -> np.ndarray:
    """Reads a tensor with the axes of the parameters, or its part at an index; nothing else of the file is read.

    Raises:
      ValueError: where a part leaves out some of an axis that is not the first of its group.
    """
    index = index or tuple(slice(0, size) for size in tensor.shape)
    parts, flat = iter(index), []
    for group in tensor.groups:
        first, *rest = (next(parts) for _ in group)
        if any((part.start, part.stop) != (0, size) for part, size in zip(rest, group[1:], strict=True)):
            raise ValueError(f"{'.'.join(tensor.path)}: of the axes {group} only the first may be split, not {index}")
        flat.append(slice(first.start * math.prod(group[1:]), first.stop * math.prod(group[1:])))
    return stored.view[tuple(flat)].reshape([part.stop - part.start for part in index])


def load(names: Names, stored: dict[str, Stored], abstract: Params | None = None) -> Params:
    """Reads the parameters that have these tensors, layers in order, into nested dictionaries.

    Args:
      abstract: a jax.ShapeDtypeStruct with a sharding for each of them, into which they are read. Without it they are
        float32 NumPy arrays.

    Raises:
      ValueError: a parameter of `abstract` has another shape than the files.
    """
    sources = defaultdict(list)
    for name, tensor in names.items():
        sources[tensor.path].append((tensor, stored[name]))
    params: Params = {}
    for path, found in sources.items():
        tensor, _ = found[0]
        shape = tensor.shape if tensor.layer is None else (len(found), *tensor.shape)
        if abstract is None:
            value = _part(found, np.float32, tuple(slice(0, size) for size in shape))
        else:
            spec = leaf(abstract, path)
            if spec.shape != shape:
                raise ValueError(f"{'.'.join(path)}: the files have the shape {shape}, not {spec.shape}")
            value = transfer.put(spec, functools.partial(_part, found, spec.dtype))
        place = functools.reduce(lambda part, key: part.setdefault(key, {}), path[:-1], params)
        place[path[-1]] = value
    return params


def _part(sources: list[tuple[Tensor, Stored]], dtype: Any, index: Index) -> np.ndarray:
    """Reads and converts the part of a parameter at an index, one layer at a time."""
    if sources[0][0].layer is None:
        return read(*sources[0], index).astype(dtype, copy=False)
    layers, *rest = index
    value = np.empty([part.stop - part.start for part in index], dtype)
    for place, source in zip(value, sources[layers], strict=True):
        place[...] = read(*source, tuple(rest))
    return value


def of(params: Params, *, wanted: bool) -> Tensors:
    """Gives the tensors of parameters (NumPy or jax arrays), fetched one at a time; see transfer.fetch."""
    return lambda path, layer: transfer.fetch(leaf(params, path), layer, wanted=wanted)


@contextlib.contextmanager
def fetched(names: Names, tensors: Tensors, dtype: Any) -> Iterator[Iterator[tuple[str, np.ndarray | None]]]:
    """Gives an iterator of (name, tensor as it is stored), which fetches each when it is asked for.

    Processes fetch together. If a process fails or has nothing to write, it fetches the rest at the end all the same:
    otherwise the others would wait for it for ever.
    """

    def fetch():
        for name, tensor in names.items():
            value = tensors(tensor.path, tensor.layer)
            if value is not None:
                value = np.ascontiguousarray(value.astype(dtype, copy=False)).reshape(tensor.stored_shape)
            yield name, value

    found = fetch()
    try:
        yield found
    finally:
        if jax.process_count() > 1:
            for _ in found:
                pass
