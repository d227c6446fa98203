"""Arrays of a mesh from the host and to it, a part at a time: no host ever holds a whole one of a model's size.

The mesh may span the devices of several processes. Each then puts its own parts, and all of them fetch together.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Index = tuple[slice, ...]  # one for every axis, with its start and its stop
_BLOCK = 2**28  # bytes of an array without a layer axis that are fetched at a time


def put(spec: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """Makes the array of a shape, dtype and sharding, part by part.

    Args:
      read: gives the part at an index, in the array's dtype. It is asked once for every different part that lies on
        this process's devices, also for one that lies on several of them.
    """
    devices = defaultdict(list)
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        devices[tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True))].append(device)
    parts = []
    for bounds, copies in devices.items():
        value = read(tuple(slice(*bound) for bound in bounds))
        # Waiting keeps one part on the host: copies to a device go on after the call.
        parts += jax.block_until_ready([jax.device_put(value, device) for device in copies])
        del value
    return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, parts)


def fetch(array: jax.Array | np.ndarray, layer: int | None = None, *, wanted: bool = True) -> np.ndarray | None:
    """Fetches a layer of an array whose leading axis is the layers, or the whole of another array (layer is None).

    Every process that holds a part of the array must call this, in the same order. All but those that want the result
    get None, and have nothing of it on their host.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer]) if wanted else None
    if layer is not None:
        part = _rows(array, layer, 1, wanted)
        return part[0] if wanted else None
    size = len(array)
    step = max(1, _BLOCK * size // array.nbytes)
    if step >= size:
        return _rows(array, 0, size, wanted)
    whole = np.empty(array.shape, array.dtype) if wanted else None
    for start in range(0, size, step):
        part = _rows(array, start, min(step, size - start), wanted)
        if wanted:
            whole[start : start + step] = part
    return whole


def _rows(array: jax.Array, start: int, size: int, wanted: bool) -> np.ndarray | None:
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        # The slice goes to every device where no host has all parts; a host that has them puts them together itself.
        rest = sharding.spec[1:] if array.is_fully_addressable else ()
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *rest))
    part = _slice(sharding, size)(array, start)
    if wanted:
        return np.asarray(part)
    # Those that want nothing wait as well: they must not fill their devices with slices ahead of the others.
    jax.block_until_ready(part)
    return None


@functools.cache
def _slice(sharding: jax.sharding.Sharding, size: int) -> Callable[[jax.Array, int], jax.Array]:
    """Makes the jitted (array, start) -> its `size` rows from there; it is compiled once per shape."""
    return jax.jit(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size), out_shardings=sharding)
