"""What a compiled program costs one device: collectives, wire bytes, products.

Read from the text of an optimized SPMD module (`compiled.as_text()`) of XLA's CPU, GPU
and TPU compilers, whose own `cost_analysis` counts the body of a loop once, all
branches of a conditional or only one, and no collectives.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from hlo_text import Computation, Instruction, Module, arrays_of, bytes_of, shape_of

# Bytes that a device sends in a ring of g, of an operation whose full array (the result
# of all-gather, the operand of reduce-scatter) has one byte.
RING = {
    "all-gather": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
}
UNKNOWN_COLLECTIVES = {"collective-broadcast", "ragged-all-to-all", "send", "recv"}
# Calls of libraries and kernels that may multiply, in a way the text does not show.
UNKNOWN_PRODUCTS = re.compile(r"gemm|matmul|cudnn|tpu_custom_call|mosaic", re.I)
# Of a convolution, with what they are unless given.
WINDOW = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
HIGHEST = "operand_precision={highest,highest}"


@dataclass
class Collectives:
    """All collectives of one kind.

    Attributes:
      count: How many the program has.
      executions: How often they run, those in loops once per iteration.
      wire_bytes: What a device sends in all executions, in rings.
    """

    count: int = 0
    executions: int = 0
    wire_bytes: float = 0.0


@dataclass(frozen=True)
class HloCost:
    """What one execution of a program costs one device.

    Attributes:
      collectives: By kind, only kinds that occur.
      flops: Two for each multiplication of matrix products and convolutions, on the
        slowest device; elementwise operations are not counted.
      flops_highest: Those of them whose operands both have the precision "highest": of
        float32, six passes of the matrix unit of a TPU.
      collectives_in_products: Executions of collectives in loops that also multiply
        matrices, such as an iteration whose every step waits for other devices.
      temporary_bytes: As given by the caller.
    """

    collectives: dict[str, Collectives]
    flops: float
    flops_highest: float
    collectives_in_products: int
    temporary_bytes: int | None

    @property
    def wire_bytes(self) -> float:
        """What a device sends, of all kinds."""
        return _wire_bytes(self.collectives)


def _wire_bytes(collectives: dict[str, Collectives]) -> float:
    return sum(kind.wire_bytes for kind in collectives.values())


def hlo_cost(text: str, temporary_bytes: int | None = None) -> HloCost:
    """Counts what a compiled program costs one device.

    Loops count as often as they run. Of a conditional that tests data (it has two
    branches and its operand is a pred or is made from one or from floating-point
    numbers, not from the device's number) the branch with fewer products counts: the
    other is for rare data. Any other conditional chooses by the device: the branches of
    all conditionals with equally many branches are added up index by index, and the
    index with most products is the slowest device. Of the collectives in such branches
    those of the branch that sends most count.

    Args:
      text: `compiled.as_text()`.
      temporary_bytes: `compiled.memory_analysis().temp_size_in_bytes`, passed on.

    Raises:
      ValueError: If a loop has an unknown number of iterations, or a collective or a
        product has an unknown form.
    """
    module = _Module(text)
    cost = module.cost(module.entry)
    return HloCost(cost.collectives, *cost.slowest(), cost.in_products, temporary_bytes)


@dataclass
class _Cost:
    """As `HloCost`, with products that only some devices compute, by branch.

    `by_branch[n]` has those of all conditionals with n branches, each as all its
    products and those of highest precision.
    """

    flops: float = 0.0
    highest: float = 0.0
    by_branch: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    collectives: dict[str, Collectives] = field(default_factory=dict)
    in_products: int = 0

    def slowest(self) -> tuple[float, float]:
        busiest = [max(branches) for branches in self.by_branch.values()]
        return (
            self.flops + sum(flops for flops, _ in busiest),
            self.highest + sum(highest for _, highest in busiest),
        )

    def add(self, other: _Cost, times: int = 1) -> None:
        self.flops += times * other.flops
        self.highest += times * other.highest
        for count, branches in other.by_branch.items():
            total = self.by_branch.setdefault(count, [(0.0, 0.0)] * count)
            for index, (flops, highest) in enumerate(branches):
                old = total[index]
                total[index] = (old[0] + times * flops, old[1] + times * highest)
        for kind, found in other.collectives.items():
            total = self.collectives.setdefault(kind, Collectives())
            total.count += found.count
            total.executions += times * found.executions
            total.wire_bytes += times * found.wire_bytes
        self.in_products += times * other.in_products


class _Module(Module):
    """The computations of a module and their costs."""

    def __init__(self, text: str):
        super().__init__(text)
        self.devices = math.prod(
            int(count)
            for count in re.findall(
                r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0]
            )
        )
        self._costs: dict[str, _Cost] = {}

    def cost(self, name: str) -> _Cost:
        """Of one execution of a computation."""
        if name not in self._costs:
            total = _Cost()
            computation = self.computations[name]
            for instruction in computation.values():
                total.add(self._cost(instruction, computation))
            self._costs[name] = total
        return self._costs[name]

    def _cost(self, instruction: Instruction, where: Computation) -> _Cost:
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind in RING:
            return self._collective(kind, instruction, where)
        if kind in UNKNOWN_COLLECTIVES:
            raise ValueError(f"hlo_cost: collective {kind} is not supported")
        if opcode in PRODUCTS:
            flops = PRODUCTS[opcode](instruction, where)
            is_highest = HIGHEST in instruction.attributes
            return _Cost(flops, flops if is_highest else 0.0)
        if opcode == "while":
            return self._loop(instruction, where)
        if opcode == "conditional":
            return self._conditional(instruction, where)
        if opcode == "fusion":
            return self._fusion(instruction)
        if opcode in ("call", "async-start"):
            (callee,) = instruction.names("to_apply") or instruction.names("calls")
            return self.cost(callee)
        return _Cost()

    def _collective(
        self, kind: str, instruction: Instruction, where: Computation
    ) -> _Cost:
        if _continues(instruction, where):
            return _Cost()
        arrays = arrays_of(instruction.type)
        if instruction.opcode != kind and kind != "all-reduce":
            # The operands come first and integers for bookkeeping last.
            count = sum(len(arrays_of(where[o].type)) for o in instruction.operands)
            arrays = arrays[count : 2 * count]
        group = self._group_size(instruction)
        size = sum(map(bytes_of, arrays)) * (group if kind == "reduce-scatter" else 1)
        sent = size * RING[kind](group)
        return _Cost(collectives={kind: Collectives(1, 1, sent)})

    def _group_size(self, instruction: Instruction) -> int:
        """Devices that take part in one group of a collective."""
        if instruction.opcode.startswith("collective-permute"):
            return self.devices
        text = instruction.attributes
        if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
            # 'a':(2)4 is four of the devices along 'a', behind two.
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[name]) for name, part in axes)
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
            return int(found[1])
        if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
            groups = re.findall(r"\{([^}]*)\}", found[1])
            return max(len(group.split(",")) for group in groups)
        if "replica_groups={}" in text or "replica_groups=" not in text:
            return self.devices
        raise ValueError(f"hlo_cost: unknown replica_groups of {instruction.name}")

    def _fusion(self, instruction: Instruction) -> _Cost:
        (callee,) = instruction.names("calls")
        cost = self.cost(callee)
        if not callee.startswith("all-reduce-scatter"):
            return cost
        # The TPU compiler's form of reduce-scatter: an all-reduce and a slice of it,
        # run as the first half of the all-reduce.
        (found,) = cost.collectives.values()
        half = Collectives(found.count, found.executions, found.wire_bytes / 2)
        return _Cost(cost.flops, cost.highest, collectives={"reduce-scatter": half})

    def _conditional(self, instruction: Instruction, where: Computation) -> _Cost:
        names = instruction.names("branch_computations") or [
            *instruction.names("true_computation"),
            *instruction.names("false_computation"),
        ]
        branches = [self.cost(name) for name in names]
        if len(branches) == 2 and _tests_data(instruction.operands[0], where):
            return min(branches, key=_Cost.slowest)
        busiest = max(branches, key=lambda branch: _wire_bytes(branch.collectives))
        flops = [branch.slowest() for branch in branches]
        return _Cost(
            by_branch={len(branches): flops} if any(map(any, flops)) else {},
            collectives=busiest.collectives,
            in_products=busiest.in_products,
        )

    def _loop(self, instruction: Instruction, where: Computation) -> _Cost:
        total = _Cost()
        total.add(self.cost(instruction.names("body")[0]))
        total.add(self.cost(instruction.names("condition")[0]))
        if any(total.slowest()):
            total.in_products = sum(c.executions for c in total.collectives.values())
        elif not total.collectives:
            return total
        result = _Cost()
        result.add(total, self.iterations(instruction, where))
        return result


def _continues(instruction: Instruction, where: Computation) -> bool:
    """Whether this only accompanies or awaits a collective that is counted elsewhere.

    The TPU compiler repeats an asynchronous collective in the fusion that starts it, in
    every fusion that runs meanwhile, and in the one that waits for it.
    """
    starts = {
        operand
        for call in where.values()
        if 'custom_call_target="AsyncCollectiveStart"' in call.attributes
        for operand in call.operands
    }
    return instruction.name not in starts and (
        "chain_id=" in instruction.attributes
        or where.name.startswith("async_collective_fusion")
    )


def _tests_data(name: str, where: Computation) -> bool:
    """Whether what chooses a branch is a pred, or made from floating-point numbers."""
    found_data, stack, seen = False, [name], set()
    while stack:
        instruction = where[stack.pop()]
        if instruction.opcode in ("partition-id", "replica-id"):
            return False
        if instruction.name in seen:
            continue
        seen.add(instruction.name)
        is_float = bool(re.match(r"b?f\d", instruction.type))
        found_data |= is_float or instruction.type.startswith("pred")
        if not is_float:
            stack += instruction.operands
    return found_data


def _dot_flops(instruction: Instruction, where: Computation) -> float:
    axes = instruction.numbers("lhs_contracting_dims")
    return _contraction_flops(instruction, where, axes)


def _contraction_flops(
    instruction: Instruction, where: Computation, axes: Sequence[int]
) -> float:
    left = shape_of(where[instruction.operands[0]])
    contracted = math.prod(left[axis] for axis in axes)
    return 2.0 * contracted * math.prod(shape_of(instruction))


def _custom_call_flops(instruction: Instruction, where: Computation) -> float:
    target = instruction.attribute("custom_call_target") or ""
    if not UNKNOWN_PRODUCTS.search(target):
        return 0.0
    # cuBLAS calls say what they contract.
    axes = re.search(r'"lhs_contracting_dimensions":\[(.*?)\]', instruction.attributes)
    if not axes:
        raise ValueError(f"hlo_cost: products of custom call {target} are unknown")
    return _contraction_flops(
        instruction, where, [int(a) for a in re.findall(r"\d+", axes[1])]
    )


def _convolution_flops(instruction: Instruction, where: Computation) -> float:
    """Counts products with real entries only.

    The TPU compiler writes batches of products as convolutions over dilated inputs,
    most of whose products are with padding and are not computed.
    """
    arrays = *(where[operand] for operand in instruction.operands), instruction
    labels = re.split("_|->", instruction.attribute("dim_labels") or "")
    left, right, result = (
        dict(zip(names, shape_of(array), strict=True))
        for names, array in zip(labels, arrays, strict=True)
    )
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = {
        key: value.split("x")
        for key, value in re.findall(r"(\w+)=(\S+)", found[1] if found else "")
    }
    products = left["b"] * left["f"] * result["f"]
    for index, axis in enumerate(sorted(label for label in left if label.isdigit())):
        stride, padding, left_dilation, right_dilation = (
            int(window[key][index].split("_")[0]) if key in window else default
            for key, default in WINDOW.items()
        )
        products *= _taps(
            (left[axis], left_dilation),
            (right[axis], right_dilation),
            (result[axis], stride),
            padding,
        )
    for name in ("feature_group_count", "batch_group_count"):
        products //= int(instruction.attribute(name) or 1)
    return 2.0 * products


PRODUCTS = {
    "dot": _dot_flops,
    "convolution": _convolution_flops,
    "custom-call": _custom_call_flops,
}


@functools.lru_cache
def _taps(
    left: tuple[int, int],
    right: tuple[int, int],
    result: tuple[int, int],
    padding: int,
) -> int:
    """Pairs of a result and a kernel position that meet an entry of the input.

    Each of the three is a size and a distance between entries.
    """
    positions = (
        out * result[1] + tap * right[1] - padding
        for out in range(result[0])
        for tap in range(right[0])
    )
    return sum(
        position % left[1] == 0 and 0 <= position // left[1] < left[0]
        for position in positions
    )
