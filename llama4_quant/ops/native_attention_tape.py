"""Storing a token's keys and values, and attention of its queries to the cache, on a tape (native_tape.py).

Where the cache has room for the token and how many columns it holds changes from token to token: `point` says it.

Shape letters: D head dimension, G key-value heads, R query heads that share keys, S columns.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama4_quant.ops.native_attention import FORMATS, library, pack_pieces, pack_task
from llama4_quant.ops.native_tape import Tape

_STORE = struct.Struct("@6P4qi2f")
"""`struct StoreTask` of attention.cpp."""


class Stored(Protocol):
    """Keys or values in a cache: codes [1, G, S, D], and scales [1, G, S, 1] where each token has one."""

    @property
    def codes(self) -> Tensor: ...

    @property
    def scales(self) -> Tensor | None: ...


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
        self.output = tape.buffer(*q_1GRD.shape)
        kernels = library()
        self._store = tape.call(kernels.store, bytes(_STORE.size))
        self._buffer = ctypes.create_string_buffer(0)
        self._attend = tape.call(kernels.attention, self._task(0))

    def point(self, key_slot: Stored, value_slot: Stored, pieces: Sequence[tuple[int, Stored, Stored]]) -> None:
        """Say where the next run works.

        Args:
            key_slot: where the token's keys go, S = 1.
            value_slot: likewise.
            pieces: first column, keys and values of all that the token sees, itself included.
        """
        slots = (key_slot.codes, value_slot.codes, key_slot.scales, value_slot.scales)
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in slots)
        _STORE.pack_into(
            self._store,
            0,
            *(self._k.data_ptr(), self._v.data_ptr(), *addresses),
            *self._k.shape[1:],
            key_slot.codes.stride(1) * key_slot.codes.element_size(),
            0 if key_slot.scales is None else key_slot.scales.stride(1),
            FORMATS[self._stored],
            *self._scales,
        )
        packed = pack_pieces(
            [keys.codes for _, keys, _ in pieces],
            [values.codes for _, _, values in pieces],
            [keys.scales for _, keys, _ in pieces if keys.scales is not None],
            [values.scales for _, _, values in pieces if values.scales is not None],
        )
        if len(packed) != len(self._buffer):
            self._buffer = ctypes.create_string_buffer(len(packed))
        ctypes.memmove(self._buffer, packed, len(packed))
        task = self._task(len(pieces))
        ctypes.memmove(self._attend, task, len(task))

    def _task(self, num_pieces: int) -> bytes:
        pieces = (ctypes.addressof(self._buffer), num_pieces)
        return pack_task(self._q, self.output, None, pieces=pieces, stored=self._stored, scales=self._scales)
