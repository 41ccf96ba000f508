"""Label and matrix view of every parameter of real models, reviewed by eye.

The tables lie in `golden_tables/`, one file a model. After a change that is meant,
`python -m tests.partition.test_golden_tables` writes them anew; read the difference
line by line before it is committed, because nothing else says what is right.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, LORA_RULES, MatrixAxes, Rule
from optaxplus.partition.inference import decide
from optaxplus.report.tables import format_table
from tests.assertions import assert_same_types
from tests.partition.model_zoo import MODELS

DIRECTORY = Path(__file__).parent / "golden_tables"

# What nothing in the model tells; the tables list it under "undecided".
_DENSE_GENERAL = (
    Rule(r"^merge_bare/kernel$", MatrixAxes((0, 1, 2), (3,)), "hidden"),
    Rule(r"^split_bare/kernel$", MatrixAxes((0,), (1, 2, 3)), "hidden"),
)
_TRANSPOSED = tuple(
    Rule(rf"^{name}/up_bare/kernel$", MatrixAxes(tuple(range(rank)), (-1,)), "hidden")
    for name, rank in (("signal", 2), ("image", 3), ("volume", 4))
)
_HEAD_BY_ITS_PLACE = Rule(r"^transformer/linear_1/w$", MatrixAxes((0,), (1,)), "head")
_PYTORCH = Rule(r"^layers/.*/w\w/weight$", MatrixAxes((1,), (0,)), "hidden")
_PER_HEAD = (
    Rule(r"/(query|key|value)/kernel$", MatrixAxes((0,), (2,)), "hidden"),
    Rule(r"/out/kernel$", MatrixAxes((1,), (2,)), "hidden"),
)
_GROUPED = Rule(r"^flat/qkv/kernel$", MatrixAxes((0,), (1,), (20, 8, 8)), "hidden")

# name of the file: (model, rules)
TABLES = {name: (name, DEFAULT_RULES) for name in MODELS} | {
    "linen_layers": ("linen_layers", (*_DENSE_GENERAL, *DEFAULT_RULES)),
    "nnx_layers": ("nnx_layers", (*_DENSE_GENERAL, *_TRANSPOSED, *DEFAULT_RULES)),
    "linen_lora_frozen_base": ("linen_lora", LORA_RULES),
    "nnx_lora_frozen_base": ("nnx_lora", LORA_RULES),
    "linen_gpt_per_head": ("linen_gpt", (*_PER_HEAD, *DEFAULT_RULES)),
    "linen_fused_qkv_grouped": ("linen_fused_qkv", (_GROUPED, *DEFAULT_RULES)),
    "haiku_transformer_with_head": (
        "haiku_transformer",
        (_HEAD_BY_ITS_PLACE, *DEFAULT_RULES),
    ),
    "meta_llama_dict_out_in": ("meta_llama_dict", (_PYTORCH, *DEFAULT_RULES)),
}


def table(name: str) -> str:
    """The routing of one model as a table for the eye."""
    model, rules = TABLES[name]
    params = MODELS[model]()
    lines = []
    try:
        decide(name, params)
    except ValueError as error:
        undecided = str(error).splitlines()[1:]
        lines += ["undecided by the default rules:"]
        lines += [line for line in undecided if line.startswith("  '")]
    rows = [
        (
            row.path,
            str(row.shape),
            row.role,
            row.label,
            row.matrix,
            f"{row.axes.fan_in} -> {row.axes.fan_out}",
            row.rule,
        )
        for row in ox.explain_routing(params, rules).rows
    ]
    header = ("parameter", "shape", "role", "label", "matrix", "axes", "rule")
    return "\n".join([*lines, format_table(header, rows), ""])


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_as_reviewed(name: str):
    assert table(name) == (DIRECTORY / f"{name}.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("make", [ox.muon, ox.adam_mini], ids=["muon", "adam_mini"])
@pytest.mark.parametrize("name", TABLES)
def test_optimizers_take_every_model(name: str, make):
    model, rules = TABLES[name]
    params = MODELS[model]()
    tx = make(0.1, rules=rules)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert_same_types(new_state, state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_no_table_is_left_over():
    assert {path.stem for path in DIRECTORY.iterdir()} == set(TABLES)


if __name__ == "__main__":
    _tables = {name: table(name) for name in TABLES}
    for _path in DIRECTORY.iterdir():
        _path.unlink()
    for _name, _table in _tables.items():
        (DIRECTORY / f"{_name}.txt").write_text(_table)
