"""kernels/matmul.cpp as a loaded library: what it is compiled from, and the one function that it has."""

import ctypes
import struct
from enum import IntEnum
from pathlib import Path

from llama4_quant.native import compile_and_load
from llama4_quant.ops.native_program import kernel_program, task_function

SOURCES = (
    "matmul.cpp",
    "task.h",
    "instructions.h",
    "activations.h",
    "floats.h",
    "portable.h",
    "codes.h",
    "vectors.h",
    "matrix_unit.h",
    "unpack.h",
    "tiles.h",
    "fast.h",
)
_STATUS_MEMORY, _STATUS_ROWS = 1, 2


class Format(IntEnum):
    """How a weight is stored; as `enum Format` in task.h."""

    BF16 = 0
    INT4 = 1
    FP8 = 2
    INT8 = 3


_TASK = struct.Struct("@6P7q4i")
"""`struct Task` of task.h: addresses, sizes and strides, settings. Packing is quicker than a ctypes.Structure."""


class Library:
    """The loaded library. Calls release the GIL and may run at once from any number of threads.

    Attributes:
        path: where it lies.
        compiler: what compiled it: the first line of its --version.
        instructions: which of its variants runs on this machine.
        has_tiles: many rows go through a matrix unit.
    """

    def __init__(self, path: Path, compiler: str, functions: ctypes.CDLL) -> None:
        self.path = path
        self.compiler = compiler
        functions.llama4_quant_instructions.restype = ctypes.c_char_p
        self.instructions = str(functions.llama4_quant_instructions().decode())
        self.has_tiles = "AMX" in self.instructions
        self.function = task_function(functions, "matmul")

    def matmul(self, task: bytes, num_rows: int) -> None:
        """Run what `pack` gave for so many rows.

        Raises:
            MemoryError: no memory for the scratch space.
            ValueError: the experts' rows are not those of x.
        """
        status = self.function(task)
        if status == _STATUS_MEMORY:
            raise MemoryError("no memory for the scratch space of a matrix product")
        if status == _STATUS_ROWS:
            raise ValueError(f"rows_per_expert does not sum to the {num_rows} rows of x, or has a negative number")


def pack(addresses: tuple[int, ...], sizes: tuple[int, ...], settings: tuple[int, ...]) -> bytes:
    """A task, whose addresses and sizes are believed.

    Args:
        addresses: of x, counts, weight, scale, bias, y; 0 for none.
        sizes: rows, experts, outputs, inputs; bytes from one expert to the next of weight and of scale; groups.
        settings: format, type of the scale, whether it is of blocks, threads.
    """
    return _TASK.pack(*addresses, *sizes, *settings)


def build(march: str = "native") -> Library:
    """Compile the library, or take it from the cache.

    Args:
        march: as of `kernel_program`.

    Raises:
        NativeUnavailableError: no compiler, or it failed, or this machine is not little-endian.
    """
    return compile_and_load(
        kernel_program("matmul", SOURCES, march),
        lambda compiled: Library(compiled.path, compiled.compiler, compiled.functions),
    )
