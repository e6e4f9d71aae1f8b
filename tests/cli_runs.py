"""Running the command line inside the test's process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import click
import pytest

from llama4_quant.cli.main import cli, main


@dataclass(frozen=True)
class CliRun:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object, stdin: str = "") -> CliRun:
    """Run `llama4-quant` with these arguments and this text on stdin, which is no terminal."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["llama4-quant", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return CliRun(code, out.getvalue(), err.getvalue())


def all_commands() -> dict[str, click.Command]:
    """Every command by name; the command line itself imports only the one that runs."""
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}
