"""Moving bytes between files and tensors without a copy in between.

Positioned reads and writes on a descriptor are thread-safe and, unlike a memory map, never count the file as the
process's own memory.
"""

import os

import torch

MAX_CALL_BYTES = 2**30
"""Linux moves at most 2 GiB - 4 KiB in one call."""


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes; no copy."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_into(fd: int, view: memoryview, start: int) -> int:
    """Fill `view` from byte `start` of the file; returns how many bytes were there, fewer only at the file's end."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done : done + MAX_CALL_BYTES]], start + done)
        if count == 0:
            break
        done += count
    return done


def write_from(fd: int, view: memoryview, start: int) -> None:
    """Write all of `view` at byte `start` of the file."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + MAX_CALL_BYTES], start + done)
