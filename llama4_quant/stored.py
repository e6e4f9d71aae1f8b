"""What a checkpoint on disk holds: BF16 or quantized, every weight with the tensors that store it.

This is the plan's mirror image: a plan says what will be written, this says what was. The loader fills a model from
it, and `inspect` prints it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from llama4_quant.architecture import LinearSpec, Llama4Config, Role, TensorSpec, attention_names, tensor_specs
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.reader import CheckpointReader, TensorEntry
from llama4_quant.errors import CheckpointError, ConfigError, some_tensors
from llama4_quant.formats import compressed_tensors
from llama4_quant.scheme import SchemeLookup, WeightScheme

CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")
"""Scales of a quantized KV cache or attention, which some checkpoints carry. Those that `cache_scale_names` does not
name are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeight:
    """One weight as it lies on disk.

    Attributes:
        name: module name of a linear weight, tensor name of anything else.
        shape: [out, in] for linear weights.
        scheme: how it is quantized; None if it is not.
        linear: which linear weight it is, if it is one.
        tensors: names of the tensors that hold it, and it alone.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    scheme: WeightScheme | None
    linear: LinearSpec | None
    tensors: tuple[str, ...]

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def quantized_weights(config: Llama4Config, entries: Mapping[str, TensorEntry]) -> tuple[StoredWeight, ...]:
    """All weights of a compressed-tensors checkpoint, in order of the model.

    Raises:
        ConfigError: a quantization_config that is not supported.
        CheckpointError: a tensor is missing, has another shape or dtype than config.json says, or is not the model's.
    """
    section = quantization_section(config)
    assert section is not None
    parsed = compressed_tensors.parse_quantization_config(section)
    weights = tuple(weight for spec in tensor_specs(config) for weight in _weights_of(spec, parsed.scheme_of, entries))
    known = {name for weight in weights for name in weight.tensors}
    unknown = [name for name in entries if name not in known and not name.endswith(CACHE_SCALES)]
    if unknown:
        raise CheckpointError(f"{some_tensors(unknown)} in the checkpoint, but not part of the model in config.json")
    return weights


def cache_scale_names(config: Llama4Config, entries: Mapping[str, TensorEntry]) -> tuple[tuple[str, str], ...]:
    """By decoder layer, the tensors with the scales of its FP8 keys and values; none without such a KV cache.

    Raises:
        ConfigError: a quantization_config that is not supported.
        CheckpointError: a scale is missing, or is not one number.
    """
    section = quantization_section(config)
    if section is None or not compressed_tensors.parse_quantization_config(section).fp8_cache:
        return ()
    names = [compressed_tensors.cache_scale_tensors(name) for name in attention_names(config)]
    for output in (output for pair in names for output in pair):
        found = entries.get(output.name)
        _check_floats(output.name, () if found is not None and not found.shape else output.shape, entries)
    return tuple((key.name, value.name) for key, value in names)


def read_cache_scale(reader: CheckpointReader, name: str) -> float:
    """One of the scales of `cache_scale_names`.

    Raises:
        CheckpointError: not a finite number over 0.
    """
    scale = float(reader.read(name).float().sum())  # of one element
    if not 0 < scale < math.inf:
        raise CheckpointError(f"{name}: the scale of a KV cache is {scale}, expected a finite number over 0")
    return scale


def quantization_section(config: Llama4Config) -> Mapping[str, object] | None:
    """`quantization_config` of config.json, or None for a checkpoint that is not quantized.

    Raises:
        ConfigError: it is no object.
    """
    found = config.quantization
    if found and not isinstance(found, Mapping):
        raise ConfigError(f"config.json: quantization_config is {shown(found)}, expected an object")
    return found or None


def _weights_of(
    spec: TensorSpec, scheme_of: SchemeLookup, entries: Mapping[str, TensorEntry]
) -> Iterator[StoredWeight]:
    for linear in spec.linears:
        scheme = scheme_of(linear.name)
        shape = (linear.out_features, linear.in_features)
        yield StoredWeight(
            name=linear.name,
            role=linear.role,
            shape=shape,
            scheme=scheme,
            linear=linear,
            tensors=_linear_tensors(linear.name, shape, scheme, entries),
        )
    if not spec.linears:
        _check_floats(spec.name, spec.shape, entries)
        yield StoredWeight(
            name=spec.name, role=spec.role, shape=spec.shape, scheme=None, linear=None, tensors=(spec.name,)
        )


def _linear_tensors(
    name: str, shape: tuple[int, int], scheme: WeightScheme | None, entries: Mapping[str, TensorEntry]
) -> tuple[str, ...]:
    """Names of the tensors of a linear weight, checked."""
    if scheme is None:
        _check_floats(f"{name}.weight", shape, entries)
        return (f"{name}.weight",)
    scheme.check_divides(name, shape[1])
    expected = compressed_tensors.output_tensors(name, shape, scheme)
    for tensor in expected:
        if tensor.name.endswith(".weight_scale"):
            _check_floats(tensor.name, tensor.shape, entries)
        else:
            _check(tensor.name, tensor.shape, (tensor.dtype,), entries)
    return tuple(tensor.name for tensor in expected)


def _check_floats(name: str, shape: Sequence[int], entries: Mapping[str, TensorEntry]) -> None:
    _check(name, shape, (torch.bfloat16, torch.float16, torch.float32), entries)


def _check(name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], entries: Mapping[str, TensorEntry]) -> None:
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(
            f"tensor {name} is missing from the checkpoint, but config.json (with its quantization_config) asks for it"
        )
    if tuple(entry.shape) != tuple(shape) or entry.torch_dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"{name}: {entry.dtype} {list(entry.shape)} in {entry.path.name}, but config.json (with its "
            f"quantization_config) asks for {wanted} {list(shape)}"
        )
