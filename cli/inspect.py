"""`llama4-quant inspect`."""

import dataclasses
import json

import click

from llama4_quant.cli.options import json_option
from llama4_quant.cli.tables import console, count, parameters, size, table
from llama4_quant.inspect import Inspection, WorkKernel, inspect
from llama4_quant.ops import KernelCount


@click.command("inspect", short_help="Show what a checkpoint holds.")
@click.argument("source", metavar="SRC")
@click.option("--weights", is_flag=True, help="List every weight instead of a summary by role.")
@click.option(
    "--kernels", is_flag=True, help="Also show what would run weights and other work on this machine's processor."
)
@click.option("--context", type=int, metavar="TOKENS", help="Also show what the KV cache of so many tokens takes.")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@json_option
def inspect_command(
    source: str, weights: bool, kernels: bool, context: int | None, revision: str | None, as_json: bool
) -> None:
    """Show what a checkpoint holds, BF16 or quantized: architecture, weights by role, bits per weight."""
    found = inspect(source, kernels=kernels, context=context, revision=revision)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    _show_weights(found) if weights else _show_summary(found)
    if found.kernels:
        _show_kernels(found)


def _show_summary(found: Inspection) -> None:
    out = console()
    facts = table(found.source, "what", "value", left=2)
    for name, value in found.facts:
        facts.add_row(name, value)
    out.print(facts)
    roles = table("Weights by role", "role", "stored as", "weights", "parameters", "bytes", left=2)
    for role in found.roles:
        roles.add_row(role.role, role.stored_as, count(role.count), count(role.num_weights), size(role.num_bytes))
    out.print(roles)
    out.print(
        f"{parameters(found.num_weights)} in {size(found.num_bytes)}, "
        f"{found.num_files} file{'' if found.num_files == 1 else 's'}: "
        f"{8 * found.num_bytes / found.num_weights:.3f} bits per weight"
    )


def _show_weights(found: Inspection) -> None:
    out = console()
    weights = table(found.source, "weight", "role", "stored as", "shape", "bytes", left=3)
    for weight in found.weights:
        weights.add_row(
            weight.name, weight.role, weight.stored_as, "x".join(map(str, weight.shape)), size(weight.num_bytes)
        )
    out.print(weights)


def _show_kernels(found: Inspection) -> None:
    kernels = table("Kernels, in bfloat16 on this processor", "operator", "kernel", "why not", "weights", left=3)
    for kernel in found.kernels:
        kernels.add_row(kernel.operator, *_cells(kernel))
    console().print(kernels)
    others = table("Other work of the text model, likewise", "work", "kernel", "why not", "modules", left=3)
    for other in found.other_kernels:
        others.add_row(other.work, *_cells(other))
    console().print(others)


def _cells(chosen: KernelCount | WorkKernel) -> tuple[str, str, str]:
    """What runs, what does not and why, how often."""
    reasons = "\n".join(f"{backend}: {reason}" for backend, reason in chosen.rejected)
    return chosen.kernel, reasons, count(chosen.count)
