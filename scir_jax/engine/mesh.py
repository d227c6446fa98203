"""The device mesh and the one table from a parameter's axes to the mesh's."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scir_jax.config import MeshConfig
from scir_jax.errors import InputError
from scir_jax.model.decoder import Model

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
# The vocabulary is not split: log-probabilities take it a chunk at a time, and a split one would be gathered whole.
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices. InputError where the sizes do not multiply to their number."""
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.device_count()
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh: sizes must be positive, at most one of them -1: data, fsdp, tensor = {sizes}")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise InputError(f"mesh: data x fsdp x tensor = {sizes} does not make the {devices} devices that are here")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data and fsdp axes."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(model: Model, mesh: Mesh):
    """A sharding for every parameter; an axis that does not divide by its mesh axis is left whole."""

    def shard(leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> NamedSharding:
        spec = []
        for size, axis in zip(leaf.shape, axes, strict=True):
            rule = RULES.get(axis)
            spec.append(rule if rule and size % mesh.shape[rule] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(shard, model.abstract(), model.logical_axes())


def put_batch(batch, mesh: Mesh):
    """A host's arrays onto the mesh, split along their leading axis. ValueError where it does not divide."""
    return jax.device_put(jax.tree.map(np.asarray, batch), batch_sharding(mesh))
