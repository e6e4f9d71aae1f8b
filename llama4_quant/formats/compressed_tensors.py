"""Tensors of a compressed-tensors checkpoint, as llm-compressor writes and vLLM, SGLang and transformers read them.

A linear module `name` with a weight [N, K] (out, in) becomes

    INT4 (format pack-quantized)     name.weight_packed   int32  [N, ceil(K/8)]    eight codes + 8 to a word, low first
                                     name.weight_scale    bf16   [N, K/group] or [N, 1]
                                     name.weight_shape    int64  [2]               N, K
    FP8  (format float-quantized)    name.weight          e4m3fn [N, K]
                                     name.weight_scale    fp32   [N, 1] or [ceil(N/128), ceil(K/128)]

Scales of an FP8 KV cache, per attention module `name`:

                                     name.k_scale, name.v_scale    fp32   [1]

Always one 2-D weight per module, experts too. What the model's config.json says about it is written in
quantization_config.py and read in parsed_quantization.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.errors import CheckpointError
from llama4_quant.formats.parsed_quantization import ParsedQuantization, parse_quantization_config
from llama4_quant.formats.quantization_config import mixed_quantization_config, quantization_config
from llama4_quant.quantizers.lanes import rows_per_scale
from llama4_quant.quantizers.packed import PackedWeight
from llama4_quant.quantizers.packing import pack_int4, packed_features, unpack_int4
from llama4_quant.quantizers.quantize import QuantizedWeight, grid_of
from llama4_quant.scheme import WeightScheme, WeightType

__all__ = [
    "EncodedRows",
    "ParsedQuantization",
    "cache_scale_tensors",
    "decode",
    "encode",
    "encode_packed",
    "encode_rows",
    "mixed_quantization_config",
    "output_tensors",
    "parse_quantization_config",
    "quantization_config",
]

_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRows:
    """Rows `row_start` to `row_start + len(values)` (of dimension 0) of the stored tensor `name`."""

    name: str
    values: Tensor
    row_start: int


def output_tensors(name: str, shape: tuple[int, int], scheme: WeightScheme) -> tuple[OutputTensor, ...]:
    """The tensors that store a weight.

    Args:
        name: module name, without ".weight".
        shape: (out_features, in_features).
        scheme: how the weight is quantized.

    Raises:
        SchemeError: the group or block size does not divide in_features.
    """
    out_features, in_features = shape
    scheme.check_divides(name, in_features)
    scale = OutputTensor(
        name=f"{name}.weight_scale",
        dtype=grid_of(scheme).scale_dtype,
        shape=scheme.scale_shape(out_features, in_features),
    )
    if scheme.type is WeightType.FP8:
        return (OutputTensor(name=f"{name}.weight", dtype=torch.float8_e4m3fn, shape=shape), scale)
    packed = (out_features, packed_features(in_features))
    return (
        OutputTensor(name=f"{name}.weight_packed", dtype=torch.int32, shape=packed),
        scale,
        OutputTensor(name=f"{name}.weight_shape", dtype=torch.int64, shape=(2,)),
    )


def cache_scale_tensors(name: str) -> tuple[OutputTensor, OutputTensor]:
    """The scales of an FP8 KV cache of the attention module `name`: of its keys, of its values."""
    key, value = (OutputTensor(name=f"{name}.{kind}_scale", dtype=torch.float32, shape=(1,)) for kind in "kv")
    return key, value


def encode(name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a whole weight by name: those of `output_tensors`, with their values."""
    rows = encode_rows(name, quantized, row_start=0, out_features=quantized.shape[0])
    return {part.name: part.values for part in rows}


def encode_rows(name: str, quantized: QuantizedWeight, *, row_start: int, out_features: int) -> tuple[EncodedRows, ...]:
    """What some rows of a weight contribute to its stored tensors.

    The parts of all chunks of a weight fill every tensor of `output_tensors` exactly once; `weight_shape` comes with
    the first chunk.

    Args:
        name: module name of the whole weight.
        quantized: rows `row_start` to `row_start + R` of it, contiguous or not.
        row_start: a multiple of 128 for blocks, where a row of scales stands for 128 rows of weights.
        out_features: rows of the whole weight.
    """
    codes = quantized.codes
    stored = pack_int4(codes) if quantized.scheme.type is WeightType.INT4 else codes
    stored_scale = quantized.scale.to(grid_of(quantized.scheme).scale_dtype)
    return _rows(name, (stored, stored_scale), quantized.scheme, (row_start, out_features, quantized.shape))


def encode_packed(name: str, packed: PackedWeight, *, row_start: int, out_features: int) -> tuple[EncodedRows, ...]:
    """As `encode_rows`, for a weight whose codes are packed already."""
    return _rows(name, (packed.codes, packed.scale), packed.scheme, (row_start, out_features, packed.shape))


def _rows(
    name: str, stored: tuple[Tensor, Tensor], scheme: WeightScheme, place: tuple[int, int, tuple[int, int]]
) -> tuple[EncodedRows, ...]:
    """`stored` is codes and scale as they lie on disk; `place` first row, rows of the whole weight, and shape."""
    row_start, out_features, (num_rows, in_features) = place
    block = rows_per_scale(scheme)
    assert row_start % block == 0
    assert num_rows % block == 0 or row_start + num_rows == out_features
    codes, scales = (tensor.contiguous() for tensor in stored)
    scale = EncodedRows(name=f"{name}.weight_scale", values=scales, row_start=row_start // block)
    if scheme.type is WeightType.FP8:
        return (EncodedRows(name=f"{name}.weight", values=codes, row_start=row_start), scale)
    packed = EncodedRows(name=f"{name}.weight_packed", values=codes, row_start=row_start)
    if row_start > 0:
        return (packed, scale)
    shape = torch.tensor([out_features, in_features], dtype=torch.int64)
    return (packed, scale, EncodedRows(name=f"{name}.weight_shape", values=shape, row_start=0))


def decode(name: str, tensors: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
    """Rebuild a weight from its stored tensors; the inverse of `encode`.

    Args:
        name: module name.
        tensors: at least the tensors of `output_tensors`. Scales may have any float dtype (llm-compressor stores bf16
            for FP8): FP8 scales come out as float32, INT4 scales as they are.
        scheme: as `ParsedQuantization.scheme_of` gives it.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the scheme asks for.
        SchemeError: the group or block size does not divide in_features.
    """
    scale = _take(tensors, f"{name}.weight_scale", _SCALE_DTYPES)
    if scheme.type is WeightType.FP8:
        codes = _take(tensors, f"{name}.weight", (torch.float8_e4m3fn,))
        _check_shape(f"{name}.weight", codes, (codes.shape[0], codes.shape[-1]))
        scale = scale.to(torch.float32)
    else:
        codes = _decode_int4(name, tensors)
    out_features, in_features = codes.shape
    scheme.check_divides(name, in_features)
    _check_shape(f"{name}.weight_scale", scale, scheme.scale_shape(out_features, in_features))
    return QuantizedWeight(codes=codes, scale=scale, scheme=scheme)


def _decode_int4(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    stored_shape = _take(tensors, f"{name}.weight_shape", (torch.int64, torch.int32))
    _check_shape(f"{name}.weight_shape", stored_shape, (2,))
    out_features, in_features = (int(size) for size in stored_shape)
    packed = _take(tensors, f"{name}.weight_packed", (torch.int32,))
    _check_shape(f"{name}.weight_packed", packed, (out_features, packed_features(in_features)))
    return unpack_int4(packed, in_features)


def _take(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing, but quantization_config in config.json asks for it")
    if tensors[name].dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{name}: expected {expected}, found {str(tensors[name].dtype).removeprefix('torch.')}")
    return tensors[name]


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{name}: expected shape {list(expected)}, found {list(tensor.shape)}; quantization_config in config.json "
            f"does not fit this checkpoint"
        )
