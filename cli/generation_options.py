"""What `generate` and `chat` have in common: the model, and how to choose tokens."""

from dataclasses import replace
from typing import Any

import click

from llama4_quant.checkpoint.source import resolve
from llama4_quant.cli.options import (
    LOAD_SETTINGS,
    SCHEMES,
    Decorator,
    chain,
    device_options,
    optional_scheme,
    scheme_options,
)
from llama4_quant.cli.progress import byte_progress
from llama4_quant.runtime.cache_formats import CacheDtype
from llama4_quant.runtime.loader import load, load_size
from llama4_quant.runtime.pipeline import Pipeline
from llama4_quant.runtime.sampling import DEFAULT_PREFILL_CHUNK_SIZE, GenerationSettings

RARE_MODEL_FLAGS = (
    *("--group-size", "--observer", "--quantize", "--ignore", "--dtype", "--revision"),
    *("--kernel", "--lm-head", "--expert-cache", "--attention"),
)
RARE_SAMPLING_FLAGS = ("--presence-penalty", "--frequency-penalty", "--prefill-chunk-size", "--kv-cache-dtype")

_SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prefill_chunk_size",
    "kv_cache_dtype",
)


def model_options() -> Decorator:
    """What MODEL is and where it runs; `load_pipeline` reads them."""
    return chain(
        [
            scheme_options(scheme_help=f"Quantize MODEL (BF16) while loading: {SCHEMES}.", default=None),
            device_options(),
            click.option("--revision", help="Branch, tag or commit of a Hub id."),
        ]
    )


def load_pipeline(model: str, settings: dict[str, Any], *, quiet: bool) -> Pipeline:
    """Load MODEL as the options of `model_options` say; takes them out of `settings`.

    Raises:
        UsageError: the options do not go together.
        Llama4QuantError: the checkpoint cannot be used.
    """
    scheme = optional_scheme(
        *(settings.pop(name) for name in ("scheme", "group_size", "observer", "quantize", "ignore"))
    )
    folder = resolve(model, settings.pop("revision"))
    chosen = {name: settings.pop(name) for name in LOAD_SETTINGS}
    with byte_progress("loading", load_size(folder), quiet=quiet) as advance:
        loaded = load(folder, scheme, progress=advance, **chosen)
    return Pipeline.around(loaded, folder)


def cache_options() -> Decorator:
    """--prefill-chunk-size and --kv-cache-dtype."""
    return chain(
        [
            click.option(
                "--prefill-chunk-size",
                type=int,
                default=DEFAULT_PREFILL_CHUNK_SIZE,
                show_default=True,
                help="Tokens of a prompt, or of a window, that are computed at a time: bounds memory.",
            ),
            click.option(
                "--kv-cache-dtype",
                type=click.Choice([kind.value for kind in CacheDtype]),
                default=CacheDtype.AUTO.value,
                show_default=True,
                help="How keys and values are kept; auto: fp8 if MODEL has scales for it, else --dtype.",
            ),
        ]
    )


def sampling_options() -> Decorator:
    """How to choose tokens and when to end; `sampling_settings` reads them."""
    return chain(
        [
            click.option(
                "--max-new-tokens", type=int, help="End after so many tokens. [default: the checkpoint's, or 256]"
            ),
            click.option("--temperature", type=float, help="0 is greedy. [default: the checkpoint's, or 0]"),
            click.option("--top-k", type=int, help="Sample among the k most probable tokens."),
            click.option("--top-p", type=float, help="Sample among the most probable tokens that sum to p."),
            click.option("--min-p", type=float, help="Sample among tokens at least p times as probable as the best."),
            click.option(
                "--repetition-penalty", type=float, help="Above 1, tokens that were there become less likely."
            ),
            click.option("--presence-penalty", type=float, help="Taken off the logits of tokens in the answer."),
            click.option("--frequency-penalty", type=float, help="The same, as often as they are in the answer."),
            click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable."),
            cache_options(),
            click.option("--seed", default=0, show_default=True, help="Of the random numbers."),
        ]
    )


def sampling_settings(defaults: GenerationSettings, settings: dict[str, Any]) -> GenerationSettings:
    """The checkpoint's settings with what the options of `sampling_options` say; takes these out of `settings`.

    Raises:
        UsageError: a value is out of range.
    """
    given = {name: value for name in _SAMPLING if (value := settings.pop(name)) is not None}
    stop, seed = settings.pop("stop"), settings.pop("seed")
    return replace(defaults, seed=seed, stop=stop or defaults.stop, **given)
