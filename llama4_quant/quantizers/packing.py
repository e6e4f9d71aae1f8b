"""Eight int4 codes in an int32, as compressed-tensors stores them.

Element j of a word is `code + 8` at bits 4j..4j+3, elements in ascending order of the input dimension: low nibble
first. When 8 does not divide the number of codes, the unused high bits of the last word are zero.
"""

import sys

import torch
from torch import Tensor

from llama4_quant.errors import QuantizationError
from llama4_quant.quantizers.int4 import INT4_MAX, INT4_MIN
from llama4_quant.quantizers.lanes import row_chunks

CODES_PER_WORD = 8


def packed_features(in_features: int) -> int:
    """Number of int32 words that hold `in_features` codes."""
    return -(-in_features // CODES_PER_WORD)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes -8..7 of shape [..., K] to int32 [..., ceil(K/8)].

    Raises:
        QuantizationError: a code outside -8..7, or not int8.
    """
    if codes.dtype is not torch.int8:
        raise QuantizationError(f"int4 codes to pack must be int8, found {str(codes.dtype).removeprefix('torch.')}")
    in_features = codes.shape[-1]
    flat = codes.reshape(-1, in_features)
    packed = torch.empty(flat.shape[0], packed_features(in_features), dtype=torch.int32, device=codes.device)
    for rows in row_chunks(flat.shape[0], max(in_features, 1)):
        packed[rows] = _pack_rows(flat[rows])
    return packed.view(*codes.shape[:-1], packed.shape[-1])


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """Unpack int32 [..., ceil(K/8)] to int8 codes -8..7 of shape [..., K]; the inverse of `pack_int4`.

    Raises:
        QuantizationError: not int32, or not ceil(in_features/8) words in a row.
    """
    if packed.dtype is not torch.int32 or packed.shape[-1] != packed_features(in_features):
        raise QuantizationError(
            f"packed int4 weight of {in_features} inputs: expected int32 [..., {packed_features(in_features)}], "
            f"found {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}"
        )
    flat = packed.reshape(-1, packed.shape[-1])
    codes = torch.empty(flat.shape[0], in_features, dtype=torch.int8, device=packed.device)
    for rows in row_chunks(flat.shape[0], max(in_features, 1)):
        codes[rows] = _unpack_rows(flat[rows])[:, :in_features]
    return codes.view(*packed.shape[:-1], in_features)


def _pack_rows(codes_RK: Tensor) -> Tensor:
    _check_range(codes_RK)
    num_rows, in_features = codes_RK.shape
    # Adding 8 makes nibbles of the codes; the padding is added after it, so that it is zero bits and not code 0.
    nibbles = torch.zeros(
        num_rows, packed_features(in_features) * CODES_PER_WORD, dtype=torch.int8, device=codes_RK.device
    )
    torch.add(codes_RK, -INT4_MIN, out=nibbles[:, :in_features])
    # Two bytes 0x0h 0x0l, read as one little-endian int16 0x0h0l, become the byte 0xhl.
    pairs = nibbles.view(torch.int16)
    return ((pairs >> 4) | pairs).to(torch.uint8).view(torch.int32)


def _unpack_rows(packed_RW: Tensor) -> Tensor:
    # The byte 0xhl becomes the little-endian int16 0x0h0l: two bytes 0x0l 0x0h.
    assert sys.byteorder == "little"
    pairs = packed_RW.contiguous().view(torch.uint8).to(torch.int16)
    return ((pairs << 4) | pairs).bitwise_and_(0x0F0F).view(torch.int8).add_(INT4_MIN)


def _check_range(codes: Tensor) -> None:
    assert sys.byteorder == "little"
    if codes.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(codes))
    if low < INT4_MIN or high > INT4_MAX:
        raise QuantizationError(f"int4 codes must lie in {INT4_MIN}..{INT4_MAX}, found {low}..{high}")
