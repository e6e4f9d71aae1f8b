"""Progress on stderr: a bar on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama4_quant.cli.tables import size

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def byte_progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str, int], None]]:
    """Give a function that takes (what, bytes done since the last call); shows nothing when `quiet`."""
    if quiet:
        yield lambda _what, _done: None
        return
    columns = (DownloadColumn(), TransferSpeedColumn())
    with _progress(title, total, size(total), *columns) as advance:
        yield advance


@contextmanager
def count_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the number of things done since the last call."""
    with _progress(title, total, str(total), MofNCompleteColumn()) as advance:
        yield lambda done: advance("", done)


@contextmanager
def _progress(
    title: str, total: int, total_text: str, *columns: ProgressColumn
) -> Iterator[Callable[[str, int], None]]:
    if not sys.stderr.isatty():
        yield _plain_lines(title, total, total_text)
        return
    shown = (TextColumn(title), BarColumn(), *columns, TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*shown, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda what, done: progress.update(task, advance=done, description=what)


def _plain_lines(title: str, total: int, total_text: str) -> Callable[[str, int], None]:
    """Lines in a log: at most one for each tenth of the way, and one in five seconds."""
    done, shown, last = 0, 0, time.monotonic()

    def advance(_what: str, num_done: int) -> None:
        nonlocal done, shown, last
        done += num_done
        tenth = 10 * done // max(1, total)
        if tenth > shown and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            shown, last = tenth, time.monotonic()
            click.echo(f"{title}: {10 * tenth} % of {total_text}", err=True)

    return advance
