"""Where attentions keep their queries and keys, and which axes count the heads.

Everything here reads paths and shapes alone. How many heads there are is known from
what is said of them (one number a head), so an array of several axes needs no evidence
beside it to be told from a stack of layers.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition import layouts, names
from optaxplus.partition.layouts import Undecided
from optaxplus.partition.stacks import (
    Shape,
    Siblings,
    layer_axes,
    layer_shape,
    siblings_of,
    with_layer_axes,
)

__all__ = ["Attention", "Names", "Projection", "read_attention"]

# Several projections in one array, by the name of the module.
_FUSED = ("query", "key", "value")
_SEVERAL = {"kv_einsum": ("key", "value"), "qkv_einsum": _FUSED}


class Names(NamedTuple):
    """Regular expressions for the modules, or bare arrays, that hold projections.

    Attributes:
      query: That of the query.
      key: That of the key, which may hold the value behind it in every head.
      rotary: That of the rotary part of the query, if it is apart; None if it is not.
    """

    query: str
    key: str
    rotary: str | None = None


class Projection(NamedTuple):
    """How a parameter holds projections of an attention.

    Attributes:
      parts: What it holds: "query", "key", "value" or "rotary", in their order.
      layers: Axes that count layers, in the order of the axes of the logits.
      counted: Axis that counts the parts; None if there is one, or they lie side by
        side in `out`.
      out: Axes (heads, head size), or the one axis in which heads lie one behind the
        other.
      sizes: Sizes of the parts in `out`.
    """

    parts: tuple[str, ...]
    layers: tuple[int, ...]
    counted: int | None
    out: tuple[int, ...]
    sizes: tuple[int, ...]


class Attention(NamedTuple):
    """The projections of one attention, or of a stack of them.

    Attributes:
      projections: By the path of the parameter; kernels and biases.
      heads: Number of heads of the query.
      key_heads: Number of heads of the key, which divides that of the query.
      query_size: Size of a head of the query.
      key_size: Size of a head of the key, in latent attention with what stands behind.
    """

    projections: dict[str, Projection]
    heads: int
    key_heads: int
    query_size: int
    key_size: int


class _Found(NamedTuple):
    """A parameter that holds projections, by its name."""

    parts: tuple[str, ...]
    is_bias: bool
    is_latent: bool


class _Misfit(ValueError):
    """Shapes that are no attention of so many heads."""


def read_attention(
    module: str,
    shapes: Mapping[str, Shape],
    logits: Shape,
    known: Names,
    *,
    nope_size: int | None = None,
    axes: Mapping[str, MatrixAxes] | None = None,
) -> Attention:
    """Finds the projections of query and key in a module and reads their axes.

    Args:
      module: Path of the module; "" for the whole tree.
      shapes: Shape of every parameter of the model by its path.
      logits: (*layers, heads), the shape of what is known of every head.
      known: What the projections are called.
      nope_size: Size of the part of a head without rotary position in latent
        attention; None for other attentions.
      axes: Matrix axes of every parameter; None reads them from names and shapes.

    Raises:
      ValueError: If query or key are missing or there are several of one, what is
        called so is something else, or shapes do not fit, with path and shape.
    """
    prefix = f"{module}/" if module else ""
    inside = {
        path.removeprefix(prefix): path for path in shapes if path.startswith(prefix)
    }
    found = _find(module, inside, known, nope_size)
    stack = len(logits) - 1
    if axes is not None:
        attempts = [partial(_given, axes=axes)]
    else:
        attempts = [
            partial(_inferred, layers=tuple(range(first, first + stack)))
            for first in ((0, 1) if stack else (0,))
        ]
    readings, misfits = [], []
    for attempt in attempts:
        try:
            projections = attempt(found, shapes, logits)
            readings.append(_checked(projections, shapes, logits, nope_size))
        except _Misfit as misfit:
            misfits.append(misfit)
    if not readings:
        raise ValueError(str(misfits[0])) from None
    return readings[0] if len(readings) == 1 else _proven(readings, shapes, logits)


# By name


def _find(
    module: str, inside: Mapping[str, str], known: Names, nope_size: int | None
) -> dict[str, _Found]:
    """Everything in a module that holds projections, by its whole path."""
    where = f"module {module!r}" if module else "the root of the parameters"
    found = {}
    for relative, path in inside.items():
        hit = _by_name(relative, path, known)
        if hit is not None:
            found[path] = hit
    # What is wrong is said of the query first, and of kernels.
    order = ("query", "key", "rotary")
    found = dict(
        sorted(
            found.items(),
            key=lambda item: (order.index(item[1].parts[0]), item[1].is_bias),
        )
    )
    for part in ("query", "key", *(("rotary",) if known.rotary else ())):
        weights = [p for p, f in found.items() if part in f.parts and not f.is_bias]
        if not weights:
            raise ValueError(
                f"{where} has no {part} projection; its parameters are "
                f"{_listed(inside)}. Say what it is called, as a regular expression "
                f"for its path in the module: query='q_up', key='k_up'."
            )
        if len(weights) > 1:
            raise ValueError(
                f"{where} has several {part} projections, {_listed(weights)}; name "
                "the one whose heads the logits are of by query= and key=."
            )
    latent = [path for path, hit in found.items() if hit.is_latent]
    if latent and nope_size is None:
        raise ValueError(
            f"parameter {latent[0]!r} is a projection of latent attention; pass "
            "nope_dim, the size of the part of a head without rotary position."
        )
    if nope_size is None and known.rotary is None:
        for relative, path in inside.items():
            if relative.count("/") <= 1 and re.search(names.HEAD_NORM, relative):
                raise ValueError(
                    f"parameter {path!r} normalises queries or keys behind their "
                    "projections, and undoes any scale of these: there is nothing to "
                    "clip. Leave the module out of max_logits."
                )
    return found


def _by_name(relative: str, path: str, known: Names) -> _Found | None:
    """What a parameter of the module holds; None if it is nothing of query or key."""
    is_latent = bool(re.search(names.LATENT, path))
    for part, pattern in zip(("query", "key", "rotary"), known, strict=True):
        if pattern is None:
            continue
        if re.fullmatch(rf"b_?({pattern})|({pattern})_?bias", relative):
            return _Found((part,), True, is_latent)
        match = re.fullmatch(rf"({pattern})(/(?P<array>.+))?", relative)
        if match is None:
            lora = re.match(rf"({pattern})_", relative)
            if lora and re.search(names.LORA, relative):
                raise _unknown_array(path)
            continue
        array = match["array"] or "kernel"
        if array not in ("kernel", "weight", "w", "bias", "b"):
            raise _unknown_array(path)
        return _Found((part,), array in ("bias", "b"), is_latent)
    if relative.count("/") > 1:
        return None
    weight = re.sub(r"/b$", "/w", re.sub(r"bias$", "weight", relative))
    if re.search(names.FUSED, weight):
        return _Found(_FUSED, weight != relative, False)
    several = _SEVERAL.get(relative.removesuffix("/w"))
    return None if several is None else _Found(several, False, False)


def _unknown_array(path: str) -> ValueError:
    return ValueError(
        f"parameter {path!r} stands beside a query or key projection and is neither "
        "its kernel nor its bias, so what scales the logits is not known (low-rank "
        "factors and quantized kernels are not supported). Leave the module out of "
        "max_logits."
    )


def _listed(paths: Mapping[str, str] | Sequence[str]) -> str:
    shown = [*paths][:10]
    return ", ".join(map(repr, shown)) + (", …" if len(paths) > 10 else "")


# By shape


def _given(
    found: Mapping[str, _Found],
    shapes: Mapping[str, Shape],
    logits: Shape,
    *,
    axes: Mapping[str, MatrixAxes],
) -> dict[str, Projection]:
    """How every parameter holds its projections, by the axes that were given."""
    return {
        path: _interpreted(path, shapes[path], axes[path], hit.parts, logits)
        for path, hit in found.items()
    }


def _inferred(
    found: Mapping[str, _Found],
    shapes: Mapping[str, Shape],
    logits: Shape,
    *,
    layers: tuple[int, ...],
) -> dict[str, Projection]:
    """The same by names and shapes, if `layers` are the axes that count layers."""
    for path in found:
        sizes = tuple(shapes[path][axis] for axis in layers if axis < len(shapes[path]))
        if sizes != logits[:-1]:
            raise _misfit(
                path, shapes[path], logits, f"it has no axes of {logits[:-1]} layers"
            )
    in_layer = {path: layer_shape(shapes[path], layers) for path in found}
    modules = siblings_of(in_layer)
    projections = {}
    for path, hit in found.items():
        beside = modules[path.rpartition("/")[0]]
        of_layer = _axes_of_layer(path, in_layer[path], beside, hit)
        if of_layer is None:
            raise _misfit(
                path, shapes[path], logits, "which of its axes are heads is not known"
            )
        axes = with_layer_axes(of_layer, shapes[path], layers)
        projections[path] = _interpreted(
            path, shapes[path], axes, hit.parts, logits, layers
        )
    return projections


def _axes_of_layer(
    path: str, shape: Shape, beside: Siblings, hit: _Found
) -> MatrixAxes | None:
    """The matrix axes of a parameter of one layer; None if its form is unknown."""
    try:
        if hit.is_bias:
            if len(hit.parts) > 1:
                return layouts.bias(path, shape, beside)
            is_known = len(shape) in (1, 2)
            return MatrixAxes((), tuple(range(len(shape)))) if is_known else None
        if re.search(names.EINSUM_IN, path):
            return layouts.einsum_in(path, shape, beside)
        if len(hit.parts) > 1:
            return layouts.fused_projections(path, shape, beside)
        if re.search(names.WEIGHT, path):
            return layouts.torch_weight(path, shape, beside)
    except Undecided:
        return None
    # (features, heads, head size), or (features, heads · head size).
    is_known = len(shape) in (2, 3)
    return MatrixAxes((0,), tuple(range(1, len(shape)))) if is_known else None


def _interpreted(
    path: str,
    shape: Shape,
    axes: MatrixAxes,
    parts: tuple[str, ...],
    logits: Shape,
    layers: tuple[int, ...] | None = None,
) -> Projection:
    """Where in `axes` the heads are; without `layers`, the first that are batch."""
    out, counted = axes.fan_out, None
    batch = [a for a in range(len(shape)) if a not in axes.fan_in + axes.fan_out]
    stack = tuple(batch[: len(logits) - 1]) if layers is None else layers
    batch = [axis for axis in batch if axis not in stack]
    if tuple(shape[axis] for axis in stack) != logits[:-1]:
        raise _misfit(path, shape, logits, f"{axes} leave it no axes of layers")
    is_several = len(parts) > 1
    if is_several and not axes.splits and batch:
        counted = batch.pop(0)
    if len(out) == 1 and batch:  # every head a matrix of its own
        out = (batch.pop(), *out)
    sizes = axes.splits or (shape[out[0]],) * len(parts)
    if is_several and counted is None:
        is_known = len(axes.splits) == len(parts) and len(out) == 1
    else:
        count = 1 if counted is None else shape[counted]
        is_known = not axes.splits and count == len(parts)
    if batch or not is_known or len(out) not in (1, 2):
        raise _misfit(path, shape, logits, f"{axes} are not those of heads")
    return Projection(parts, stack, counted, out, sizes)


def _checked(
    projections: dict[str, Projection],
    shapes: Mapping[str, Shape],
    logits: Shape,
    nope_size: int | None,
) -> Attention:
    """The attention whose projections these are, if they fit it and one another."""
    heads = logits[-1]
    query_size = key_heads = key_size = 0
    parts = [
        (part, path, projection, size)
        for part in ("query", "key", "rotary")
        for path, projection in projections.items()
        for name, size in zip(projection.parts, projection.sizes, strict=True)
        if name == part
    ]
    for part, path, projection, width in parts:
        shape = shapes[path]
        is_apart = len(projection.out) == 2
        if is_apart:
            count, size = (shape[axis] for axis in projection.out)
        elif part != "key" or nope_size is not None:
            count, size = heads, width // max(heads, 1)
        else:
            size = query_size
            count = width // max(size, 1)
        if not is_apart and (size == 0 or count * size != width):
            raise _misfit(path, shape, logits, f"{width} are not heads of equal size")
        if part != "key" and count != heads:
            raise _misfit(path, shape, logits, f"it has {count} heads")
        if part == "query" and query_size not in (0, size):
            raise _misfit(path, shape, logits, f"its heads are not of {query_size}")
        if part == "query":
            query_size = size
        elif part == "key":
            if key_heads and (key_heads, key_size) != (count, size):
                raise _misfit(path, shape, logits, f"it is not {key_heads} heads")
            key_heads, key_size = count, size
            _check_key(path, shape, logits, count, size, query_size, nope_size)
    return Attention(projections, heads, key_heads, query_size, key_size)


def _check_key(
    path: str,
    shape: Shape,
    logits: Shape,
    count: int,
    size: int,
    query_size: int,
    nope_size: int | None,
) -> None:
    heads = logits[-1]
    if not count or heads % count:
        reason = f"its {count} heads do not divide the {heads} heads of the query"
    elif nope_size is None and size != query_size:
        reason = (
            f"its heads are of size {size} and those of the query of {query_size}; "
            "latent attention needs nope_dim"
        )
    elif nope_size is not None and count != heads:
        reason = f"latent attention has a key for each of the {heads} heads"
    elif nope_size is not None and nope_size > min(size, query_size):
        reason = (
            f"nope_dim={nope_size} is more than the size of its heads, {size}, or of "
            f"those of the query, {query_size}"
        )
    else:
        return
    raise _misfit(path, shape, logits, reason)


def _misfit(path: str, shape: Shape, logits: Shape, reason: str) -> _Misfit:
    *layers, heads = logits
    front = f"{tuple(layers)} layers and " if layers else ""
    return _Misfit(
        f"parameter {path!r} of shape {shape} does not fit max_logits of shape "
        f"{logits}, which are {front}{heads} heads of the query: {reason}. A kernel "
        "must be (features, heads, head size) or (features, heads · head size), its "
        "bias the same without features, with the axes of layers of max_logits in "
        "front or from the second on; for other forms pass axes."
    )


def _proven(
    readings: Sequence[Attention], shapes: Mapping[str, Shape], logits: Shape
) -> Attention:
    """The reading whose axes of layers the shapes of the whole tree prove."""
    proven = layer_axes(shapes)
    agree = [
        reading
        for reading in readings
        if any(
            {*proven[path]} == {*projection.layers}
            for path, projection in reading.projections.items()
        )
    ]
    if len(agree) == 1:
        return agree[0]
    path = next(iter(readings[0].projections))
    raise ValueError(
        f"parameter {path!r} of shape {shapes[path]} may count the {logits[:-1]} "
        "layers of max_logits along its first or its second axis; pass "
        "axes=ox.infer_matrix_axes(params, rules) with rules that say which."
    )
