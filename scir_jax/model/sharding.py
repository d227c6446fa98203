"""The one table from the axes of arrays to those of the device mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# An axis of an array -> the mesh axes that split it, the major one first. Others are whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    # rows of batches, activations and caches
    "batch": ("data", "fsdp"),
    # token places of hidden states between the layers, which the backward pass keeps
    "place": ("tensor",),
    # rows, where the hidden width takes the axis fsdp
    "replica": ("data",),
    # single token places, where every device has work of its own to do
    "token": ("data", "fsdp", "tensor"),
    # parameters, and with them gradients and optimiser state
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # The width of the embedding and of the head. Their vocabulary is not split: log-probabilities take it one chunk
    # at a time, and a split one would be gathered whole.
    "table": ("tensor", "fsdp"),
}

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays lie on a mesh with the axes data, fsdp and tensor. Hashable: it may be part of a static argument."""

    mesh: Mesh

    def spec(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the mesh axes of each axis of an array.

        Where they do not divide an axis, the last of them leaves it whole.
        """
        result: list[Any] = []
        for name, size in zip(axes, shape, strict=True):
            names = RULES.get(name, ())
            while names and size % self.parts(*names):
                names = names[:-1]
            result.append(names or None)
        return PartitionSpec(*result)

    def sharding(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of an array with these axes."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Returns `x` laid out by its axes inside a compiled program."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def parts(self, *names: str) -> int:
        """Counts the parts that these mesh axes make."""
        return math.prod(self.mesh.shape[name] for name in names)

    def shard_size(self, axis: str, size: int) -> int:
        """Returns how much of an axis of this size a device has."""
        return self.sharding((axis,), (size,)).shard_shape((size,))[0]

    def look_up(self, table_VD: jax.Array, ids_BT: jax.Array, dtype: str) -> jax.Array:
        """Takes rows of a table whose width is split ("table"): [B, T, D], rows split ("batch").

        Ids outside the table are clamped. Every device looks its part of the width up for the rows of all, and an
        all-to-all gives each its own rows whole. Neither the table nor its gradient is ever whole on a device, as they
        would be if the compiler chose.
        """
        ids_spec, table_spec = self.spec(("batch", None), ids_BT.shape), self.spec((None, "table"), table_VD.shape)
        rows, width = ids_spec[0] or (), table_spec[1] or ()

        def look_up(table, ids):
            exchanged = "fsdp" in width and "fsdp" in rows
            if exchanged:
                ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
            x = table.at[ids].get(mode="clip").astype(dtype)
            if exchanged:
                x = jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)
            elif "fsdp" in width:
                x = jax.lax.all_gather(x, "fsdp", axis=2, tiled=True)
            if "tensor" in width:
                x = jax.lax.all_gather(x, "tensor", axis=2, tiled=True)
            return x

        return jax.shard_map(
            look_up,
            mesh=self.mesh,
            in_specs=(table_spec, ids_spec),
            out_specs=PartitionSpec(rows or None),
            # An all-gather's result is not known to be the same on all devices.
            check_vma=False,
        )(table_VD, ids_BT)

    def project(self, x_BD: jax.Array, table_VD: jax.Array) -> jax.Array:
        """Multiplies rows with a table whose width is split ("table"): [B, V] float32, rows split ("batch").

        Every device multiplies its part of the width for the rows of all. Parts of products travel, and not the table.
        They are summed over one axis of the mesh after the other, so that the order of a sum does not depend on where
        among its device's rows a row lies.
        """
        table_spec, rows_spec = self.spec((None, "table"), table_VD.shape), self.spec(("batch",), x_BD.shape[:1])
        rows, width = rows_spec[0] or (), table_spec[1] or ()
        scattered = "fsdp" in width and "fsdp" in rows
        kept = tuple(name for name in rows if not (scattered and name == "fsdp"))

        def project(x, table):
            x_BV = jnp.einsum("bd,vd->bv", x, table, preferred_element_type=jnp.float32)
            if scattered:
                x_BV = jax.lax.psum_scatter(x_BV, "fsdp", scatter_dimension=0, tiled=True)
            elif "fsdp" in width:
                x_BV = jax.lax.psum(x_BV, "fsdp")
            return jax.lax.psum(x_BV, "tensor") if "tensor" in width else x_BV

        return jax.shard_map(
            project,
            mesh=self.mesh,
            in_specs=(PartitionSpec(kept or None, width or None), table_spec),
            out_specs=PartitionSpec(rows or None),
            check_vma=False,
        )(x_BD, table_VD)
