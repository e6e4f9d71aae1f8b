"""A conversion on the command line whose items take a while; started by the tests as a process of its own.

python driver.py run SOURCE OUT SECONDS_PER_ITEM [CONVERT ARGUMENT...]
"""

import fcntl
import os
import signal
import sys
import time

import torch

from llama4_quant.cli.main import main
from llama4_quant.conversion import ranks
from llama4_quant.conversion.run import Conversion

BLIND = "LLAMA4_QUANT_TEST_BLIND"
"""Environment variable of a process that sees no locks of others, as on a file system that does not pass them on."""


def slow_down(seconds: float) -> None:
    """Let every item take longer."""
    do = Conversion._do

    def slow(self: Conversion, item: object, buffer: torch.Tensor) -> None:
        time.sleep(seconds)
        do(self, item, buffer)

    Conversion._do = slow


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get(BLIND):
        fcntl.flock = lambda *_: None
    ranks.SECONDS_FOR_A_FILE_TO_APPEAR = 3.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    _, source, out, seconds, *rest = sys.argv[1:]
    slow_down(float(seconds))
    sys.argv = ["llama4-quant", "convert", source, "-o", out, *rest]
    main()
