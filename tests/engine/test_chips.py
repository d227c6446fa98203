"""The table of chips, and TPU slices by name; those with libtpu need it, but no TPU."""

import math
import os
import re
import subprocess
import sys

import jax
import pytest

from scir_jax.engine.cost import chips
from scir_jax.errors import InputError
from scir_jax.planning import topology
from scir_jax.planning.topology import parse

needs_libtpu = pytest.mark.skipif(not topology._installed(), reason="libtpu is not installed")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_chips_by_the_names_that_devices_give(kind, name):
    assert chips.of_device(kind) == chips.CHIPS[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "TPU v3", "TPU v5 litex"]
)
def test_other_devices_have_no_figures(kind):
    assert chips.of_device(kind) is None


def test_this_machines_device_kind_is_looked_up():
    assert chips.of_device(jax.devices("cpu")[0].device_kind) is None


def test_figures_are_of_one_device_and_agree_with_each_other():
    for chip in chips.CHIPS.values():
        # Arithmetic a byte of memory, and memory over links: accelerators are alike within a factor of a few.
        assert 100 < chip.flops / chip.bandwidth < 600
        assert 1 < chip.bandwidth / chip.interconnect < 30
        assert chip.usable is None or 0.9 < chip.usable / chip.memory < 1.01
    ironwood = chips.CHIPS["tpu7x"]
    assert ironwood.devices == 2 and ironwood.flops * 2 == 2307e12 and ironwood.memory * 2 == 192 * 2**30
    assert chips.CHIPS["v5e"].flops == 197e12


@pytest.mark.parametrize(
    ("name", "generation", "shape"),
    [
        ("v5e:4x4", "v5e", (4, 4)),
        ("v5litepod-16", "v5e", (4, 4)),
        ("v5e-8", "v5e", (2, 4)),
        ("v5e:4x2", "v5e", (2, 4)),
        ("v5e-1", "v5e", (1, 1)),
        ("V6E-8 ", "v6e", (2, 4)),
        ("v6e:16x16", "v6e", (16, 16)),
        ("v5p-32", "v5p", (2, 2, 4)),
        ("v5p-8", "v5p", (2, 2, 1)),
        ("v5p:1x2x2", "v5p", (2, 2, 1)),
        ("v4-16", "v4", (2, 2, 2)),
        ("v4:12x4x4", "v4", (4, 4, 12)),
        ("tpu7x-8", "tpu7x", (2, 2, 1)),
        ("v7:4x4x4", "tpu7x", (4, 4, 4)),
    ],
)
def test_names_of_slices(name, generation, shape):
    assert parse(name) == (generation, shape)


@pytest.mark.parametrize("name", ["", "v5e", "v8e:2x2", "4x4", "v5e:4by4", "v3-8", "v5e:", "v5e:2x2x"])
def test_an_unknown_generation_is_refused_with_those_that_exist(name):
    with pytest.raises(InputError, match="v4, v5e, v5p, v6e, tpu7x") as raised:
        parse(name)
    assert f"--topology {name}: " in str(raised.value)


@pytest.mark.parametrize(
    "name", ["v5e:3x3", "v5e-12", "v5e:4x4x4", "v5p:4x4", "v5p-31", "v5p-1", "v4:0x4x4", "v4:64x64x64", "v5e:32x32"]
)
def test_an_unknown_shape_is_refused_with_those_that_exist(name):
    generation = name[:3]
    with pytest.raises(InputError, match="no such slice") as raised:
        parse(name)
    message = str(raised.value)
    smallest = {"v5e": "v5e:1x1 (v5e-1)", "v5p": "v5p:2x2x1 (v5p-8)", "v4:": "v4:2x2x1 (v4-8)"}[generation]
    assert smallest in message and "\n" not in message


def test_without_libtpu_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nonexistent/libtpu.so")
    with pytest.raises(InputError, match=r"pip install 'scir_jax\[tpu\]'"):
        topology.topology("v5e:4x4")
    # What does not exist is said first.
    with pytest.raises(InputError, match="no such slice"):
        topology.topology("v5e:3x3")


def test_what_libtpu_refuses_is_one_sentence(monkeypatch):
    def refuse(**_):
        raise RuntimeError("ABORTED: Internal error\nwhen accessing")

    monkeypatch.setattr(topology, "_installed", lambda: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", refuse)
    with pytest.raises(InputError, match=r"^--topology v5e-4: libtpu refuses it \(ABORTED: Internal error when"):
        topology.topology("v5e-4")


DESCRIBE = """
import os, sys
from scir_jax.planning import topology
before = dict(os.environ)
for name in sys.argv[1:]:
    found = topology.topology(name)
    kinds = {device.device_kind for device in found.devices}
    processes = {device.process_index for device in found.devices}
    print(found.name, found.chips, len(found.devices), found.hosts, len(processes), *kinds, sep=",")
assert dict(os.environ) == before
"""


def child(code, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_libtpu
def test_every_listed_slice_is_described_quietly():
    names = [
        f"{g}:{'x'.join(map(str, s))}" for g, shapes in topology.SHAPES.items() for s in shapes if math.prod(s) < 999
    ]
    done = child(DESCRIBE, *names, "v5p-32", "v5litepod-8")
    assert done.returncode == 0, done.stderr
    assert not re.search("WARNING|ERROR|Failed", done.stderr), done.stderr
    found = {line.split(",")[0]: line.split(",")[1:] for line in done.stdout.splitlines()}
    assert set(found) == set(names)
    for name, (count, devices, hosts, processes, kind) in found.items():
        generation, shape = parse(name)
        assert int(count) == math.prod(shape)
        assert int(devices) == int(count) * chips.CHIPS[generation].devices
        assert hosts == processes
        assert chips.of_device(kind) == chips.CHIPS[generation]
    assert (found["v5e:2x4"][2], found["v5e:4x4"][2], found["v5p:2x2x4"][2]) == ("1", "4", "4")


FILL = """
import jax, jax.numpy as jnp
from scir_jax.planning import topology
for name in ("v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:1x1x1"):
    found = topology.topology(name)
    sharding = jax.sharding.SingleDeviceSharding(found.devices[0])
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    for mib in (found.chip.usable // 2**20 - 256, found.chip.usable // 2**20 + 256):
        # 1 MiB a row
        try:
            add.lower(jax.ShapeDtypeStruct((mib // 8 * 8, 2**18), jnp.float32, sharding=sharding)).compile()
        except jax.errors.JaxRuntimeError as error:
            print("refused" if "RESOURCE_EXHAUSTED" in str(error) else error)
        else:
            print("fits")
"""


@needs_libtpu
def test_usable_memory_is_what_the_compiler_allows():
    done = child(FILL)
    assert done.stdout.split() == ["fits", "refused"] * 5, done.stdout + done.stderr
