"""The device mesh, and arrays on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scir_jax.config.schema import MeshConfig
from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture
from scir_jax.model.decoder import Model
from scir_jax.model.sharding import Layout

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh (data, fsdp, tensor).

    Args:
      devices: another machine's, to compile for it; by default all devices here.

    Raises:
      InputError: the sizes do not multiply to the devices' number.
    """
    sizes = dict(zip(AXES, (config.data, config.fsdp, config.tensor), strict=True))
    count = jax.device_count() if devices is None else len(devices)
    free = [name for name, size in sizes.items() if size == -1]
    given = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh: sizes must be positive, at most one of them -1, not {given}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and count % known == 0:
        sizes[free[0]] = count // known
    if math.prod(sizes.values()) != count:
        rest = {name: known // sizes[name] for name in sizes if sizes[name] != -1}
        advice = [f"mesh.{name} {count // others}" for name, others in rest.items() if count % others == 0]
        advice = [*advice, *(f"mesh.{name} -1" for name in AXES if not free and count % rest[name] == 0)][:2]
        raise InputError(
            f"mesh: data x fsdp x tensor ({given}) does not make the {count} devices; "
            f"{' or '.join(advice) or 'mesh.fsdp -1 with data and tensor 1'} would"
        )
    # Devices that are near in a slice lie on one axis of the mesh, which may be a part of one of the slice's axes.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def fitting(config: MeshConfig) -> MeshConfig:
    """Returns a mesh for the devices here: the given one where it fits, else all devices on fsdp.

    Args:
      config: mesh of a run that was perhaps made elsewhere.
    """
    try:
        make_mesh(config)
    except InputError:
        return MeshConfig(data=1, fsdp=-1, tensor=1)
    return config


def check_model(mesh: Mesh, arch: Architecture) -> None:
    """Checks that the mesh divides the model.

    Raises:
      InputError: it does not; the sentence says which number, and what would.
    """
    tensor = {
        "key/value heads": arch.num_kv_heads,
        "attention heads": arch.num_heads,
        "feed-forward width": arch.intermediate_size,
    }
    for axis, numbers in (("tensor", tensor), ("fsdp", {"hidden width": arch.hidden_size})):
        for what, number in numbers.items():
            if number % mesh.shape[axis]:
                would = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and number % n == 0]
                raise InputError(
                    f"mesh.{axis} {mesh.shape[axis]} does not divide the model's {number} ({what}); "
                    f"of {mesh.size} devices {_either(would)} would"
                )


def check_batches(mesh: Mesh, batches: dict[str, tuple[int, int]]) -> None:
    """Checks that batches divide over the mesh.

    Args:
      batches: key -> (rows or pairs, micro-batches that they are taken in).

    Raises:
      InputError: one does not; the sentence says which sizes would.
    """
    shards = batch_shards(mesh)
    for key, (size, micro) in batches.items():
        if size % (micro * shards):
            unit = micro * shards
            near = [n for n in (size // unit * unit, -(-size // unit) * unit) if n]
            parts = f"{micro} micro-batches x {shards}" if micro > 1 else f"{shards}"
            raise InputError(
                f"{key} {size} does not divide into {parts} batch shards of the mesh (data x fsdp); "
                f"{_either(near)} would, or with {size} as it is a mesh whose data x fsdp is "
                f"{_either([n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % (micro * n) == 0])}"
            )


def _either(numbers: Sequence[int]) -> str:
    *first, last = map(str, dict.fromkeys(numbers))
    return f"{', '.join(first)} or {last}" if first else last


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits rows over the data and fsdp axes."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
    """Counts the parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(model: Model, mesh: Mesh):
    """Returns a sharding for every parameter, in the structure of the parameters."""
    layout = Layout(mesh)
    return jax.tree.map(lambda leaf, axes: layout.sharding(axes, leaf.shape), model.abstract(), model.logical_axes())


def cache_sharding(model: Model, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of keys or values [layers, rows, places, key/value heads, head dimension]."""
    rows, heads = batch_shards(mesh), model.arch.num_kv_heads
    return Layout(mesh).sharding((None, "batch", None, "kv_heads", None), (1, rows, 1, heads, 1))


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Returns the numbers of the rows of a batch of `size` that this host's devices hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def owned_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Returns the numbers of the rows of a batch of `size` that this host has to write.

    The first of the hosts that hold a row has it, so that every row is in exactly one host's answer.
    """
    places = batch_sharding(mesh).devices_indices_map((size,))
    owner = np.full(size, jax.process_count())
    for device, place in places.items():
        owner[place] = np.minimum(owner[place], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def put_batch(batch, mesh: Mesh):
    """Puts a batch onto the mesh, split along its leading axis.

    Args:
      batch: arrays of this host's `local_rows`.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    sharding = batch_sharding(mesh)
    batch = jax.tree.map(np.asarray, batch)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    mine = len(local_rows(mesh, batch_shards(mesh)))

    def put(local: np.ndarray) -> jax.Array:
        whole = len(local) * batch_shards(mesh) // mine
        rows = local_rows(mesh, whole)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first = int(np.searchsorted(rows, index[0].start or 0))
            return local[first : first + whole // batch_shards(mesh)]

        return jax.make_array_from_callback((whole, *local.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)
