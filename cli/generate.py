"""`llama4-quant generate`."""

import json
from dataclasses import replace
from pathlib import Path

import click

from llama4_quant.checkpoint.source import resolve
from llama4_quant.cli.options import (
    EXISTING_FILE,
    SCHEMES,
    device_options,
    json_option,
    optional_scheme,
    scheme_options,
)
from llama4_quant.cli.progress import byte_progress
from llama4_quant.runtime.loader import load, load_size
from llama4_quant.runtime.pipeline import Pipeline, user_message
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.streams import TextStream


@click.command("generate", short_help="Answer a prompt, with images if you like.")
@click.argument("model", metavar="MODEL")
@click.option("--prompt", required=True, help="What to say.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=EXISTING_FILE,
    help="An image to show. Repeatable, in order.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-new-tokens", type=int, help="Stop after so many tokens. [default: the checkpoint's, or 256]")
@click.option("--temperature", type=float, help="0 is greedy. [default: the checkpoint's, or 0]")
@click.option("--top-k", type=int, help="Sample among the k most probable tokens.")
@click.option("--top-p", type=float, help="Sample among the most probable tokens that sum to p.")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers.")
@scheme_options(scheme_help=f"Quantize MODEL (BF16) while loading: {SCHEMES}.", default=None)
@device_options()
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@json_option
def generate_command(
    model: str,
    prompt: str,
    images: tuple[Path, ...],
    raw: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    scheme: str | None,
    group_size: int | None,
    observer: str,
    quantize: tuple[str, ...],
    ignore: tuple[str, ...],
    device: str,
    dtype: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Answer a prompt with MODEL (BF16 or quantized), streaming text to stdout.

    \b
    llama4-quant generate ./scout-w4a16 --prompt "What is a mixture of experts?"
    llama4-quant generate ./scout-w4a16 --prompt "What is in these?" --image a.jpg --image b.png
    llama4-quant generate ./scout --scheme W4A16 --prompt "Hello"
    """  # noqa: D301 - \b is click's mark for lines that must not be wrapped
    chosen = optional_scheme(scheme, group_size, observer, quantize, ignore)
    folder = resolve(model, revision)
    with byte_progress("loading", load_size(folder)) as advance:
        loaded = load(folder, chosen, device, dtype, progress=advance)
    pipeline = Pipeline.around(loaded, folder)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = _settings(pipeline.settings, {key: value for key, value in given.items() if value is not None}, seed)
    if raw:
        stream = pipeline.complete("<|image|>" * len(images) + prompt, images, settings)
    else:
        stream = pipeline.chat([user_message(prompt, len(images))], images, settings)
    _show(stream, as_json=as_json)


def _settings(defaults: GenerationSettings, given: dict[str, int | float], seed: int) -> GenerationSettings:
    return replace(defaults, seed=seed, **given)  # type: ignore[arg-type]


def _show(stream: TextStream, *, as_json: bool) -> None:
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    timing = stream.timing
    if as_json:
        numbers = {
            "num_prompt_tokens": timing.num_prompt_tokens,
            "num_new_tokens": timing.num_new_tokens,
            "prefill_seconds": timing.prefill_seconds,
            "decode_tokens_per_second": timing.decode_tokens_per_second,
        }
        click.echo(json.dumps({"text": "".join(pieces), **numbers}))
        return
    click.echo()
    rate = timing.decode_tokens_per_second
    click.echo(
        f"{timing.num_prompt_tokens} prompt tokens in {timing.prefill_seconds:.2f} s, "
        f"{timing.num_new_tokens} new tokens" + (f" at {rate:.1f} tokens/s" if rate else ""),
        err=True,
    )
