"""What is in a checkpoint: the fields of the state of every optimizer.

The table of the README, from the real states (`jax.eval_shape(tx.init, params)`): for a
hidden matrix, an embedding and a vector the fields that an optimizer keeps, with their
shapes where these are not the parameter's own. Where in the state they lie is in
`tests/checkpoint_format.txt`, written by `tests/test_checkpoint_format.py`.

    python benchmarks/checkpoint_table.py    # prints it
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

import optaxplus as ox

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from methods import METHODS, WRAPPERS

# Around parameters in bfloat16, with what they add to the state.
STORAGE: Mapping[str, optax.GradientTransformation] = {
    "master_weights": ox.master_weights(ox.sgd(0.1)),
    "master_weights(bits=24)": ox.master_weights(ox.sgd(0.1), bits=24),
    "compensated": ox.compensated(ox.sgd(0.1)),
    "stochastic_rounding": ox.stochastic_rounding(ox.sgd(0.1)),
    "dynamic_loss_scale": ox.dynamic_loss_scale(ox.sgd(0.1)),
}

# Large enough for every default: of matrices that are factored, and of codes.
SHAPES = {"hidden": (512, 1280), "embedding": (32000, 512), "vector": (1280,)}
LETTERS = {1: "1", 512: "m", 1280: "n", 32000: "v", 512 // 256: "m/256", 128: "m/4"}
KINDS = ("hidden matrix, m x n", "embedding, v x m", "vector, n")


def stored(tx: optax.GradientTransformation, params: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of the state: its key path, and what is there.

    An abstract array, or a node without children, such as None, `optax.EmptyState()`
    and `optax.MaskedNode()`, for which Orbax stores that it is there.
    """

    def has_no_children(node: Any) -> bool:
        return not jax.tree.leaves(node, is_leaf=lambda child: child is not node)

    state = jax.eval_shape(tx.init, params)
    yield from jax.tree_util.tree_leaves_with_path(state, is_leaf=has_no_children)


def fields(
    tx: optax.GradientTransformation, dtype: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The numbers of a state, and its fields for every parameter of `SHAPES`."""
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()
    }
    scalars, found = dict[str, None](), {name: list[str]() for name in params}
    for path, leaf in stored(tx, params):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        of = next((index for index, name in enumerate(names) if name in params), None)
        if of is None:
            scalars[f"`{names[-1]}`"] = None
            continue
        text = f"`{'.'.join([names[of - 1], *names[of + 1 :]])}`"
        if leaf.shape != SHAPES[names[of]]:
            text += f" ({', '.join(LETTERS[size] for size in leaf.shape)})"
        if leaf.dtype != "float32":
            text += f" {leaf.dtype}"
        found[names[of]].append(text)
    return tuple(scalars), tuple(", ".join(found[name]) for name in SHAPES)


def table() -> list[list[str]]:
    """The header and the rows; optimizers with the same fields share one."""
    states = [(method.name, method.make, "float32") for method in METHODS]
    states += [
        (f"{method.name}(…)", method.make, "float32")
        for method in WRAPPERS
        # A function of the parameters, which has no state.
        if method.name != "qk_clip"
    ]
    states += [
        (f"{name.removesuffix(')')}{', ' if '(' in name else '('}…)", tx, "bfloat16")
        for name, tx in STORAGE.items()
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, tx, dtype in states:
        scalars, kinds = fields(tx, dtype)
        rows.setdefault((", ".join(scalars), *kinds), []).append(f"`{name}`")
    return [
        ["optimizer", "numbers", *KINDS],
        *(
            [", ".join(names), *(cell or "-" for cell in row)]
            for row, names in rows.items()
        ),
    ]


def markdown() -> str:
    """The block of the README."""
    header, *rows = table()
    return "\n".join(
        [
            f"| {' | '.join(header)} |",
            "|---" * len(header) + "|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "Fields without a shape have the parameter's, those without a dtype are "
            "float32, and numbers are scalars. A stack has its axis of layers in front "
            "of each shape. Wrappers are shown with what they add, the last five "
            "beside parameters in bfloat16. From the real states of the optimizers, by "
            "`python benchmarks/checkpoint_table.py`.",
        ]
    )


if __name__ == "__main__":
    print(markdown())
