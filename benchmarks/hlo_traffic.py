"""What a compiled TPU program moves from and to its memory.

Read from the text of an optimized module (`compiled.as_text()`): layouts say which
arrays lie in the memory of the chip (HBM) and which in that of its core, and loops
count as often as they run. The `cost_analysis` of XLA counts their bodies once, and
arrays of either memory.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from hlo_text import Computation, Instruction, Module, arrays_of, bytes_of

# What moves nothing by itself.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
# Calls of the compiler that only name memory.
FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|Assume)')
ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
SLICES = {"slice", "dynamic-slice"}


def hbm_bytes(text: str) -> float:
    """Bytes that one execution of a program reads from and writes to HBM.

    Of an array of which a fusion reads slices, or which it writes in place, only the
    slices count. Of the branches of a conditional the cheapest counts: the others are
    for rare data. What kernels of the compiler move within themselves is unknown.

    Args:
      text: `compiled.as_text()`, of one device.

    Raises:
      ValueError: If a loop has an unknown number of iterations.
    """
    module = Module(text)
    return _of_computation(module, module.entry)


def _of_computation(module: Module, name: str) -> float:
    where = module.computations[name]
    return sum(_of_instruction(module, found, where) for found in where.values())


def _of_instruction(
    module: Module, instruction: Instruction, where: Computation
) -> float:
    opcode = instruction.opcode
    is_free = opcode in FREE or FREE_CALLS.search(instruction.attributes)
    if is_free or opcode.endswith("-done"):
        return 0.0
    if opcode == "while":
        parts = (*instruction.names("body"), *instruction.names("condition"))
        once = sum(_of_computation(module, part) for part in parts)
        return once and once * module.iterations(instruction, where)
    if opcode == "conditional":
        names = instruction.names("branch_computations") or [
            *instruction.names("true_computation"),
            *instruction.names("false_computation"),
        ]
        return min(_of_computation(module, name) for name in names)
    if opcode in ("call", "async-start"):
        (callee,) = instruction.names("to_apply") or instruction.names("calls")
        return _of_computation(module, callee)
    operands = [where[name].type for name in instruction.operands]
    if opcode in ("copy-start", "slice-start"):
        # Of the copy, where it goes and whence; of the slice, whence and where.
        target = ARRAY.findall(instruction.type)[opcode == "slice-start"]
        return _size(target) * (_lies_in_hbm(target) + _lies_in_hbm(operands[0]))
    if opcode == "fusion":
        callee = module.computations[instruction.names("calls")[0]]
        return _written(callee, instruction.type) + sum(
            _read(callee, index, array) for index, array in enumerate(operands)
        )
    if opcode == "dynamic-update-slice":
        return _size(operands[1]) * 2 * _lies_in_hbm(instruction.type)
    if opcode in SLICES:
        operands = [instruction.type if _lies_in_hbm(operands[0]) else ""]
    return sum(map(_in_hbm, (instruction.type, *operands)))


def _read(callee: Computation, index: int, array: str) -> float:
    """Bytes that a fusion reads of its operand."""
    if not _lies_in_hbm(array):
        return 0.0
    (name,) = (
        found.name
        for found in callee.values()
        if found.opcode == "parameter" and int(found.arguments) == index
    )
    sizes = []
    for user, own in _users(callee, name):
        if user.opcode in SLICES:
            sizes.append(_size(user.type))
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == own:
            sizes.append(0.0)
        else:
            return _in_hbm(array)
    return sum(sizes)


def _users(callee: Computation, name: str) -> list[tuple[Instruction, str]]:
    """Who takes an array, or the same one under another name, and under which."""
    found = []
    for user in callee.values():
        if name in user.operands:
            is_same = user.opcode == "bitcast"
            found += _users(callee, user.name) if is_same else [(user, name)]
    return found


def _written(callee: Computation, result: str) -> float:
    """Bytes that a fusion writes."""
    root, arrays = callee[callee.root], ARRAY.findall(result)
    names = root.operands if root.opcode == "tuple" else [root.name] * len(arrays)
    total = 0.0
    for name, array in zip(names, arrays, strict=True):
        made = callee.origin(name)
        in_place = made.opcode == "dynamic-update-slice"
        part = callee[made.operands[1]].type if in_place else array
        total += _size(part) * _lies_in_hbm(array)
    return total


def _in_hbm(type_text: str) -> float:
    """Bytes of those arrays of a type that lie in HBM."""
    arrays = ARRAY.findall(type_text)
    return sum(_size(array) for array in arrays if _lies_in_hbm(array))


def _lies_in_hbm(array: str) -> bool:
    return "S(" not in array


def _size(array: str) -> float:
    return sum(map(bytes_of, arrays_of(array)))
