"""Options that several commands share, so that they are spelled and described once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from llama4_quant.calibration.corpus import DEFAULT_MAX_SEQ_LENGTH, DEFAULT_NUM_SAMPLES
from llama4_quant.calibration.settings import Algorithm, Calibration, make_calibration
from llama4_quant.errors import UsageError
from llama4_quant.formats.choice import DEFAULT_SCHEMES, choose_format
from llama4_quant.ops import Kernel
from llama4_quant.runtime.attention import Attention
from llama4_quant.runtime.head import HeadFormat
from llama4_quant.scheme import INT4_GROUP_SIZES, KVCacheScheme, Observer, Scheme, SchemeName, preset

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

EXISTING_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

CALIBRATION_FLAGS = {
    "data": "--calibration",
    "num_samples": "--num-calibration-samples",
    "max_seq_length": "--max-seq-length",
    "min_tokens_per_expert": "--min-tokens-per-expert",
    "seed": "--seed",
    "text_column": "--text-column",
    "device": "--device",
    "kv_cache_scheme": "--kv-cache-scheme",
    "target_bits": "--target-bits",
}

SCHEMES = ", ".join(SchemeName)
GROUP_SIZES = ", ".join(str(size) for size in INT4_GROUP_SIZES)


def scheme_options(*, scheme_help: str, default: str | None) -> Decorator:
    """--scheme, --group-size, --observer, --quantize, --ignore: what becomes of the weights."""
    options = [
        click.option("--scheme", default=default, show_default=default is not None, help=scheme_help),
        click.option(
            "--group-size", type=int, help=f"For W4A16: {GROUP_SIZES} (-1: one scale per channel). [default: 128]"
        ),
        click.option(
            "--observer",
            default=Observer.MSE.value,
            show_default=True,
            help="How scales are chosen: mse (search for the least squared error) or absmax.",
        ),
        click.option(
            "--quantize",
            multiple=True,
            metavar="ROLE",
            help="Also quantize: attention, lm-head, vision, projector. Repeatable. Routed experts, shared expert and "
            "dense MLP always are.",
        ),
        click.option(
            "--ignore",
            multiple=True,
            metavar="PATTERN",
            help="Leave a weight in BF16: a module name, or 're:' and a regular expression. Repeatable.",
        ),
    ]
    return chain(options)


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--algorithm and what calibration takes; `calibration_for` reads them."""
    options = [
        click.option(
            "--algorithm",
            type=click.Choice([algorithm.value for algorithm in Algorithm]),
            help="rtn rounds to nearest; gptq and best keep each layer's output on calibration data. "
            "[default: best with --calibration or --target-bits, else rtn]",
        ),
        click.option(
            "--calibration",
            "data",
            multiple=True,
            metavar="PATH",
            help="Calibration data: text, JSON, JSON Lines, Parquet, a folder, or hub:NAME. Repeatable. "
            "[default for gptq and best: built-in text]",
        ),
        click.option(
            "--num-calibration-samples",
            "num_samples",
            type=int,
            default=DEFAULT_NUM_SAMPLES,
            show_default=True,
            help="Calibration samples.",
        ),
        click.option(
            "--max-seq-length",
            type=int,
            default=DEFAULT_MAX_SEQ_LENGTH,
            show_default=True,
            help="Tokens of a calibration sample.",
        ),
        click.option(
            "--min-tokens-per-expert",
            type=int,
            default=0,
            metavar="N",
            help="Draw up to three times more samples, and add those that give rarely used experts N tokens each.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Order of the calibration text."),
        click.option(
            "--text-column",
            default="text",
            show_default=True,
            help="Where calibration records have plain text.",
        ),
        click.option(
            "--target-bits",
            type=float,
            metavar="BITS",
            help="Choose int4, FP8 or BF16 weight by weight, at most so many bits per weight, scales included.",
        ),
        click.option("--device", default="cpu", show_default=True, help="Where calibration computes: cpu, cuda, ..."),
        click.option(
            "--kv-cache-scheme",
            type=click.Choice([scheme.value for scheme in KVCacheScheme]),
            help="Also calibrate scales of an FP8 KV cache, for the keys and the values of each layer.",
        ),
    ]
    return chain(options)(command)


def calibration_for(settings: dict[str, Any]) -> Calibration | None:
    """What the options of `calibration_options` ask for; takes them out of `settings`.

    Raises:
        UsageError: data without an algorithm that uses it, or numbers that make no sense.
    """
    chosen = {name: settings.pop(name) for name in CALIBRATION_FLAGS}
    algorithm = settings.pop("algorithm") or (
        Algorithm.BEST if chosen["data"] or chosen["target_bits"] is not None else Algorithm.RTN
    )
    context = click.get_current_context()
    given = [
        flag
        for name, flag in CALIBRATION_FLAGS.items()
        if context.get_parameter_source(name) not in {ParameterSource.DEFAULT, None}
    ]
    if algorithm == Algorithm.RTN and given:
        raise UsageError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for calibration, and rtn rounds to nearest "
            "without data; give --algorithm best or gptq"
        )
    return make_calibration(algorithm, **chosen)


def scheme_for(storage: str, settings: Mapping[str, Any]) -> Scheme | None:
    """The Scheme that the options of `scheme_options` describe for a format, or None if it does not quantize.

    Raises:
        UsageError: the options do not go with the format.
    """
    name = settings["scheme"] or DEFAULT_SCHEMES.get(storage)
    return choose_format(storage, optional_scheme(**{**settings, "scheme": name}))[1]


def optional_scheme(
    scheme: str | None, group_size: int | None, observer: str, quantize: tuple[str, ...], ignore: tuple[str, ...]
) -> Scheme | None:
    """The Scheme for quantizing while loading, or None without --scheme.

    Raises:
        UsageError: other options say how to quantize, but --scheme is missing.
    """
    if scheme is not None:
        return preset(scheme, group_size=group_size, observer=observer, quantize=quantize, ignore=ignore)
    if group_size is not None or observer != Observer.MSE or quantize or ignore:
        raise UsageError("--group-size, --observer, --quantize and --ignore say how to quantize; add --scheme")
    return None


kernel_option = click.option(
    "--kernel",
    type=click.Choice([kernel.value for kernel in Kernel]),
    default=Kernel.AUTO.value,
    show_default=True,
    help="What multiplies with the weights; auto: for each the first of native, torch, reference that can.",
)


LOAD_SETTINGS = ("device", "dtype", "attention", "kernel", "lm_head", "offload", "expert_cache")
"""What the options of `device_options` are called by `load` and `evaluate`."""


def device_options() -> Decorator:
    """Where and how a model runs: LOAD_SETTINGS."""
    options = [
        click.option("--device", default="cpu", show_default=True, help="Where to run: cpu, cuda, cuda:1, ..."),
        click.option("--dtype", default="bfloat16", show_default=True, help="Computation: bfloat16, float16, float32."),
        click.option(
            "--attention",
            type=click.Choice([kind.value for kind in Attention]),
            default=Attention.SDPA.value,
            show_default=True,
            help="sdpa is torch's fused attention; flex its compiled flex_attention; eager is for checking.",
        ),
        kernel_option,
        click.option(
            "--lm-head",
            type=click.Choice([stored.value for stored in HeadFormat]),
            help="Quantize the head while loading, whatever else is quantized.",
        ),
        click.option(
            "--offload",
            type=click.Choice(["experts"]),
            help="Leave routed experts in the checkpoint's files and read them when needed: for models larger than "
            "memory.",
        ),
        click.option(
            "--expert-cache",
            metavar="SIZE",
            help="Memory for the most used offloaded experts, like 8GiB. [default: the page cache decides]",
        ),
    ]
    return chain(options)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of a table."
)


quiet_option = click.option("--quiet", is_flag=True, help="No progress and no summary on stderr.")


def chain(options: Sequence[Decorator]) -> Decorator:
    """One decorator that adds options in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
