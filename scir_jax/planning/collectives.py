"""What devices send each other while a compiled program runs: kinds, bytes and counts, loops multiplied out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from scir_jax.planning import hlo
from scir_jax.planning.hlo import Computation, Instruction, Module

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one size.

    Attributes:
      kind: one of KINDS.
      bytes: of the results on one device; of a reduce-scatter, of its inputs. All runs together.
      count: how often one runs.
      devices: in a group; 0: not given (collective-permute).
      unknown: a loop around one runs an unknown number of times, for which 1 is counted.
    """

    kind: str
    bytes: int
    count: int
    devices: int = 0
    unknown: bool = False

    @property
    def received(self) -> float:
        """Bytes that one device must receive at the least.

        They are (n - 1) / n of the whole in groups of n, for an all-reduce twice as much (a reduce-scatter and an
        all-gather).
        """
        share = 1 - 1 / self.devices if self.devices else 1.0
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


_Key = tuple[str, int]
_Counts = dict[_Key, tuple[int, int, bool]]  # (kind, devices) -> (bytes, count, unknown)


def collectives(hlo_text: str) -> list[Collective]:
    """Counts the collectives of `compiled.as_text()` on one device, the most bytes first.

    Loops count as often as they run (at most, where a condition may end them earlier), of a conditional's branches the
    one with the most bytes. An asynchronous collective counts once, whatever parts the compiler made of it. All-reduces
    of which each device keeps its part only ("all-reduce-scatter" of the TPU compiler) are reduce-scatters.

    Raises:
      ValueError: where the text is no compiled program.
    """
    module = hlo.parse(hlo_text)
    counts = _of(module, module.computations[module.entry], {})
    found = [
        Collective(kind, size, runs, devices, unknown) for (kind, devices), (size, runs, unknown) in counts.items()
    ]
    return sorted(found, key=lambda collective: (-collective.bytes, collective.kind, collective.devices))


def _of(module: Module, computation: Computation, known: Mapping[int, int]) -> _Counts:
    total: _Counts = {}
    channels: set[str] = set()
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            runs = hlo.trip_count(module, computation, instruction, known)
            inner = hlo.loop_constants(module, computation, instruction, known)
            body = _of(module, module.computations[instruction.called["body"]], inner)
            _add(total, body, 1 if runs is None else runs, runs is None)
        elif instruction.opcode == "conditional":
            branches = [_of(module, module.computations[name], {}) for name in instruction.branches]
            _add(total, max(branches, key=lambda counts: sum(size for size, _, _ in counts.values()), default={}))
        elif instruction.opcode == "fusion":
            _add(total, _fusion(module, instruction, channels))
        elif kind := _kind(instruction):
            _add(total, _one(computation, instruction, kind))
        elif not instruction.opcode.endswith(("-done", "-update")):
            # What a reduction applies to its elements holds no collectives; what a call applies may.
            role = "to_apply" if instruction.opcode in ("call", "call-start") else "calls"
            if role in instruction.called:
                _add(total, _of(module, module.computations[instruction.called[role]], {}))
    return total


def _fusion(module: Module, fusion: Instruction, channels: set[str]) -> _Counts:
    """Counts the collectives inside a fusion.

    The TPU compiler spreads a collective over several fusions (start, computation beside it, end), each of which shows
    it, on the same channel.

    Args:
      channels: those of the fusions before it, to which this one's are added.
    """
    total: _Counts = {}
    computation = module.computations[fusion.called["calls"]]
    for instruction in computation.instructions.values():
        if instruction.opcode == "fusion":
            _add(total, _fusion(module, instruction, channels))
            continue
        kind = _kind(instruction)
        channel = _CHANNEL.search(instruction.attributes)
        if kind is None or (channel and channel[1] in channels):
            continue
        if channel:
            channels.add(channel[1])
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        _add(total, _one(computation, instruction, kind))
    return total


def _add(total: _Counts, part: _Counts, times: int = 1, unknown: bool = False) -> None:
    for key, (size, runs, open_ended) in part.items():
        old_size, old_runs, old_unknown = total.get(key, (0, 0, False))
        total[key] = (old_size + times * size, old_runs + times * runs, old_unknown or open_ended or unknown)


def _kind(instruction: Instruction) -> str | None:
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def _one(computation: Computation, instruction: Instruction, kind: str) -> _Counts:
    if kind == "reduce-scatter":
        size = sum(hlo.type_bytes(computation.instructions[name].type) for name in instruction.operands)
    elif instruction.opcode in ("all-reduce-start", *KINDS):
        size = hlo.type_bytes(instruction.type)
    else:  # (operands, results, ...)
        size = hlo.type_bytes(hlo.tuple_types(instruction.type)[1])
    return {(kind, _devices(instruction)): (size, 1, False)}


def _devices(instruction: Instruction) -> int:
    if found := _MESH_GROUPS.search(instruction.attributes):
        sizes = dict(part.split("=") for part in found[1].split(","))
        return math.prod(int(sizes[axis]) for axis in found[2].split(","))
    if found := _IOTA_GROUPS.search(instruction.attributes):
        return int(found[1])
    if found := _LISTED_GROUPS.search(instruction.attributes):
        return len(found[1].split(","))
    return 0
