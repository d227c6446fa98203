"""Compiled programs as text (HLO, after partitioning and optimisation): their computations and loops.

Only what counting needs: instructions with their types, operands and called computations, and how often a loop runs.
The compiler of GPUs and CPUs notes that in the text; that of TPUs does not, there it is read off the loop's condition.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_DIRECTION = re.compile(r"direction=(\w+)")
_INTEGER = re.compile(r"[su]\d+\[\]")
_INDEX = re.compile(r"\bindex=(\d+)")
# Copies of a value in another layout, place or type.
_SAME = ("copy", "bitcast", "convert", "reshape", "broadcast", "copy-start", "copy-done", "optimization-barrier")

Known = Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      type: as it is written: "f32[8,4]{1,0}" or a tuple of such.
      operands: their names, all in the same computation.
      called: names of computations by role: condition, body, calls, to_apply.
      branches: computations of which a conditional runs one.
      attributes: the rest of the line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # between the parentheses: a constant's value, a parameter's number
    attributes: str
    called: Mapping[str, str]
    branches: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, and the name of the one whose value the computation returns."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of the one that it starts with."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the computations of `compiled.as_text()`.

    Raises:
      ValueError: the text holds none.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    name, root, found = "", "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, root, found = header[2], "", {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            # Not the end for certain: a kernel's configuration may have such a line within an instruction.
            computations[name] = Computation(name, found, root)
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3])
            found[match[2]] = instruction
            root = match[2] if match[1] else root
    if not entry:
        raise ValueError("no entry computation in the text of a compiled program")
    return Module(computations, entry)


def type_bytes(text: str) -> int:
    """Counts the bytes of a type; of a tuple, of all its parts."""
    bits = 0
    for kind, sizes in _ARRAY.findall(text):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        digits = re.match(r"[a-z]+(\d+)", kind)
        bits += count * _BITS.get(kind, int(digits[1]) if digits else 0)
    return -(-bits // 8)


def tuple_types(text: str) -> list[str]:
    """Returns the types of a tuple's parts, or the type itself where it is none."""
    if not text.startswith("("):
        return [text]
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return parts


def trip_count(module: Module, computation: Computation, loop: Instruction, known: Known) -> int | None:
    """Finds how often a while loop's body runs: at most, where the loop may also end earlier.

    Args:
      computation: what the loop is in.
      known: integers that are known of the computation's parameter, by their place in its tuple.

    Returns:
      The number, or None where it is not found.
    """
    if noted := _TRIP_COUNT.search(loop.attributes):
        return int(noted[1])
    condition = module.computations[loop.called["condition"]]
    start = _tuple_values(module, computation, loop.operands[0], known)
    steps = {place: added for place, added in _body_changes(module, loop).items() if added > 0}
    return _runs(_Scope(module, condition), condition.root, start, steps)


def loop_constants(module: Module, computation: Computation, loop: Instruction, known: Known) -> dict[int, int]:
    """Returns the known integers of a loop's tuple that its body does not change, by their place.

    Args:
      computation, known: as in `trip_count`.
    """
    start = _tuple_values(module, computation, loop.operands[0], known)
    changes = _body_changes(module, loop)
    return {place: value for place, value in start.items() if changes.get(place) == 0}


def _instruction(name: str, rest: str) -> Instruction:
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    text, attributes = rest[:end], rest[end + 1 :]
    # Metadata repeats names of Python functions, and a constant's digits are no operands.
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(text))
    attributes = re.sub(r", metadata=\{[^}]*\}", "", attributes)
    branches = _BRANCHES.search(attributes)
    called = dict(_CALLED.findall(attributes))
    names = tuple(_NAME.findall(branches[1])) if branches else ()
    names += tuple(called.pop(role) for role in ("true_computation", "false_computation") if role in called)
    return Instruction(name, kind, opcode.strip(), operands, text, attributes, called, names)


def _split_type(text: str) -> tuple[str, str]:
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    kind, _, rest = text.partition(" ")
    return kind, rest


def _closing(text: str) -> int:
    """Finds the place of the parenthesis that closes one opened before the text."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(text)


class _Sum(NamedTuple):
    """A constant, plus an element of the tuple that is the parameter of the computation."""

    place: int | None
    constant: int

    def value(self, known: Known) -> int | None:
        if self.place is None:
            return self.constant
        return known[self.place] + self.constant if self.place in known else None


class _Scope(NamedTuple):
    """A computation in use; with `arguments`, one that is called: sums in terms of its caller's parameter."""

    module: Module
    computation: Computation
    arguments: tuple[_Sum | None, ...] | None = None

    def called(self, caller: Instruction) -> _Scope:
        name = caller.called.get("calls") or caller.called["to_apply"]
        arguments = tuple(_sum(self, operand) for operand in caller.operands)
        return _Scope(self.module, self.module.computations[name], arguments)


def _sum(scope: _Scope, name: str) -> _Sum | None:
    """Reads off what an integer is, as far as possible; else None."""
    instruction = scope.computation.instructions.get(name)
    if instruction is None or not _INTEGER.match(instruction.type):
        return None
    if instruction.opcode == "constant":
        return _Sum(None, int(instruction.text)) if instruction.text.lstrip("-").isdigit() else None
    if instruction.opcode == "parameter":
        return None if scope.arguments is None else scope.arguments[int(instruction.text)]
    if instruction.opcode in _SAME:
        return _sum(scope, instruction.operands[0])
    if instruction.opcode in ("fusion", "call"):
        inner = scope.called(instruction)
        return _sum(inner, inner.computation.root)
    if instruction.opcode == "get-tuple-element":
        return _element(scope, instruction.operands[0], int(_INDEX.search(instruction.attributes)[1]))
    if instruction.opcode in ("add", "subtract"):
        a, b = (_sum(scope, operand) for operand in instruction.operands)
        if a is None or b is None or (a.place is not None and b.place is not None):
            return None
        if instruction.opcode == "add":
            return _Sum(b.place if a.place is None else a.place, a.constant + b.constant)
        return _Sum(a.place, a.constant - b.constant) if b.place is None else None
    return None


def _element(scope: _Scope, name: str, place: int) -> _Sum | None:
    source = scope.computation.instructions[name]
    if source.opcode == "parameter" and scope.arguments is None:
        return _Sum(place, 0)
    if source.opcode == "tuple":
        return _sum(scope, source.operands[place])
    if source.opcode in ("fusion", "call"):
        inner = scope.called(source)
        return _element(inner, inner.computation.root, place)
    # A loop hands through what it does not change.
    if source.opcode == "while" and _body_changes(scope.module, source).get(place) == 0:
        return _element(scope, source.operands[0], place)
    return None


def _tuple_values(module: Module, computation: Computation, name: str, known: Known) -> dict[int, int]:
    """Returns the known integers of a tuple, by their place."""
    scope = _Scope(module, computation)
    places = range(len(tuple_types(computation.instructions[name].type)))
    sums = {place: _element(scope, name, place) for place in places}
    values = {place: found.value(known) for place, found in sums.items() if found is not None}
    return {place: value for place, value in values.items() if value is not None}


def _body_changes(module: Module, loop: Instruction) -> dict[int, int]:
    """Returns the constants that a loop's body adds to elements of its tuple, by place; 0 for those it leaves alone."""
    body = module.computations[loop.called["body"]]
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return {}
    scope = _Scope(module, body)
    sums = {place: _sum(scope, operand) for place, operand in enumerate(root.operands)}
    return {place: found.constant for place, found in sums.items() if found is not None and found.place == place}


def _runs(scope: _Scope, name: str, start: Known, steps: Known) -> int | None:
    """Finds the most runs that a condition allows; of several that must all hold, the fewest."""
    instruction = scope.computation.instructions[name]
    if instruction.opcode in _SAME:
        return _runs(scope, instruction.operands[0], start, steps)
    if instruction.opcode in ("fusion", "call"):
        inner = scope.called(instruction)
        return _runs(inner, inner.computation.root, start, steps)
    if instruction.opcode == "and":
        found = [_runs(scope, operand, start, steps) for operand in instruction.operands]
        return min((runs for runs in found if runs is not None), default=None)
    if instruction.opcode != "compare":
        return None
    left, right = (_sum(scope, operand) for operand in instruction.operands)
    direction = _DIRECTION.search(instruction.attributes)[1]
    if direction in ("GT", "GE"):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE") or left is None or right is None or left.place not in steps:
        return None
    first, limit = left.value(start), right.value(start)
    # A limit that changes is not one.
    if first is None or limit is None or right.place in steps:
        return None
    distance = limit - first + (direction == "LE")
    return max(-(-distance // steps[left.place]), 0)
