"""Tables and numbers a person reads."""

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["format_bytes", "format_table", "print_table"]


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> str:
    """Columns aligned by spaces, under a ruled header.

    Args:
      header: Column titles.
      rows: One text a column.
      right: Indices of the columns that are aligned to the right.

    Returns:
      The lines of the table, without a line break at the end.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> None:
    """Prints a table: by rich on a terminal where it is installed, else as plain text.

    Args:
      header: Column titles.
      rows: One text a column.
      right: Indices of the columns that are aligned to the right.
    """
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(format_table(header, rows, right))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, title in enumerate(header):
        justify = "right" if index in right else "left"
        table.add_column(title, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Brackets are text here, no styles.
    Console(markup=False).print(table)


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units, 1 GB = 1e9 bytes.

    Args:
      count: Bytes, >= 0.

    Returns:
      A number of four significant digits with its unit, such as "13.48 GB".
    """
    units = {"PB": 1e15, "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
    for unit, size in units.items():
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} B"
