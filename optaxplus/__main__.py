"""What training takes, from the command line, before anything is allocated.

python -m optaxplus memory --model llama-70b --optimizer adamw --weights bfloat16 \
        --grads float32 --master float32 --state 8bit --mesh fsdp=64
python -m optaxplus compare adamw lion muon "sgd(momentum=0.9)" --model llama-7b
"""

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from optaxplus.report.layout import MESH_AXES, mesh_sizes
from optaxplus.report.memory import MemoryReport
from optaxplus.report.models import MODELS
from optaxplus.report.recipes import MASTERS, OPTIMIZERS, STATES, WEIGHTS, Recipe
from optaxplus.report.tables import format_bytes, print_table

_Value = TypeVar("_Value")
_WIDTH = 79
_PARTS = ("params", "grads", "state", "total")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: Arguments; None takes those of the process.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    is_comparison = options.command == "compare"
    names = options.optimizers if is_comparison else [options.optimizer]
    formats = ("weights", "grads", "master", "state", "lora")
    try:
        recipes = [
            Recipe(name, **{each: getattr(options, each) for each in formats})
            for name in names
        ]
        reports = [recipe.report(options.model, options.mesh) for recipe in recipes]
    except (TypeError, ValueError) as error:
        parser.error(str(error).removeprefix("Recipe: "))
    said = {"model": options.model, "mesh": options.mesh}
    if options.json:
        found = [
            {**said, "recipe": asdict(recipe), **report.to_dict()}
            for recipe, report in zip(recipes, reports, strict=True)
        ]
        print(json.dumps(found if is_comparison else found[0], indent=2))
    elif options.csv:
        _print_csv(said, recipes, reports)
    elif is_comparison:
        _print_comparison(recipes, reports)
    else:
        print_table(*reports[0].table(), right=(1, 2, 3))


def _print_csv(
    said: dict[str, Any], recipes: Sequence[Recipe], reports: Sequence[MemoryReport]
) -> None:
    """A line for each recipe, in exact bytes; what nobody said or knows is empty."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    mesh = ",".join(f"{axis}={size}" for axis, size in (said["mesh"] or {}).items())
    for index, (recipe, report) in enumerate(zip(recipes, reports, strict=True)):
        on_device = report.per_device or dict.fromkeys(_PARTS)
        line = {"model": said["model"], "mesh": mesh, **asdict(recipe)}
        line["num_params"] = report.num_params
        line |= {f"{part}_bytes": getattr(report, part) for part in _PARTS}
        line |= {f"{part}_bytes_per_device": on_device[part] for part in _PARTS}
        if index == 0:
            writer.writerow(line)
        writer.writerow(line.values())


def _print_comparison(
    recipes: Sequence[Recipe], reports: Sequence[MemoryReport]
) -> None:
    header = [f"{reports[0].num_params:,} parameters", "parameters", "gradients"]
    header += ["state", "total", "per parameter"]
    if reports[0].per_device is not None:
        header.append("per device")
    rows = []
    for recipe, report in zip(recipes, reports, strict=True):
        row = [recipe.optimizer]
        row += [format_bytes(getattr(report, part)) for part in _PARTS]
        row.append(f"{report.bytes_per_param:.3f}")
        if report.per_device is not None:
            row.append(format_bytes(report.per_device["total"]))
        rows.append(row)
    print_table(header, rows, right=range(1, len(header)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optaxplus",
        description=textwrap.fill(
            "What parameters, gradients and optimizer state of a model take, exactly, "
            "before anything is allocated. Activations are not counted.",
            width=_WIDTH,
        ),
        epilog=_wrapped("models", MODELS) + "\n\n" + _wrapped("optimizers", OPTIMIZERS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    memory = commands.add_parser(
        "memory", help="one optimizer in detail", description="One optimizer in detail."
    )
    compare = commands.add_parser(
        "compare",
        help="optimizers side by side",
        description="Optimizers side by side.",
    )
    memory.add_argument(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help="a name, or one with keyword arguments: 'sgd(momentum=0.9)'; "
        "default: %(default)s",
    )
    compare.add_argument(
        "optimizers",
        nargs="+",
        metavar="OPTIMIZER",
        help="names, or names with keyword arguments: 'sgd(momentum=0.9)'",
    )
    for command in (memory, compare):
        _add_common(command)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is trained, and in which formats."""
    parser.add_argument(
        "--model",
        required=True,
        choices=MODELS,
        metavar="NAME",
        help=f"one of {', '.join(MODELS)}",
    )
    parser.add_argument(
        "--weights",
        default="float32",
        choices=WEIGHTS,
        help="dtype of the parameters; default: %(default)s",
    )
    parser.add_argument(
        "--grads",
        choices=WEIGHTS,
        help="dtype of the gradients; default: that of the parameters",
    )
    parser.add_argument(
        "--master",
        choices=MASTERS,
        help="what ox.master_weights keeps of parameters in 16 bits: a float32 copy, "
        "or 8 bits more; default: nothing",
    )
    parser.add_argument(
        "--state",
        choices=STATES,
        help="moments in 8 bits, by ox.quantize_state; default: as the optimizer says",
    )
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train factors of this rank beside every hidden matrix, and nothing else",
    )
    parser.add_argument(
        "--mesh",
        type=_argument(mesh_sizes),
        metavar="AXIS=SIZE,...",
        help=f"count each device's share, too, on a mesh with axes of "
        f"{', '.join(MESH_AXES)}: matrices are cut along fsdp where they sum over "
        "their inputs and along tensor where their outputs are, as far as sizes divide",
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="exact numbers as JSON")
    formats.add_argument("--csv", action="store_true", help="exact numbers as CSV")


def _argument(read: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """`read` for argparse, which shows the messages of one kind of error only."""

    def read_argument(text: str) -> _Value:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_argument


def _wrapped(title: str, names: Iterable[str]) -> str:
    text = f"{title}: {', '.join(names)}"
    return textwrap.fill(text, width=_WIDTH, subsequent_indent="  ")


if __name__ == "__main__":
    main()
