"""`llama4-quant chat`."""

import sys
from pathlib import Path
from typing import Any

import click

from llama4_quant.cli.chat_loop import ChatLoop
from llama4_quant.cli.config_file import configurable
from llama4_quant.cli.generation_options import (
    RARE_MODEL_FLAGS,
    RARE_SAMPLING_FLAGS,
    load_pipeline,
    model_options,
    sampling_options,
    sampling_settings,
)
from llama4_quant.cli.options import EXISTING_FILE, json_option, quiet_option
from llama4_quant.runtime.chat import ChatSession

EXIT_FAILED_TURN = 1


@configurable(rare=(*RARE_SAMPLING_FLAGS, *RARE_MODEL_FLAGS))
@click.command("chat", short_help="Talk with a model in the terminal.")
@click.argument("model", metavar="MODEL")
@click.option("--system", metavar="TEXT", help="What the model is told beforehand.")
@click.option(
    "--image", "images", multiple=True, type=EXISTING_FILE, help="An image to show with the first message. Repeatable."
)
@sampling_options()
@model_options()
@quiet_option
@json_option
def chat_command(
    model: str, system: str | None, images: tuple[Path, ...], quiet: bool, as_json: bool, **settings: Any
) -> None:
    """Talk with MODEL (BF16 or quantized). Each turn computes its new tokens only; /help lists commands.

    Ctrl-C interrupts an answer, Ctrl-D ends the chat. Where stdin is not a terminal, every line is a turn, and the exit
    code is 1 if one of them failed. With --json each answer is a JSON document in a line of its own.

    \b
    llama4-quant chat ./scout-w4a16 --system "Answer in one sentence."
    llama4-quant chat ./scout-w4a16 --image cat.jpg
    printf 'What is a list?\nAnd a tuple?\n' | llama4-quant chat ./scout-w4a16 --quiet
    """  # noqa: D301 - \b is click's mark for lines that must not be wrapped
    pipeline = load_pipeline(model, settings, quiet=quiet)
    session = ChatSession(pipeline, settings=sampling_settings(pipeline.settings, settings), system=system)
    loop = ChatLoop(session, images, quiet=quiet, as_json=as_json)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not loop.run(is_terminal=is_terminal) and not is_terminal:
        sys.exit(EXIT_FAILED_TURN)
