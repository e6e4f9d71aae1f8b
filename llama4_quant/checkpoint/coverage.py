"""Which bytes of every output tensor have been written: a checkpoint with a forgotten tensor would look finished."""

import threading
from collections.abc import Mapping


class Coverage:
    """Written byte ranges by tensor; thread-safe. Writing a range twice is allowed."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Args: sizes: bytes of each tensor, by name."""
        self._sizes = dict(sizes)
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, stop: int) -> None:
        """Record that bytes `start` to `stop` (exclusive) of the tensor are written."""
        with self._lock:
            self._ranges[name] = _merged([*self._ranges[name], (start, stop)])

    def missing(self) -> dict[str, int]:
        """Number of bytes not written, for each tensor that lacks any."""
        with self._lock:
            written = {name: sum(stop - start for start, stop in ranges) for name, ranges in self._ranges.items()}
        return {name: size - written[name] for name, size in self._sizes.items() if written[name] < size}


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
