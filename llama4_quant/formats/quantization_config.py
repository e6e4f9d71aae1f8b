"""`quantization_config` of config.json in compressed-tensors' spelling, as it is written.

For one scheme it is what llm-compressor 0.14 writes (compressed-tensors 0.19): one group that targets every Linear, and
an `ignore` list of full names. Several schemes are a group each, whose targets are full names and, for the experts of
layers, a pattern. They never are "Linear": vLLM compares the class of a fused module (qkv_proj, gate_up_proj) before
the names of its parts, so a group with "Linear" would catch the parts of all others.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama4_quant.scheme import FP8_BLOCK_SIZE, KVCacheScheme, Observer, Scheme, Strategy, WeightScheme, WeightType

LAYOUT_VERSION = "0.19.0"
QUANT_METHOD = "compressed-tensors"
LINEAR = "Linear"
MIXED = "mixed-precision"
"""What stands for the format of the whole where groups have different ones."""

FORMATS = {
    WeightType.INT4: ("pack-quantized",),
    WeightType.FP8: ("float-quantized", "naive-quantized"),  # two names for the same tensors
}
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
FP8_ACTIVATIONS = {Strategy.CHANNEL: ("token", None), Strategy.BLOCK: ("group", FP8_BLOCK_SIZE)}
_OBSERVERS = {Observer.ABSMAX: "memoryless_minmax", Observer.MSE: "memoryless_mse"}
_EXPERT = re.compile(r"(?P<prefix>.*\blayers\.)(?P<layer>\d+)\.feed_forward\.experts\.\d+\.(?:gate|up|down)_proj")


def quantization_config(
    scheme: Scheme, ignore: Sequence[str], heads: Sequence[str] = (), kv_cache_scheme: KVCacheScheme | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear modules all use `scheme`, but those in `ignore`.

    Args:
        scheme: of the quantized modules.
        ignore: full names of exactly the linear modules that are not quantized.
        heads: full names of quantized output heads. They are targets of their own: in vLLM a head is no Linear
            (but a ParallelLMHead), so the class name alone would not reach it.
        kv_cache_scheme: of a KV cache whose scales are in the checkpoint.
    """
    return _config([_group(scheme.weights, [LINEAR, *heads])], ignore, kv_cache_scheme)


def mixed_quantization_config(
    schemes: Mapping[str, WeightScheme], ignore: Sequence[str], kv_cache_scheme: KVCacheScheme | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear modules do not all have the same scheme.

    Args:
        schemes: of every quantized linear module by full name, in order of the model.
        ignore: full names of exactly the linear modules that are not quantized.
        kv_cache_scheme: of a KV cache whose scales are in the checkpoint.
    """
    names: dict[WeightScheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(scheme, []).append(name)
    return _config(
        [_group(scheme, _short_targets(members)) for scheme, members in names.items()], ignore, kv_cache_scheme
    )


def _config(
    groups: Sequence[Mapping[str, Any]], ignore: Sequence[str], kv_cache_scheme: KVCacheScheme | None
) -> dict[str, Any]:
    formats = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None if kv_cache_scheme is None else _arguments(**FP8_CACHE, observer="static_minmax"),
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def _group(scheme: WeightScheme, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "format": FORMATS[scheme.type][0],
        "input_activations": _activation_arguments(scheme),
        "output_activations": None,
        "targets": list(targets),
        "weights": _weight_arguments(scheme),
    }


def _short_targets(names: Sequence[str]) -> list[str]:
    """Full names; those of routed experts, of which Maverick has nine thousand, as one pattern for all layers.

    All experts of a layer have one scheme, so a layer's number is all that the pattern has to tell apart.
    """
    found = [(name, _EXPERT.fullmatch(name)) for name in names]
    layers: dict[str, list[str]] = {}
    for _, expert in found:
        if expert is not None and expert["layer"] not in layers.setdefault(expert["prefix"], []):
            layers[expert["prefix"]].append(expert["layer"])
    patterns = [
        rf"re:{re.escape(prefix)}(?:{'|'.join(numbers)})\.feed_forward\.experts\.\d+\.(?:gate|up|down)_proj$"
        for prefix, numbers in layers.items()
    ]
    return [*(name for name, expert in found if expert is None), *patterns]


def _arguments(**settings: Any) -> dict[str, Any]:
    """QuantizationArgs with every field spelled out, as llm-compressor writes them."""
    unset = dict.fromkeys(("actorder", "block_structure", "group_size", "observer", "scale_dtype", "zp_dtype"))
    return {**unset, "observer_kwargs": {}, "symmetric": True, **settings}


def _weight_arguments(scheme: WeightScheme) -> dict[str, Any]:
    is_block = scheme.strategy is Strategy.BLOCK
    return _arguments(
        block_structure=[FP8_BLOCK_SIZE, FP8_BLOCK_SIZE] if is_block else None,
        dynamic=False,
        group_size=scheme.group_size,
        num_bits=4 if scheme.type is WeightType.INT4 else 8,
        observer=_OBSERVERS[scheme.observer],
        strategy=str(scheme.strategy),
        type="int" if scheme.type is WeightType.INT4 else "float",
    )


def _activation_arguments(scheme: WeightScheme) -> dict[str, Any] | None:
    if scheme.type is WeightType.INT4:
        return None
    strategy, group_size = FP8_ACTIVATIONS[scheme.strategy]
    return _arguments(dynamic=True, group_size=group_size, num_bits=8, strategy=strategy, type="float")
