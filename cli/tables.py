"""How numbers and tables look on the terminal."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

WIDTH_WITHOUT_TERMINAL = 150
NUM_WORST = 5


def console() -> Console:
    """stdout; wide and plain when it is not a terminal, so that tables in logs and pipes are not cut.

    Names, patterns and generated text hold brackets and colons, so these are never read as markup.
    """
    if sys.stdout.isatty():
        return Console(markup=False, emoji=False)
    return Console(width=WIDTH_WITHOUT_TERMINAL, color_system=None, markup=False, emoji=False)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text, and the others numbers."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return made


def size(num_bytes: int) -> str:
    """Decimal units, as checkpoints are advertised: 217 GB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def parameters(number: int) -> str:
    """108.6 B parameters, 5.134 M parameters."""
    return f"{number / 1e9:.4g} B parameters" if number >= 1e9 else f"{number / 1e6:.4g} M parameters"


def count(number: int) -> str:
    """12,345,678."""
    return f"{number:,}"


def largest_errors(weights: Iterable[tuple[str, str, float, float | None]]) -> Table:
    """The worst of quantized weights, given as (name, stored as, relative error, SQNR in dB or None if exact)."""
    worst = table("Largest errors", "weight", "stored as", "relative error", "SQNR dB", left=2)
    for name, stored_as, relative_error, sqnr_db in sorted(weights, key=lambda weight: -weight[2])[:NUM_WORST]:
        worst.add_row(name, stored_as, f"{relative_error:.4f}", "exact" if sqnr_db is None else f"{sqnr_db:.2f}")
    return worst
