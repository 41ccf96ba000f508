"""Which axes of the parameters count layers, as far as their shapes prove it.

`nn.scan`, `nnx.scan` and `vmap` give every parameter of a block one more axis. No path
says so, but the shapes do: all parameters of the block have that axis in common, and
some of them make no sense with it, such as a norm's scale of two axes, or a kernel
(3, 8, 16) beside a bias (3, 16). Both together are a proof; either alone is none.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from optaxplus.numerics.matrix_axes import MatrixAxes, resolve_axes
from optaxplus.partition import names

__all__ = [
    "NO_SIBLINGS",
    "Neighbourhood",
    "Shape",
    "Siblings",
    "fits_as_heads",
    "layer_axes",
    "layer_shape",
    "lora_factor",
    "lora_partner",
    "readings_by_bias",
    "siblings_of",
    "weight_order",
    "with_layer_axes",
]

Shape = tuple[int, ...]


# Views


def layer_shape(shape: Shape, layers: Sequence[int]) -> Shape:
    """The shape of a parameter in one layer: without the axes that count layers."""
    return tuple(size for axis, size in enumerate(shape) if axis not in layers)


def with_layer_axes(
    axes: MatrixAxes, shape: Shape, layers: Sequence[int]
) -> MatrixAxes:
    """The axes of `shape` that `axes` name in one layer of it.

    Raises:
      ValueError: If `axes` does not fit the shape of one layer.
    """
    axes = resolve_axes(axes, layer_shape(shape, layers))
    kept = [axis for axis in range(len(shape)) if axis not in layers]
    return MatrixAxes(
        tuple(kept[axis] for axis in axes.fan_in),
        tuple(kept[axis] for axis in axes.fan_out),
        axes.splits,
    )


class Neighbourhood(dict[str, Shape]):
    """The shapes below one module by "../path", and what many of them have in common.

    Computed once for all modules that look at it.
    """

    @cached_property
    def first_two_axes(self) -> set[Shape]:
        """The first two sizes of shapes of rank 3, as of experts (experts, in, out)."""
        return {shape[:2] for shape in self.values() if len(shape) == 3}

    @cached_property
    def experts_apart(self) -> int:
        """How many numbered experts there are, "../experts/0/up/kernel" and so on."""
        found = (re.match(r"\.\./(?:\w+/)?experts?/(\d+)/", name) for name in self)
        return len({match[1] for match in found if match})

    @cached_property
    def weight_orders(self) -> set[str]:
        """Which way round the weights are whose bias tells, see `weight_order`."""
        orders = (
            weight_order(shape, self.get(f"{name.removesuffix('weight')}bias"))
            for name, shape in self.items()
            if name.endswith("/weight")
        )
        return {order for order in orders if order}


class Siblings(Mapping[str, Shape]):
    """The shapes in a module by name, and below its parent by "../path".

    Attributes:
      around: Those below the parent.
    """

    def __init__(
        self,
        inside: Mapping[str, Shape],
        around: Neighbourhood,
        block: Mapping[str, Shape] | None = None,
    ):
        self._inside = inside
        self.around = around
        self._block = block or {}

    def __getitem__(self, name: str) -> Shape:
        return (self.around if name.startswith("../") else self._inside)[name]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self._inside, self.around)

    def __len__(self) -> int:
        return len(self._inside) + len(self.around)

    def is_single(self, path: str) -> bool:
        """Whether a parameter of one of these modules is that of a single layer.

        Its axes of layers have been taken off, or something in the same block has
        neither its first nor its second axis.
        """
        whole = self._block.get(path)
        if whole is None:
            return False
        if len(whole) > len(self._inside[path.rpartition("/")[2]]):
            return True
        others = self._block.values()
        return all(
            any(other[axis : axis + 1] != whole[axis : axis + 1] for other in others)
            for axis in (0, 1)
        )


NO_SIBLINGS = Siblings({}, Neighbourhood())


def siblings_of(
    shapes: Mapping[str, Shape], whole: Mapping[str, Shape] | None = None
) -> dict[str, Siblings]:
    """What is beside the parameters of every module, by the module's path.

    Args:
      shapes: Shape of every parameter, of one layer.
      whole: The shapes with the axes that count layers; None if they are the same.
    """
    whole = shapes if whole is None else whole
    inside: dict[str, dict[str, Shape]] = {}
    below: dict[str, Neighbourhood] = {}
    blocks: dict[str, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        inside.setdefault(module, {})[name] = shape
        below.setdefault(module, Neighbourhood())[f"../{name}"] = shape
        blocks.setdefault(module, {})[path] = whole[path]
        while module:
            module = module.rpartition("/")[0]
            relative = path.removeprefix(f"{module}/") if module else path
            below.setdefault(module, Neighbourhood())[f"../{relative}"] = shape
            blocks.setdefault(module, {})[path] = whole[path]
    found = {}
    for module, arrays in inside.items():
        parent = module.rpartition("/")[0]
        # The whole tree is no block: its parts need not belong together.
        found[module] = Siblings(
            arrays,
            below[parent] if module else Neighbourhood(),
            blocks[parent] if parent else None,
        )
    return found


# What the parameters of one module say of each other

_BIAS_OF = {"kernel": "bias", "weight": "bias", "w": "b"}
_ATTENTION = (
    ("query", "value", "out"),
    ("q_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj", "out_proj"),
    ("q", "v", "o"),
    ("wq", "wv", "wo"),
    ("qkv", "qkv", "out"),
    ("qkv", "qkv", "proj"),
    ("qkv_proj", "qkv_proj", "out"),
    ("qkv_proj", "qkv_proj", "out_proj"),
)
_PARTNER = {"a": "b", "b": "a", "A": "B", "B": "A"}


def readings_by_bias(kernel: Shape, bias: Shape) -> set[int]:
    """How many leading axes of a kernel (*in, *out) may count layers, by its bias.

    A layer's bias has the shape of the last axes of its kernel (one for a Dense or a
    convolution, two for attention heads), and a stack puts the same axis in front of
    both. Two numbers where the shapes allow both readings, none if neither.
    """

    def is_layer(kernel: Shape, bias: Shape) -> bool:
        return len(bias) < len(kernel) and kernel[len(kernel) - len(bias) :] == bias

    readings = {0} if is_layer(kernel, bias) else set()
    if len(bias) >= 2 and bias[:1] == kernel[:1] and is_layer(kernel[1:], bias[1:]):
        readings.add(1)
    return readings


def fits_as_heads(path: str, siblings: Siblings) -> bool:
    """Whether the projections of an attention block fit together as heads.

    (features, heads, head_dim) and (heads, head_dim, features) share heads and
    head_dim; two stacks of layers share their first axis. False where both readings
    are possible.
    """
    name = path.rpartition("/")[2]
    for projections in _ATTENTION:
        query, value, out = (
            siblings.get(f"../{projection}/{name}", siblings.get(projection, ()))
            for projection in projections
        )
        value = value or query
        # A fused projection has one more axis, which counts the three.
        rank = len(out) + ("qkv" in projections[0])
        if len(out) >= 3 and len(query) == len(value) == rank:
            fits_heads = query[-2] == out[-3] and value[-1] == out[-2]
            fits_layers = len(out) == 3 and query[0] == out[0]
            return fits_heads and not fits_layers
    return False


def lora_factor(path: str) -> str | None:
    """Which factor of a low-rank update W + A·B a parameter is: "a", "b" or None."""
    match = re.search(names.LORA, path)
    return match["factor"].lower() if match else None


def lora_partner(path: str, siblings: Siblings) -> Shape:
    """The shape of B beside the factor A of a low-rank update, or of A beside B."""
    match = re.search(names.LORA, path)
    if match is None:
        return ()
    partner = match["stem"] + _PARTNER[match["factor"]] + match["rest"]
    if match["rest"].startswith("/"):
        return siblings.get(f"../{partner}", ())
    return siblings.get(partner.rpartition("/")[2], ())


def weight_order(weight: Shape, bias: Shape | None) -> str | None:
    """Which way round a weight is by its bias: "in_out" or "out_in".

    None if there is no bias, or it fits both.

    Equinox and PyTorch store (out, in, *window), and a bias (out,) or (out, 1, ...).
    """
    if not bias or len(weight) < 2:
        return None
    is_first = bias[0] == weight[0] and all(size == 1 for size in bias[1:])
    out_in = is_first and len(bias) < len(weight)
    in_out = 0 in readings_by_bias(weight, bias)
    if out_in == in_out:
        return None
    return "out_in" if out_in else "in_out"


# The proof


def layer_axes(shapes: Mapping[str, Shape]) -> dict[str, tuple[int, ...]]:
    """For every parameter, the axes that count layers, as far as the shapes prove it.

    A module is a stack where all parameters below it have the first axis in common (or
    the second: T5X and MaxText scan along it), some of them have an axis too many for
    one layer, and none has too few without it. Outer modules are looked at first.

    Args:
      shapes: Shape of every parameter by its "/"-joined path.

    Returns:
      For every path the axes of its shape that count layers; () where nothing is
      proven.
    """
    found: dict[str, tuple[int, ...]] = dict.fromkeys(shapes, ())

    def visit(module: str, paths: Sequence[str]) -> None:
        layer = {path: layer_shape(shapes[path], found[path]) for path in paths}
        while (axis := _common_layer_axis(layer)) is not None:
            for path in filter(layer.get, paths):
                kept = [a for a in range(len(shapes[path])) if a not in found[path]]
                found[path] += (kept[axis],)
                layer[path] = layer_shape(layer[path], (axis,))
        children: dict[str, list[str]] = {}
        for path in paths:
            head, is_module, _ = path[len(module) :].partition("/")
            if is_module:
                children.setdefault(f"{module}{head}/", []).append(path)
        for child, below in children.items():
            visit(child, below)

    visit("", list(shapes))
    return found


def _common_layer_axis(shapes: Mapping[str, Shape]) -> int | None:
    """The axis, 0 or 1, that counts layers in all of `shapes`; None without proof.

    Scalars are left out: a block may share them between its layers.
    """
    shapes = {path: shape for path, shape in shapes.items() if shape}
    excess = _excess_axes(shapes)
    if not excess:
        return None
    excess_without = {}
    # Equinox and PyTorch, whose weights are called so, stack along the first axis.
    is_torch = any(path.endswith("weight") for path in shapes)
    for axis in (0,) if is_torch else (0, 1):
        is_common = len({shape[axis : axis + 1] for shape in shapes.values()}) == 1
        if is_common and all(len(shape) > axis for shape in shapes.values()):
            layer = {path: layer_shape(shapes[path], (axis,)) for path in shapes}
            if _is_possible(layer):
                excess_without[axis] = _excess_axes(layer)
    if len(excess_without) == 2 and excess_without[0] == excess_without[1]:
        # Both axes are the same in all of them: layers of layers, or vectors alone
        # (whose features are the last axis), or undecided.
        inner = {path: layer_shape(shapes[path], (0, 1)) for path in shapes}
        nested = _is_possible(inner) and _excess_axes(inner) < excess_without[0]
        vectors = all(len(shape) == 2 for shape in shapes.values())
        return 0 if nested or vectors else None
    axis = min(excess_without, key=excess_without.__getitem__, default=None)
    return axis if axis is not None and excess_without[axis] < excess else None


def _excess_axes(shapes: Mapping[str, Shape]) -> int:
    """How many axes the parameters have too many to be those of one layer."""
    modules = siblings_of(shapes)
    count = 0
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        beside = modules[module]
        bias = beside.get(_BIAS_OF[name]) if name in _BIAS_OF else None
        if _is_norm(path, beside):
            count += max(len(shape) - 1, 0)
        elif bias is not None and not _fits_bias(name, shape, bias):
            stacks = range(1, len(bias))
            fits = (n for n in stacks if _fits_bias(name, shape[n:], bias[n:]))
            count += next(fits, 1)
        elif re.search(r"(^|/)(query|q_proj|q|wq)(/\w+)?$", path):
            count += max(len(shape) - 3, 0) if fits_as_heads(path, beside) else 0
        elif lora_factor(path) == "a" and (partner := lora_partner(path, beside)):
            count += shape[-1:] != partner[:1]
    return count


def _is_norm(path: str, beside: Siblings) -> bool:
    """Whether the parameter is the scale of a norm: one axis in a layer."""
    name = path.rpartition("/")[2]
    if re.search(names.HEAD_NORM, path):
        return False
    if name == "weight":
        return beside.get("bias") == beside["weight"]
    if re.fullmatch(r"scale|gain|gamma", name):
        return not any(weight in beside for weight in _BIAS_OF)
    return bool(re.fullmatch(r"\w*norm(_?\d+)?|ln(_?\d+|_\w+)?", name))


def _fits_bias(name: str, weight: Shape, bias: Shape) -> bool:
    """Whether a weight and its bias are those of one layer, in either convention."""
    if 0 in readings_by_bias(weight, bias):
        return True
    return name == "weight" and weight_order(weight, bias) == "out_in"


def _is_possible(shapes: Mapping[str, Shape]) -> bool:
    """Whether no parameter has too few axes for what its name says."""
    least = {"kernel": 2, "embedding": 2, "bias": 1, "b": 1}
    return all(
        len(shape) >= least.get(path.rpartition("/")[2], 2 if lora_factor(path) else 0)
        for path, shape in shapes.items()
    )
