"""A decoding step as a tape: calls of compiled kernels that run one after another without Python in between.

After a product has streamed tens of megabytes through the caches, every line of Python starts cold, and a layer needs
some fifteen calls. A tape has them packed before; per token a few fields change (where the cache has room for the
token, and how many columns it holds), and one call runs all.

Buffers between calls belong to the tape, and calls see their addresses: what is in them is gone with the next run.
"""

import ctypes
import functools
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from llama4_quant.native import compile_and_load
from llama4_quant.ops.native_program import built_or_reason, kernel_program, reason_of, required, task_function

SOURCES = ("tape.cpp", "task.h")
_ROUTE = struct.Struct("@4P2q")
"""`struct RouteTask` of tape.cpp."""
Task = ctypes.Array[ctypes.c_char]
"""A packed struct with a fixed address, which `struct.pack_into` changes."""


class NotRecordableError(Exception):
    """A part of a model cannot go on a tape; the message says which and why."""


class TapeLibrary:
    """kernels/tape.cpp, loaded."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.run = functions.llama4_quant_run
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self.run.restype = ctypes.c_int32
        self.route = task_function(functions, "route")


def build(march: str = "native") -> TapeLibrary:
    """Compile the library, or take it from the cache.

    Args:
        march: as of `kernel_program`.

    Raises:
        NativeUnavailableError: no compiler, or it failed.
    """
    program = kernel_program("tape", SOURCES, march)
    return compile_and_load(program, lambda compiled: TapeLibrary(compiled.functions))


def probe() -> str | None:
    """Why there is no compiled code for tapes; None if there is. Compiles it on first use."""
    return reason_of(_library())


@functools.cache
def _library() -> TapeLibrary | str:
    return built_or_reason(build)


class Tape:
    """Calls in order, and the buffers between them.

    To be recorded and run in one thread at a time.
    """

    def __init__(self) -> None:
        """An empty tape.

        Raises:
            RuntimeError: there is no compiled code; `probe` says why.
        """
        self._run = required(_library()).run
        self._calls: list[tuple[int, Task]] = []
        self._commands: ctypes.Array[ctypes.c_void_p] | None = None
        self._kept: list[object] = []
        self._buffers: list[Tensor] = []
        self._free: list[Tensor] = []

    def buffer(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Room for what a call writes, until `reuse_buffers`; zeros at first."""
        found = next((b for b in self._free if b.shape == shape and b.dtype == dtype), None)
        if found is None:
            found = torch.zeros(shape, dtype=dtype)
            self._kept.append(found)
        else:
            self._free = [b for b in self._free if b is not found]
        self._buffers.append(found)
        return found

    def reuse_buffers(self) -> None:
        """Calls from here on need nothing of what those before wrote into buffers: these are given out again.

        Later layers so find them in a cache.
        """
        self._free += self._buffers
        self._buffers = []

    def call(self, function: object, task: bytes, kept: Iterable[object] = ()) -> Task:
        """Add a call.

        Args:
            function: of a library, with a task as its one argument and a status as its result.
            task: packed.
            kept: whose memory the task points to, other than buffers of the tape.

        Returns:
            The task in its place, where its fields may be changed between runs.
        """
        place = ctypes.create_string_buffer(task, len(task))
        address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
        assert address is not None
        self._calls.append((address, place))
        self._kept.extend(kept)
        self._commands = None
        return place

    def run(self) -> None:
        """Run all calls.

        Raises:
            MemoryError: no memory for the scratch space of a call.
        """
        if self._commands is None:
            words = [word for function, task in self._calls for word in (function, ctypes.addressof(task))]
            self._commands = (ctypes.c_void_p * len(words))(*words)
        if self._run(self._commands, len(self._calls)):
            raise MemoryError("no memory for the scratch space of a decoding step")


def record_route(tape: Tape, logits_1E: Tensor, x_1H: Tensor) -> tuple[Tensor, Tensor]:
    """The one expert of a token: rows per expert, int64 [E], and its input times its score, [1, H]."""
    num_experts, size = logits_1E.shape[-1], x_1H.shape[-1]
    counts, y = tape.buffer(num_experts, dtype=torch.int64), tape.buffer(1, size)
    addresses = (logits_1E.data_ptr(), x_1H.data_ptr(), counts.data_ptr(), y.data_ptr())
    tape.call(required(_library()).route, _ROUTE.pack(*addresses, num_experts, size))
    return counts, y
