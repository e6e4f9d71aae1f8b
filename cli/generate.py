"""`llama4-quant generate`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import click

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
from llama4_quant.cli.prompts import Prompt, read_prompts
from llama4_quant.cli.summary import answer_json, summary_line
from llama4_quant.errors import UsageError
from llama4_quant.runtime.pipeline import Completions, Pipeline
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.timing import total


@configurable(rare=("--system", "--batch-size", "--logprobs", *RARE_SAMPLING_FLAGS, *RARE_MODEL_FLAGS))
@click.command("generate", short_help="Answer prompts, with images if you like.")
@click.argument("model", metavar="MODEL")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="What to say. Repeatable: an answer for each.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Many prompts: one per line, or JSON Lines (.jsonl); - is stdin.",
)
@click.option("--image", "images", multiple=True, type=EXISTING_FILE, help="An image to show. Repeatable, in order.")
@click.option("--system", metavar="TEXT", help="What the model is told beforehand.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts answered at a time.")
@sampling_options()
@click.option("--logprobs", is_flag=True, help="With --json: token ids, and their log-probabilities under the model.")
@model_options()
@quiet_option
@json_option
def generate_command(
    model: str,
    texts: tuple[str, ...],
    file: Path | None,
    images: tuple[Path, ...],
    system: str | None,
    raw: bool,
    batch_size: int,
    logprobs: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer prompts with MODEL (BF16 or quantized): text to stdout as it comes, a summary to stderr.

    \b
    llama4-quant generate ./scout-w4a16 --prompt "What is a mixture of experts?"
    llama4-quant generate ./scout-w4a16 --prompt "What is in these?" --image a.jpg --image b.png
    llama4-quant generate ./scout-w4a16 --prompts questions.txt --json > answers.jsonl
    llama4-quant generate ./scout --scheme W4A16 --prompt "Hello"
    """  # noqa: D301 - \b is click's mark for lines that must not be wrapped
    if raw and system is not None:
        raise UsageError("--system goes through the chat template, and --raw leaves that out")
    prompts = [Prompt(text=text, images=images, system=system) for text in texts]
    if file is not None:
        prompts += read_prompts(file, images, system)
    if not prompts:
        raise UsageError("there is nothing to answer; give --prompt TEXT or --prompts FILE")
    pipeline = load_pipeline(model, settings, quiet=quiet)
    chosen = replace(sampling_settings(pipeline.settings, settings), logprobs=logprobs)
    is_stream = len(prompts) == 1 and not as_json
    done: list[Completions] = []
    for batch, answers in _answered(pipeline, prompts, chosen, batch_size, raw=raw, is_stream=is_stream):
        if as_json:
            _print_json(batch_size * len(done), batch, answers)
        elif not is_stream:
            _print_texts(batch, answers)
        done.append(answers)
    if is_stream:
        click.echo()
    if not quiet:
        click.echo(_summary(done), err=True)


def _answered(
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    batch_size: int,
    *,
    raw: bool,
    is_stream: bool,
) -> Iterator[tuple[Sequence[Prompt], Completions]]:
    """Batches of prompts and their answers; a stream's text is printed while it comes."""
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        answers = pipeline.complete_batch(
            [prompt.render(pipeline, raw=raw) for prompt in batch],
            [prompt.images for prompt in batch],
            settings,
            first_row=first,
            on_text=(lambda _row, piece: click.echo(piece, nl=False)) if is_stream else None,
        )
        yield batch, answers


def _print_json(first: int, batch: Sequence[Prompt], answers: Completions) -> None:
    for index, (prompt, row) in enumerate(zip(batch, answers.rows, strict=True), first):
        click.echo(json.dumps({"index": index, "prompt": prompt.text, **answer_json(row, answers.timing)}))


def _print_texts(batch: Sequence[Prompt], answers: Completions) -> None:
    for prompt, row in zip(batch, answers.rows, strict=True):
        click.echo(f"> {prompt.text}\n{row.text}\n")


def _summary(done: Sequence[Completions]) -> str:
    reasons = [str(row.finish_reason) for answers in done for row in answers.rows]
    counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    ended = ", ".join(reason if len(reasons) == 1 else f"{reason} ({count})" for reason, count in counts.items())
    return summary_line(reduce(total, (answers.timing for answers in done)), done[0].timing.first_token_seconds, ended)
