"""What lies in a checkpoint of every optimizer, as users' checkpoints rely on it.

`checkpoint_format.txt` has, for each, every place of the state that `init` makes: path,
shape and dtype, or what stands there without anything stored. After a change that is
meant `python -m tests.test_checkpoint_format` writes it anew.
"""

import difflib
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import optaxplus as ox
from benchmarks.checkpoint_table import STORAGE, stored, table
from benchmarks.methods import METHODS, WRAPPERS
from optaxplus.report.recipes import OPTIMIZERS

FILE = Path(__file__).parent / "checkpoint_format.txt"

SHAPES = {
    "embedding": (512, 128),
    "hidden": (128, 320),
    "layers": {"bias": (2, 320), "kernel": (2, 128, 320)},
    "norm": (128,),
}


def abstract(dtype: str) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS = abstract("float32")
BFLOAT16 = abstract("bfloat16")


def schedule(step: Any) -> jax.Array:
    return 0.1 / (1 + step)


# Arguments that add something of their own.
VARIANTS = {
    "adamw(schedule)": ox.adamw(schedule),
    "muon(schedule)": ox.muon(schedule),
    "rmsprop(momentum=0.9, centered=True)": ox.rmsprop(
        0.1, momentum=0.9, centered=True
    ),
    "adafactor(b1=0.9)": ox.adafactor(0.1, b1=0.9),
    'mars(variant="lion")': ox.mars(0.1, variant="lion"),
    'mars(variant="shampoo")': ox.mars(0.1, variant="shampoo"),
    "shampoo(grafting=None)": ox.shampoo(0.1, grafting=None),
    "shampoo(max_dim=64)": ox.shampoo(0.1, max_dim=64),
    "soap(max_dim=200)": ox.soap(0.1, max_dim=200),
    "kron(max_dim=200)": ox.kron(0.1, max_dim=200),
}
FORMATS: dict[str, tuple[optax.GradientTransformation, Any]] = {
    **{method.name: (method.make, PARAMS) for method in METHODS},
    **{name: (tx, PARAMS) for name, tx in VARIANTS.items()},
    # Around sgd, which has no state, or around nothing.
    **{
        f"{method.name}, what it adds": (method.make, PARAMS)
        for method in WRAPPERS
        # A function of the parameters.
        if method.name != "qk_clip"
    },
    **{
        f"{name}, what it adds beside bfloat16": (tx, BFLOAT16)
        for name, tx in STORAGE.items()
    },
    "master_weights(quantize_state(muon)) beside bfloat16": (
        ox.master_weights(ox.quantize_state(ox.muon(0.1))),
        BFLOAT16,
    ),
}

_HEAD = """\
The state of every optimizer, as it lies in a checkpoint: each place by its path, with
shape and dtype. tests/test_checkpoint_format.py holds releases to it: one that changes
a line cannot restore the checkpoints of those before.

Parameters are float32 where nothing else is said:
    embedding      (512, 128)
    hidden         (128, 320)
    layers/bias    (2, 320), a stack of two, as
    layers/kernel  (2, 128, 320)
    norm           (128,)

None, {} and EmptyState() hold nothing, but a place. A parameter that is missing under a
field is masked there: it belongs to another group.

"""


def lines_of(tx: optax.GradientTransformation, params: Any) -> list[str]:
    """A line for every place of the state."""
    places = [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            f"{leaf.shape} {leaf.dtype}"
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else repr(leaf),
        )
        for path, leaf in stored(tx, params)
        if not isinstance(leaf, optax.MaskedNode)
    ]
    width = max(len(path) for path, _ in places)
    return [f"    {path:{width}}  {what}" for path, what in places]


def write(formats: dict[str, list[str]]) -> str:
    """The text of the file; what equals an earlier entry refers to it."""
    sections, names = list[str](), dict[tuple[str, ...], str]()
    for name, lines in formats.items():
        first = names.setdefault(tuple(lines), name)
        body = lines if first == name else [f"    as {first}"]
        sections.append("\n".join([name, *body, ""]))
    return _HEAD + "\n".join(sections)


def read(text: str) -> dict[str, list[str]]:
    """What `write` wrote."""
    found: dict[str, list[str]] = {}
    for section in text.removeprefix(_HEAD).strip("\n").split("\n\n"):
        name, *lines = section.split("\n")
        is_reference = len(lines) == 1 and lines[0].startswith("    as ")
        found[name] = found[lines[0].removeprefix("    as ")] if is_reference else lines
    return found


def formats_of_today() -> dict[str, list[str]]:
    return {name: lines_of(*entry) for name, entry in FORMATS.items()}


@pytest.fixture(scope="module")
def pinned() -> dict[str, list[str]]:
    return read(FILE.read_text("utf-8"))


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_earlier_releases_can_be_restored(name, pinned):
    assert name in pinned, f"{name} is new: python -m tests.test_checkpoint_format"
    changes = difflib.unified_diff(
        pinned[name],
        lines_of(*FORMATS[name]),
        "in checkpoints",
        "now",
        n=0,
        lineterm="",
    )
    difference = "\n".join(changes)
    assert not difference, (
        f"the state of {name} has changed:\n{difference}\nUsers cannot restore their "
        "checkpoints with this. Keep names, places and shapes if you can. Otherwise "
        "raise the minor version, say in the README under Checkpoints what changed, "
        "and write the file anew: python -m tests.test_checkpoint_format"
    )


def test_the_file_is_what_its_writer_writes(pinned):
    assert list(pinned) == list(FORMATS), "python -m tests.test_checkpoint_format"
    assert write(pinned) == FILE.read_text("utf-8")


def test_every_optimizer_is_in_it():
    assert {name.partition("(")[0] for name in FORMATS} >= OPTIMIZERS.keys()


def node_types(tree: Any) -> Iterable[type]:
    yield type(tree)
    for child in jax.tree.leaves(tree, is_leaf=lambda node: node is not tree):
        if child is not tree:
            yield from node_types(child)


def test_every_type_of_state_is_in_it():
    found = {
        node
        for tx, params in FORMATS.values()
        for node in node_types(jax.eval_shape(tx.init, params))
    }
    public = {
        value
        for name, value in vars(ox).items()
        if inspect.isclass(value) and name.endswith(("State", "QuantizedArray"))
    }
    assert public <= found


def test_the_table_of_the_readme_has_every_optimizer_once():
    header, *rows = table()
    assert {len(row) for row in rows} == {len(header)}
    states = {name: row[1:] for row in rows for name in row[0].split("`, `")}
    states = {name.strip("`"): state for name, state in states.items()}
    assert sum(row[0].count("`, `") + 1 for row in rows) == len(states)
    assert len(states) == len(METHODS) + len(WRAPPERS) - 1 + len(STORAGE)
    assert states["muon"] == ["`count`", "`mu`", "`mu`, `nu`", "`mu`, `nu`"]
    assert states["adam_mini"][1:] == [
        "`mu`, `nu` (1, n)",
        "`mu`, `nu` (v, 1)",
        "`mu`, `nu` (1)",
    ]
    assert states["lion8bit"][1] == "`mu.signed_root` int8, `mu.scales` (m/256, n)"
    assert states["compensated(…)"][3] == "`lost` bfloat16"


# What changes the state, and what does not


def role(name: str, axes: ox.MatrixAxes) -> tuple[ox.Rule, ...]:
    return (ox.Rule("^hidden$", axes, name), *ox.DEFAULT_RULES)


# Another value of an argument, under its name or under that of one optimizer.
STATE_STAYS: dict[str, Any] = {
    "adamw_b1": 0.5,
    "adamw_b2": 0.5,
    "adamw_eps": 1e-3,
    "adamw_learning_rate": 0.2,
    "adamw_weight_decay": 0.3,
    "alpha": 0.7,
    "alpha_warmup": 100.0,
    "axes": ox.MatrixAxes((), (-1,)),
    "b1": 0.5,
    "b2": 0.7,
    "b3": 0.8,
    "b3_warmup": 100.0,
    "clip": False,
    "clip_norm": 1.0,
    "clip_threshold": 2.0,
    "compute_dtype": "float32",
    "constrained": False,
    "dampening": 0.1,
    "debias": None,
    "decay": "cautious",
    "decay_rate": 0.7,
    "eps": 1e-3,
    "eps_confidence": 1e-3,
    "eps_root": 1e-3,
    "every_k": 3,
    "first_refresh": 2,
    "form": "optax",
    "gamma": 0.1,
    "gradient_centralization": False,
    "grafting_eps": 1e-3,
    "init_scale": 2.0,
    "initial_accumulator": 0.1,
    "interval_growth": 0.01,
    "lars.momentum": 0.8,
    "learning_rate": 0.2,
    "mask": ox.decay_mask,
    "max_norm": 0.5,
    "max_norm_growth": 1.1,
    "max_param_norm": 10.0,
    "max_update_rms": 2.0,
    "method": "standard",
    "min_param_norm": 0.1,
    "momentum_decay": 0.1,
    "multiply_by_param_rms": False,
    "nesterov": None,
    "normalization": "frobenius",
    "norms": {"hidden": ("spectral", 2.0)},
    "ns_coeffs": "jordan",
    "ns_steps": 3,
    "one_hot_roles": (),
    "placement": None,
    "power_iterations": 2,
    "preconditioner_learning_rate": 0.2,
    "root_method": "newton",
    "root_order": 4,
    "scale": 2.0,
    "scaling": "tensor",
    "scion.rules": role("embedding", ox.MatrixAxes((0,), (1,))),
    "seed": 7,
    "shape_scale": "keller",
    "threshold": 3.0,
    "trust_coefficient": 0.1,
    "trust_mask": ox.decay_mask,
    "update_interval": 3,
    "use_sign": True,
    "warmup_steps": 3,
    "weight_decay": 0.3,
}
STATE_CHANGES: dict[str, Any] = {
    "adafactor.axes": ox.MatrixAxes((), (-1,)),
    "adafactor.b1": 0.9,
    "adam_mini.rules": role("hidden", ox.MatrixAxes((1,), (0,))),
    # From its second step on, which needs a count of steps.
    "adopt.weight_decay": 0.3,
    "amsgrad": True,
    "block_size": 64,
    "came.axes": ox.MatrixAxes((), (-1,)),
    "centered": True,
    "code": "dynamic",
    "correct_vectors": True,
    "fallback": ox.lion(0.1),
    "grafting": None,
    "keep": (),
    "large_dims": None,
    "mars.rules": role("vector", ox.MatrixAxes((), (1,))),
    "max_dim": 100,
    "max_norm_growth": None,
    "min_dim_size_to_factor": 256,
    "min_size": 100_000,
    "momentum": 0.9,
    "rank": 2,
    "rank_fraction": 0.5,
    "rank_multiple": 16,
    "rules": role("embedding", ox.MatrixAxes((1,), (0,))),
    "variant": "lion",
}
DTYPES_CHANGE: dict[str, Any] = {
    "factor_dtype": "bfloat16",
    "mu_dtype": "bfloat16",
    "nu_dtype": "bfloat16",
}
# What an argument needs beside it, or needs to matter.
BESIDE = {
    "sgd.dampening": {"momentum": 0.9},
    "sgd.nesterov": {"momentum": 0.9},
    "sgd.mu_dtype": {"momentum": 0.9},
    "rmsprop.mu_dtype": {"momentum": 0.9},
    "adafactor.mu_dtype": {"b1": 0.9},
    "large_dims": {"max_dim": 100},
    "rank_multiple": {"rank_fraction": 0.3},
}
ARGUMENTS = {
    key: (kind, value)
    for kind in (STATE_STAYS, STATE_CHANGES, DTYPES_CHANGE)
    for key, value in kind.items()
}
SCHEDULES = set(typing.get_args(optax.ScalarOrSchedule))


def value_for(name: str, parameter: inspect.Parameter, values: dict[str, Any]) -> Any:
    """The one of an optimizer, or else that of all."""
    return values.get(f"{name}.{parameter.name}", values.get(parameter.name))


def other_than(default: Any, value: Any) -> Any:
    """`value`; None stands for the other one of two."""
    pairs = {True: False, False: True, "tiles": "diagonal", "diagonal": "tiles"}
    is_one_of_two = isinstance(default, str | bool) and default in pairs
    return pairs[default] if value is None and is_one_of_two else value


def without_dtypes(lines: Iterable[str]) -> list[str]:
    return [re.sub(r"\) \w+$", ")", line) for line in lines]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_which_arguments_change_the_state(name):
    factory = OPTIMIZERS[name]

    def state(**arguments: Any) -> list[str]:
        return lines_of(factory(**{"learning_rate": 0.1, **arguments}), PARAMS)

    for argument, parameter in inspect.signature(factory).parameters.items():
        known = value_for(name, parameter, ARGUMENTS)
        assert known, f"{argument} is in none of the lists above"
        kind, value = known
        beside = value_for(name, parameter, BESIDE) or {}
        before = state(**beside)
        other = other_than(parameter.default, value)
        assert other != parameter.default, argument
        after = state(**beside, **{argument: other})
        if kind is STATE_STAYS:
            assert after == before, argument
        else:
            assert after != before, argument
            is_kept = without_dtypes(after) == without_dtypes(before)
            assert is_kept == (kind is DTYPES_CHANGE), argument
        if set(typing.get_args(parameter.annotation)) >= SCHEDULES:
            assert state(**{argument: schedule}) != state(), argument


if __name__ == "__main__":
    FILE.write_text(write(formats_of_today()), "utf-8")
