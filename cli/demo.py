"""`llama4-quant demo`."""

import json
from pathlib import Path

import click

from llama4_quant.cli.options import json_option
from llama4_quant.cli.tables import console, size, table
from llama4_quant.demo import run_demo
from llama4_quant.demo_report import DemoResult


@click.command("demo", short_help="Convert, run and evaluate the sample model.")
@click.option("-o", "--output", default="demo-output", show_default=True, type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace the checkpoints of an earlier demo.")
@json_option
def demo_command(output: Path, overwrite: bool, as_json: bool) -> None:
    """Run the main job on the sample model: convert, load, generate, evaluate; write an HTML report.

    The sample is a small trained multimodal Llama 4 that ships with the package; nothing is downloaded.
    """
    result = run_demo(output, overwrite=overwrite, say=lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    _show(result)


def _show(result: DemoResult) -> None:
    out = console()
    texts = table(f'"{result.prompt}"', "model", "continuation", left=2)
    captions = table(f"{result.image} (truth: {result.truth})", "model", "caption", left=2)
    numbers = table(
        f"{result.num_tokens:,} held-out tokens; differences from BF16",
        "model", "bytes", "bits/weight", "perplexity", "KL (nats/token)", "top-1 agreement", "decode tokens/s",
    )  # fmt: skip
    for run in result.runs:
        texts.add_row(run.name, run.text)
        captions.add_row(run.name, run.caption)
        numbers.add_row(
            run.name,
            size(run.num_bytes),
            f"{run.bits_per_weight:.2f}",
            run.perplexity.text(3),
            "-" if run.divergence is None else run.divergence.text(5),
            "-" if run.agreement is None else run.agreement.text(4),
            f"{run.tokens_per_second:.0f}",
        )
    for shown in (texts, captions, numbers):
        out.print(shown)
    out.print(f"The report is {result.report}: open it in a browser. The checkpoints are beside it.")
