"""What the C++ libraries of kernels/ have in common: how they are compiled, and that there may be none."""

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

from llama4_quant.native import NativeUnavailableError, Program

Library = TypeVar("Library")


def kernel_program(name: str, sources: tuple[str, ...], march: str, *flags: str) -> Program:
    """A source of kernels/ that works with threads.

    Args:
        name: of the library.
        sources: file names; the first is compiled, and includes the others.
        march: the processor to compile for, as the compiler's `-march`, and after a space each, other flags without
            their `-m`, as in "native no-amx-bf16": they decide which variant runs.
        flags: more of the compiler's.
    """
    machine = (f"-m{part}" for part in f"arch={march}".split())
    return Program(
        name=name,
        package="llama4_quant.ops.kernels",
        sources=sources,
        flags=("-fopenmp", "-fno-strict-aliasing", *flags, *machine),
    )


def task_function(functions: ctypes.CDLL, name: str) -> Any:
    """`llama4_quant_<name>` of a library: takes a packed struct, gives a status, 0 for done."""
    function = getattr(functions, f"llama4_quant_{name}")
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int32
    return function


def built_or_reason(build: Callable[[], Library]) -> Library | str:
    """What `build` gives, or why it is unavailable; to be called once for a process and kept."""
    try:
        return build()
    except NativeUnavailableError as error:
        return str(error)


def reason_of(found: object) -> str | None:
    """Why there is no library, of what `built_or_reason` gave; None if there is one."""
    return found if isinstance(found, str) else None


def required(found: Library | str) -> Library:
    """The library of what `built_or_reason` gave.

    Raises:
        RuntimeError: there is none; says why.
    """
    if isinstance(found, str):
        raise RuntimeError(f"no compiled kernels: {found}")  # noqa: TRY004
    return found
