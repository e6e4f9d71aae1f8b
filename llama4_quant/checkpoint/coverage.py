"""Which bytes of every output tensor have been written: a checkpoint with a forgotten tensor would look finished."""

import threading
from collections.abc import Iterator, Mapping

from llama4_quant.checkpoint.crc import combine
from llama4_quant.checkpoint.journal import WrittenRange
from llama4_quant.checkpoint.json_files import named
from llama4_quant.errors import OutputError


class Coverage:
    """Written byte ranges by tensor; thread-safe. The same range may be written again, and then the last one counts."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Args: sizes: bytes of each tensor, by name."""
        self._sizes = dict(sizes)
        self._ranges: dict[str, dict[int, WrittenRange]] = {name: {} for name in sizes}
        self._lock = threading.Lock()

    def add(self, part: WrittenRange) -> None:
        """Record that a range is written; an empty one changes nothing.

        Raises:
            OutputError: there is no such range.
        """
        if not 0 <= part.start <= part.stop <= self._sizes.get(part.name, -1):
            raise OutputError(
                f"{named(part.name)}: bytes {part.start:,} to {part.stop:,} are not part of the output; if this comes "
                "from an interrupted run, give --resume never to start anew"
            )
        if part.start < part.stop:
            with self._lock:
                self._ranges[part.name][part.start] = part

    def missing(self) -> dict[str, int]:
        """Number of bytes not written, for each tensor that lacks any.

        Raises:
            OutputError: two ranges overlap, so that it is not known whose bytes are there.
        """
        return {name: left for name, size in self._sizes.items() if (left := size - self._written(name))}

    def ranges(self, name: str) -> Iterator[WrittenRange]:
        """The ranges of one tensor, in order."""
        with self._lock:
            yield from [part for _, part in sorted(self._ranges[name].items())]

    def crc32(self, name: str) -> int:
        """CRC-32 of a tensor that is complete, from those of its ranges; each must have one."""
        checks = [(part.crc32, part.stop - part.start) for part in self.ranges(name)]
        return combine((crc, nbytes) for crc, nbytes in checks if crc is not None)

    def _written(self, name: str) -> int:
        written = end = 0
        for part in self.ranges(name):
            if part.start < end:
                raise OutputError(f"{name}: byte {part.start:,} was written by two different pieces of work")
            written, end = written + part.stop - part.start, part.stop
        return written
