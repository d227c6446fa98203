"""Accelerators: peak arithmetic, memory, bandwidths. All figures are those of one JAX device.

TPUs: the system architecture pages of Cloud TPU ("TPU v5e", ..., "TPU7x (Ironwood)" at docs.cloud.google.com/tpu/docs),
where chips have one JAX device each but for tpu7x, whose two TensorCores are two devices with half of the chip each.
`usable` is what libtpu 0.0.42's compiler names as "available HBM" when it refuses a program; the rest is its own.
GPUs: NVIDIA's data sheets, without sparsity (half of the figures that are given with it).
"""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator, as one JAX device sees it.

    Attributes:
      kinds: regular expression of jax.Device.device_kind, in lower case.
      flops: peak of dense bfloat16 matrix products, FLOP/s.
      memory: bytes of high-bandwidth memory.
      usable: bytes of it that programs may use; None: ask the device.
      bandwidth: of the memory, bytes/s.
      interconnect: bytes/s that can come in from other chips over all links: half of a "bidirectional" figure.
      devices: JAX devices per chip.
      source: where the figures are from.
    """

    name: str
    kinds: str
    flops: float
    memory: int
    usable: int | None
    bandwidth: float
    interconnect: float
    devices: int
    source: str


def _tpu(name, kinds, teraflops, memory, usable, gigabytes, interconnect, source, devices=1) -> Chip:
    """Makes a TPU from the figures of a chip; `usable` is of a device already."""
    return Chip(
        name,
        kinds,
        flops=teraflops * 1e12 / devices,
        memory=memory * GIB // devices,
        usable=int(usable * GIB),
        bandwidth=gigabytes * 1e9 / devices,
        interconnect=interconnect * 1e9 / devices,
        devices=devices,
        source=source,
    )


def _gpu(name, kinds, teraflops, memory, gigabytes, interconnect, source) -> Chip:
    return Chip(name, kinds, teraflops * 1e12, int(memory * 1e9), None, gigabytes * 1e9, interconnect * 1e9, 1, source)


# TFLOP/s, GiB, usable GiB, GB/s of memory, GB/s of links in one direction
TPUS = (
    _tpu("v4", "tpu v4", 275, 32, 30.75, 1200, 300, "TPU v4; links: arXiv 2304.01433, six of 50 GB/s each way"),
    _tpu("v5e", "tpu v5 ?(lite|e)", 197, 16, 15.75, 819, 200, "TPU v5e; 400 GB/s bidirectional"),
    _tpu("v5p", "tpu v5p?", 459, 95, 95.74, 2765, 600, "TPU v5p; 1200 GB/s bidirectional"),
    _tpu("v6e", "tpu v6 ?(lite|e)", 918, 32, 31.25, 1638, 400, "TPU v6e (Trillium); 800 GB/s bidirectional"),
    _tpu("tpu7x", "tpu ?v?7x?", 2307, 192, 94.75, 7380, 600, "TPU7x (Ironwood); 1200 GB/s bidirectional", devices=2),
)
# TFLOP/s, GB, GB/s of memory, GB/s of NVLink (PCIe where there is none) in one direction
GPUS = (
    _gpu("A100 40GB", "a100-(sxm4|pcie)-40gb", 312, 40, 1555, 300, "NVIDIA A100 data sheet"),
    _gpu("A100 80GB SXM", "a100-sxm4-80gb", 312, 80, 2039, 300, "NVIDIA A100 data sheet"),
    _gpu("A100 80GB PCIe", "a100 80gb pcie", 312, 80, 1935, 300, "NVIDIA A100 data sheet; NVLink bridge"),
    _gpu("H100 SXM", "h100 80gb hbm3", 989.4, 80, 3350, 450, "NVIDIA H100 data sheet, SXM5"),
    _gpu("H100 PCIe", "h100 pcie", 756, 80, 2000, 300, "NVIDIA H100 data sheet, PCIe; NVLink bridge"),
    _gpu("H100 NVL", "h100 nvl", 835, 94, 3900, 300, "NVIDIA H100 data sheet, NVL; NVLink bridge"),
    _gpu("H200", "h200", 989.4, 141, 4800, 450, "NVIDIA H200 data sheet, SXM"),
    _gpu("B200", "b200", 2250, 180, 8000, 900, "NVIDIA DGX B200 data sheet, one of eight"),
    _gpu("L4", "l4", 121, 24, 300, 32, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
    _gpu("L40S", "l40s", 362, 48, 864, 32, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
)
CHIPS = {chip.name: chip for chip in (*TPUS, *GPUS)}


def of_device(kind: str) -> Chip | None:
    """Finds the chip of a jax.Device.device_kind.

    Returns:
      The chip, or None for any that is not in the table: a CPU, a part of a GPU, others.
    """
    kind = " ".join(kind.lower().removeprefix("nvidia").split())
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kinds, kind)), None)
