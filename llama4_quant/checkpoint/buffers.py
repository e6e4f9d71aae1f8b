"""Moving bytes between files and tensors without a copy in between.

Positioned reads and writes on a descriptor are thread-safe and, unlike a memory map, never count the file as the
process's own memory.
"""

import ctypes
import errno
import os
from contextlib import suppress

import torch

MAX_CALL_BYTES = 2**30
"""Linux moves at most 2 GiB - 4 KiB in one call."""
PAGE_BYTES = 4096
"""What direct writes go by: positions and sizes are multiples of it, addresses of a sector."""
_SECTOR_BYTES = 512


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


def read_ahead(fd: int, start: int, nbytes: int) -> None:
    """Have the kernel read a range of the file into its cache, without waiting for it."""
    if nbytes and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # advice: a file system may not know it
            os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_WILLNEED)


def write_from(fd: int, view: memoryview, start: int) -> None:
    """Write all of `view` at byte `start` of the file."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + MAX_CALL_BYTES], start + done)


def write_direct(fd: int, view: memoryview, start: int) -> tuple[int, int]:
    """Write the whole pages within `view`, at byte `start` of a file opened with O_DIRECT: past the kernel's cache.

    Returns:
        Which bytes of `view` were written, from and to. Nothing (0, 0) where there is no whole page, the memory does
        not lie as the file does (see PAGE_BYTES), or the file system refuses.
    """
    first = -start % PAGE_BYTES
    last = first + (len(view) - first) // PAGE_BYTES * PAGE_BYTES
    if last <= first or view.readonly or _address(view[first:]) % _SECTOR_BYTES:
        return 0, 0
    done = first
    while done < last:
        try:
            done += os.pwrite(fd, view[done : min(done + MAX_CALL_BYTES, last)], start + done)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            break
        if (done - first) % PAGE_BYTES:
            break  # cut short: what is left cannot go on from here
    return first, done


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
