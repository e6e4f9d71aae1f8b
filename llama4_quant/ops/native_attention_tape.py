"""Storing a token's keys and values, and attention of its queries to the cache, on a tape (native_tape.py).

Where the cache has room for the token and how many columns it holds changes from token to token: `point` says it.

Shape letters: D head dimension, G key-value heads, R query heads that share keys, S columns.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_quant.ops.native_attention import FORMATS, PIECE_BYTES, Piece, library, pack_pieces, pack_task
from llama4_quant.ops.native_tape import Tape

_STORE = struct.Struct("@6P4qi2f")
"""`struct StoreTask` of attention.cpp."""


class RecordedAttention:
    """Two calls on a tape, for one layer.

    Attributes:
        output: [1, G, R, D], a buffer of the tape.
    """

    def __init__(
        self,
        tape: Tape,
        q_1GRD: Tensor,
        k_1GD: Tensor,
        v_1GD: Tensor,
        *,
        stored: torch.dtype,
        scales: tuple[float, float],
    ) -> None:
        """Record.

        Args:
            tape: to add to.
            q_1GRD: the token's queries, a buffer; as are its keys and values.
            k_1GD: [1, G, D].
            v_1GD: [1, G, D].
            stored: dtype of the cache.
            scales: of all its keys, and of all values, where tokens have none of their own.
        """
        self._q, self._k, self._v, self._stored, self._scales = q_1GRD, k_1GD, v_1GD, stored, scales
        self._column_bytes = k_1GD.shape[-1] * stored.itemsize
        self.output = tape.buffer(*q_1GRD.shape)
        kernels = library()
        self._store = tape.call(kernels.store, bytes(_STORE.size))
        self._pieces = ctypes.create_string_buffer(0)
        self._attend = tape.call(kernels.attention, self._task(0))

    def point(self, pieces: Sequence[Piece]) -> None:
        """Say where the next run works: the pieces that the token sees; it goes into the last column of the last."""
        if len(self._pieces) != len(pieces) * PIECE_BYTES:
            self._pieces = ctypes.create_string_buffer(len(pieces) * PIECE_BYTES)
        packed = pack_pieces(pieces)
        ctypes.memmove(self._pieces, packed, len(packed))
        task = self._task(len(pieces))
        ctypes.memmove(self._attend, task, len(task))
        last = pieces[-1]
        _STORE.pack_into(
            self._store,
            0,
            *(self._k.data_ptr(), self._v.data_ptr(), *last.addresses_at(last.columns - 1, self._column_bytes)),
            *(*self._k.shape[1:], last.group_stride, last.scale_group_stride),
            *(FORMATS[self._stored], *self._scales),
        )

    def _task(self, num_pieces: int) -> bytes:
        pieces = (ctypes.addressof(self._pieces), num_pieces)
        return pack_task(self._q, self.output, None, pieces=pieces, stored=self._stored, scales=self._scales)
