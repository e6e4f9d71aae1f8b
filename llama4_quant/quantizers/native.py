"""kernels.cpp as a loaded library (see llama4_quant/native.py)."""

import ctypes
from pathlib import Path

from llama4_quant.native import NativeUnavailableError, Program, compile_and_load

__all__ = ["Job", "Library", "NativeUnavailableError", "build"]

PROGRAM = Program(
    name="kernels",
    package="llama4_quant.quantizers",
    sources=("kernels.cpp", "kernels.h", "solver.h"),
    flags=("-march=native", "-ffp-contract=off"),  # contraction would change results
)


class Job(ctypes.Structure):
    """One weight for the library; fields as `struct Job` in kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "codes", "scale", "row_error", "row_weight", "factors")),
        *((name, ctypes.c_int64) for name in ("num_factors", "rows", "columns", "row_stride", "column_stride")),
        ("group_size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("source", "grid", "is_block")),
    )


class Block(ctypes.Structure):
    """Some columns of a weight for the loops of calibration; fields as `struct Block` in solver.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "target", "scale", "codes", "error", "cost")),
        *((name, ctypes.c_void_p) for name in ("feed", "curvature")),
        *((name, ctypes.c_int64) for name in ("columns", "stride", "first", "last")),
        ("grid", ctypes.c_int32),
    )


class Library:
    """The loaded library. Calls release the GIL and may run at once from any number of threads.

    Attributes:
        path: where it lies.
        compiler: what compiled it: the first line of its --version.
        fix_block, descend_block, search: as in solver.h; called by solver.py.
    """

    def __init__(self, path: Path, compiler: str, functions: ctypes.CDLL) -> None:
        self.path = path
        self.compiler = compiler
        self._quantize = functions.llama4_quant_quantize
        self._quantize.argtypes = (ctypes.POINTER(Job),)
        self._quantize.restype = ctypes.c_int32
        self.fix_block = functions.llama4_quant_fix_block
        self.descend_block = functions.llama4_quant_descend_block
        for function in (self.fix_block, self.descend_block):
            function.argtypes, function.restype = (ctypes.POINTER(Block),), None
        self.search = functions.llama4_quant_search
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.search.argtypes = (pointer, pointer, pointer, size, pointer, pointer, size, size, size, ctypes.c_int32)
        self.search.restype = None

    def quantize(self, job: Job) -> int:
        """Run `job`: 0 is done, 1 NaN or Inf in the weight, 2 out of memory."""
        return int(self._quantize(ctypes.byref(job)))


def build() -> Library:
    """Compile the library, or take it from the cache.

    Raises:
        NativeUnavailableError: no compiler, or it failed, or this machine is not little-endian.
    """
    return compile_and_load(PROGRAM, lambda compiled: Library(compiled.path, compiled.compiler, compiled.functions))
