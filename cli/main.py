"""The `llama4-quant` command and its contract with the shell.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 an error with one clear message; 2 wrong
usage; 130 interrupted (SIGINT); 143 terminated (SIGTERM). Both signals let `convert` finish the pieces in hand first.
"""

import os
import signal
import sys
from types import FrameType

import click

from llama4_quant._version import __version__
from llama4_quant.cli.chat import chat_command
from llama4_quant.cli.convert import convert_command
from llama4_quant.cli.demo import demo_command
from llama4_quant.cli.evaluate import eval_command
from llama4_quant.cli.generate import generate_command
from llama4_quant.cli.inspect import inspect_command
from llama4_quant.cli.verify import verify_command
from llama4_quant.errors import Llama4QuantError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, "-V", "--version", prog_name="llama4-quant")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Quantize Llama 4 checkpoints to FP8 and int4, run them, and measure what was lost.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted, 143
    terminated.
    """
    # `main` reads --debug from the command line itself: it has to know also when a command fails before it starts.
    del debug


cli.add_command(convert_command)
cli.add_command(inspect_command)
cli.add_command(generate_command)
cli.add_command(chat_command)
cli.add_command(eval_command)
cli.add_command(verify_command)
cli.add_command(demo_command)


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
