"""CRC-32 of bytes that were written in pieces, in any order: the checksums of the pieces are combined.

A CRC-32 is the remainder of a polynomial over GF(2). Appending n zero bytes multiplies it by x^(8n), so the checksum
of A followed by B is crc(A) * x^(8 len(B)) + crc(B), as zlib's `crc32_combine` computes it. Polynomials are stored as
zlib stores them: bit 31 is the coefficient of x^0.
"""

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X = 1 << 30


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of all parts one after another.

    Args:
        parts: (CRC-32, number of bytes) of each.
    """
    whole = 0
    for crc, nbytes in parts:
        whole = _multiply(_shift(nbytes), whole) ^ crc
    return whole


@lru_cache(maxsize=1024)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial: by squaring, one step for each binary digit."""
    power, square, exponent = _ONE, _X, 8 * nbytes
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square, exponent = _multiply(square, square), exponent >> 1
    return power


def _multiply(left: int, right: int) -> int:
    """Product modulo the polynomial."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
    return product
