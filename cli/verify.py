"""`llama4-quant verify`."""

import json
import sys
from pathlib import Path

import click

from llama4_quant.cli.options import json_option
from llama4_quant.cli.progress import byte_progress
from llama4_quant.cli.tables import console, largest_errors, size
from llama4_quant.errors import UsageError
from llama4_quant.runtime.loader import load_size
from llama4_quant.verification.files import listed_files
from llama4_quant.verification.findings import Verification
from llama4_quant.verification.verify import verify

EXIT_DAMAGED = 1


@click.command("verify", short_help="Check that a converted checkpoint is whole.")
@click.argument("output", metavar="OUT")
@click.option("--source", metavar="SRC", help="The BF16 checkpoint it was made from: adds the error of every weight.")
@click.option("--revision", help="Branch, tag or commit of SRC, if that is a Hub id.")
@json_option
def verify_command(output: str, source: str | None, revision: str | None, as_json: bool) -> None:
    """Check every byte of OUT against its manifest, its structure, and that every code and scale decodes.

    With --source also that kept weights equal the source, and quantized ones are as far from it as the report says.
    Exits with 1 if anything is wrong.
    """
    if source is None and revision is not None:
        raise UsageError("--revision says which one of --source SRC, and there is no --source")
    total = sum(file.size for file in listed_files(Path(output)))
    if source is not None:
        total += load_size(source, revision=revision)
    with byte_progress("verifying", total) as advance:
        result = verify(output, source=source, revision=revision, progress=advance)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        _show(result)
    if not result.is_whole:
        sys.exit(EXIT_DAMAGED)


def _show(result: Verification) -> None:
    out = console()
    if result.distances:
        out.print(largest_errors((w.name, w.stored_as, w.relative_error, w.sqnr_db) for w in result.distances))
    for problem in result.problems:
        out.print(f"{problem.where}: {problem.what}")
    state = "whole" if result.is_whole else f"{len(result.problems)} problem{'s' if len(result.problems) > 1 else ''}"
    out.print(
        f"{result.output}: {state}; {result.num_files} files, {size(result.num_bytes)}, {result.num_weights} weights"
    )
