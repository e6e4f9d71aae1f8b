"""One row with experts in the file: `python -m runtime_kit.worker_offload JOB.json RESULT.json`.

The job's "evict" names files that are to lie on the disk, not in the page cache: they are asked out of it again and
again while the model runs. Pages that the process has mapped stay.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from llama4_quant import load

from .loop import measure, read_job, write_result
from .worker_ours import Ours

INTERVAL = 0.02
"""Seconds between two requests."""


@contextmanager
def kept_out_of_the_page_cache(files: Sequence[Path]) -> Iterator[None]:
    """Files that are read inside come from the disk."""
    over = threading.Event()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]

    def evict() -> None:
        while not over.wait(INTERVAL):
            for descriptor in descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    evictor = threading.Thread(target=evict, daemon=True)
    evictor.start()
    try:
        yield
    finally:
        over.set()
        evictor.join()
        for descriptor in descriptors:
            os.close(descriptor)


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    model = load(job["model"], **job["load"])
    with kept_out_of_the_page_cache([Path(path) for path in job["evict"]]):
        found = measure(Ours(model, job["capacity"]), job)
    kernels = [str(kernel) for kernel in model.kernels()]
    write_result({"": found}, notes=kernels)


if __name__ == "__main__":
    main()
