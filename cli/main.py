"""The `llama4-quant` command and its contract with the shell.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 an error with one clear message; 2 wrong
usage; 130 interrupted (SIGINT); 143 terminated (SIGTERM). Both signals let `convert` finish the pieces in hand first.
"""

import gc
import importlib
import os
import signal
import sys
from types import FrameType

import click

from llama4_quant._version import __version__
from llama4_quant.errors import Llama4QuantError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

_COMMANDS = {
    "chat": "chat",
    "convert": "convert",
    "demo": "demo",
    "eval": "evaluate",
    "generate": "generate",
    "inspect": "inspect",
    "verify": "verify",
}
"""Modules of the commands: only the one that runs is imported."""


class _Commands(click.Group):
    """Commands by name, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        gc.disable()  # torch is a million objects, none of which goes away: the collector would walk them in vain, ...
        try:
            module = importlib.import_module(f"llama4_quant.cli.{_COMMANDS[cmd_name]}")
        finally:
            gc.freeze()  # ... now and again when the process ends, for a third of a second
            gc.enable()
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, "-V", "--version", prog_name="llama4-quant")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Quantize Llama 4 checkpoints to FP8 and int4, run them, and measure what was lost.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted, 143
    terminated.
    """
    # `main` reads --debug from the command line itself: it has to know also when a command fails before it starts.
    del debug


def main() -> None:
    """Run the command line; every known error ends in one message on stderr."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _run()
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # one is enough: what follows is an orderly end
    click.echo("terminated", err=True)
    sys.exit(EXIT_TERMINATED)


def _run() -> None:
    try:
        cli.main(prog_name="llama4-quant", standalone_mode=False)
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our stdout (`| head`) is gone. Point stdout elsewhere so that the interpreter's flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except (Llama4QuantError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_ERROR)
