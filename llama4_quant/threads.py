"""How long threads wait for each other before they sleep: decided before torch loads its OpenMP library.

A decoding step is a hundred products of a tenth of a millisecond, each shared by all threads. A thread that has done
its part waits for the others, and for the next product, in a loop (libgomp: 300,000 turns). On an idle machine that is
right. Where another process takes one of the cores for a moment, a waiting thread burns the very time slice that the
thread it waits for needs, and every product takes as long as the scheduler takes to notice: decoding is several times
slower than its share of the machine would make it (tests/benchmarks/busy.py). A tenth of that patience still outlasts
the pauses between products, and halves what a busy neighbour costs.
"""

import os
import sys

SPINS = 30_000
"""Turns of libgomp's loop."""


def limit_waiting() -> None:
    """Set it, unless the user has said how to wait, or torch was imported before and has read its settings."""
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
