"""Instructions, arrays and loops in the text of a compiled program.

What `compiled.as_text()` of XLA's CPU, GPU and TPU compilers says, for those who count.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

UNCHANGED = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"}


@dataclass(frozen=True)
class Instruction:
    """`name = type opcode(arguments), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, name: str) -> str | None:
        """What follows `name=`, a list in braces without them."""
        found = re.search(rf"[, ]{name}=(\{{[^}}]*\}}|[^, ]+)", self.attributes)
        return found and found[1].strip('{}%"')

    def names(self, name: str) -> list[str]:
        """The list of names or numbers that follows `name=`."""
        return re.findall(r"[\w.-]+", self.attribute(name) or "")

    def numbers(self, name: str) -> list[int]:
        """The list of numbers that follows `name=`."""
        return [int(number) for number in self.names(name)]


class Computation(dict[str, Instruction]):
    """Instructions by name, of which one is the root."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.root = ""

    def origin(self, name: str) -> Instruction:
        """What an instruction copies, through tuples."""
        found = self[name]
        while True:
            if found.opcode in UNCHANGED and found.operands:
                found = self[found.operands[0]]
            elif found.opcode == "get-tuple-element":
                source = self.origin(found.operands[0])
                if source.opcode != "tuple":
                    return found
                found = self[source.operands[found.numbers("index")[0]]]
            else:
                return found


class Module:
    """The computations of a program, of which one is its entry."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = Computation("")
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = Computation(header[2])
                self.computations[current.name] = current
                if header[1]:
                    self.entry = current.name
            elif found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)", line):
                instruction = _instruction(found[2], found[3])
                current[instruction.name] = instruction
                if found[1]:
                    current.root = instruction.name
        if not self.entry:
            raise ValueError("hlo_text: the text has no ENTRY computation")

    def iterations(self, loop: Instruction, where: Computation) -> int:
        """How often a loop runs that counts up to a constant."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (
            self.computations[loop.names(role)[0]] for role in ("condition", "body")
        )
        test, initial = condition[condition.root], where.origin(loop.operands[0])
        parts = [condition.origin(operand) for operand in test.operands]
        opcodes = [test.opcode, initial.opcode, *(part.opcode for part in parts)]
        if opcodes == ["compare", "tuple", "get-tuple-element", "constant"]:
            index = parts[0].numbers("index")[0]
            start = where.origin(initial.operands[index])
            step = body.origin(body[body.root].operands[index])
            constants = [
                part.arguments
                for part in (start, *map(body.origin, step.operands))
                if part.opcode == "constant"
            ]
            if (
                test.attribute("direction") == "LT"
                and (start.opcode, step.opcode) == ("constant", "add")
                and constants[1:] == ["1"]
            ):
                return max(0, int(parts[1].arguments) - int(start.arguments))
        raise ValueError(f"hlo_text: {loop.name} runs an unknown number of times")


def _instruction(name: str, text: str) -> Instruction:
    """Parses what stands behind `name = `."""
    type_end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    rest = text[type_end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    return Instruction(
        name=name,
        type=text[:type_end],
        opcode=rest[:opening],
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes with which a text begins."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"hlo_text: parentheses do not match in {text[:80]!r}")


def arrays_of(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of all arrays of a type."""
    return [
        (dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", type_text)
    ]


def bytes_of(array: tuple[str, tuple[int, ...]]) -> float:
    """Of an array of a dtype and a shape."""
    dtype, shape = array
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return math.prod(shape) * (int(bits[1]) if bits else 8) / 8


def shape_of(instruction: Instruction) -> tuple[int, ...]:
    """Of the first array of a result."""
    return arrays_of(instruction.type)[0][1]
