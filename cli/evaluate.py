"""`llama4-quant eval`."""

import json
from pathlib import Path
from typing import Any

import click

from llama4_quant.checkpoint.source import resolve
from llama4_quant.cli.config_file import configurable
from llama4_quant.cli.generation_options import cache_options
from llama4_quant.cli.options import (
    EXISTING_FILE,
    SCHEMES,
    device_options,
    json_option,
    optional_scheme,
    scheme_options,
)
from llama4_quant.cli.progress import count_progress
from llama4_quant.cli.tables import console
from llama4_quant.evaluation.checkpoints import evaluate, text_windows
from llama4_quant.evaluation.report import render


@configurable(rare=("--prefill-chunk-size", "--kv-cache-dtype", "--expert-cache"))
@click.command("eval", short_help="Measure perplexity, and KL divergence to a reference.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--text",
    required=True,
    type=EXISTING_FILE,
    metavar="FILE",
    help="UTF-8 text to score.",
)
@click.option("--reference", metavar="REF", help="Checkpoint to compare with, usually the BF16 one.")
@click.option("--seq-length", default=2048, show_default=True, help="Positions per window.")
@click.option("--num-windows", type=int, help="Windows, from the start of the text. [default: all that fit]")
@click.option("--batch-size", default=1, show_default=True, help="Windows per forward pass.")
@scheme_options(scheme_help=f"Quantize MODEL (BF16) while loading: {SCHEMES}.", default=None)
@device_options()
@cache_options()
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@json_option
def eval_command(
    model: str,
    text: Path,
    seq_length: int,
    num_windows: int | None,
    as_json: bool,
    group_size: int | None,
    scheme: str | None,
    observer: str,
    quantize: tuple[str, ...],
    ignore: tuple[str, ...],
    **settings: Any,
) -> None:
    """Measure MODEL's perplexity on a text, and how far it is from a reference.

    With --reference: mean KL divergence in nats per token, and how often the most probable token is the same. Standard
    errors are over windows.
    """
    chosen = optional_scheme(scheme, group_size, observer, quantize, ignore)
    total = len(
        text_windows(resolve(model, settings["revision"]), text, seq_length=seq_length, num_windows=num_windows)
    )
    with count_progress("evaluating", total) as advance:
        result = evaluate(
            model,
            text=text,
            scheme=chosen,
            seq_length=seq_length,
            num_windows=num_windows,
            progress=advance,
            **settings,
        )
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        console().print(render(result))
