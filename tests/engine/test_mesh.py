"""Meshes that do not divide the devices, the model or a batch: which number, and what would."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec

from scir_jax.config.schema import MeshConfig
from scir_jax.engine import mesh as meshes
from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.model.sharding import Layout

ARCH = Architecture("llama", 32_000, 96, 240, 12, 4, 8, (Layer(),))


def mesh_of(data, fsdp, tensor):
    """A mesh's sizes, without its devices."""
    return SimpleNamespace(shape=dict(data=data, fsdp=fsdp, tensor=tensor), size=data * fsdp * tensor)


def message(call):
    with pytest.raises(InputError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((1, 1, 8), "mesh.tensor 8 does not divide the model's 4 (key/value heads); of 8 devices 1, 2 or 4 would"),
        ((1, 2, 3), "mesh.tensor 3 does not divide the model's 4 (key/value heads); of 6 devices 1 or 2 would"),
        ((1, 5, 1), "mesh.fsdp 5 does not divide the model's 96 (hidden width); of 5 devices 1 would"),
        (
            (1, 64, 1),
            "mesh.fsdp 64 does not divide the model's 96 (hidden width); of 64 devices 1, 2, 4, 8, 16 or 32 would",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(sizes, expected):
    assert message(lambda: meshes.check_model(mesh_of(*sizes), ARCH)) == expected


def test_other_numbers_of_the_model_are_looked_at_too():
    heads = ARCH.__class__("llama", 32_000, 96, 242, 12, 4, 8, (Layer(),))
    assert "242 (feed-forward width)" in message(lambda: meshes.check_model(mesh_of(1, 1, 4), heads))
    for sizes in ((1, 1, 4), (3, 16, 2), (1, 96, 1), (7, 1, 1)):
        meshes.check_model(mesh_of(*sizes), ARCH)


@pytest.mark.parametrize(
    "size, micro, sizes, meshes_",
    [
        (12, 1, "12 does not divide into 8 batch shards of the mesh (data x fsdp); 8 or 16", "1, 2, 3, 4, 6 or 12"),
        (4, 1, "4 does not divide into 8 batch shards of the mesh (data x fsdp); 8", "1, 2 or 4"),
        (
            40,
            4,
            "40 does not divide into 4 micro-batches x 8 batch shards of the mesh (data x fsdp); 32 or 64",
            "1 or 2",
        ),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide(size, micro, sizes, meshes_):
    check = lambda: meshes.check_batches(mesh_of(2, 4, 3), {"optimise.batch_size": (size, micro)})
    expected = f"optimise.batch_size {sizes} would, or with {size} as it is a mesh whose data x fsdp is {meshes_}"
    assert message(check) == expected
    meshes.check_batches(mesh_of(2, 4, 3), {"a": (0, 1), "b": (64, 4)})


@pytest.mark.parametrize(
    "sizes, advice",
    [
        ((1, 3, 1), "mesh.fsdp 1"),
        ((2, -1, 1), "mesh.data 1"),
        ((1, 1, 5), "mesh.tensor 1"),
    ],
)
def test_advice_for_a_mesh_of_other_devices(sizes, advice):
    text = message(lambda: meshes.make_mesh(MeshConfig(*sizes), jax.devices()[:1]))
    assert "does not make the 1 devices" in text and advice in text


def test_an_axis_is_split_by_what_divides_it():
    layout = Layout(mesh_of(2, 4, 2))
    assert layout.spec(("batch", None, "heads"), (16, 5, 6)) == PartitionSpec(("data", "fsdp"), None, ("tensor",))
    assert layout.spec(("batch", "heads"), (6, 5)) == PartitionSpec(("data",), None)
    assert layout.spec((None, "table"), (7, 8)) == PartitionSpec(None, ("tensor", "fsdp"))
    assert layout.spec(("token",), (8,)) == PartitionSpec(("data", "fsdp"))
