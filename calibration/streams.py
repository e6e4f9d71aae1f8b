"""The hidden states of all calibration tokens, between two layers.

There are one or two streams: `quantized`, what the model computes with the weights stored so far, and `original`, what
the source computes. Each layer reads one generation of files and writes the next, and only when both are on the disk
does state.json say so: an interrupted run goes on with the layer that it was in.

Shape letters: H hidden, R rows.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llama4_quant.calibration import rows
from llama4_quant.calibration.records import LayerRecord
from llama4_quant.calibration.rows import MemoryRows, RowFile
from llama4_quant.checkpoint.files import os_errors, read_own, replace_durably
from llama4_quant.checkpoint.json_files import MAX_JSON_BYTES, parse_json

_STATE_NAME = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Where the tokens of each sample lie among all rows.

    Attributes:
        lengths: tokens of each sample, in order.
    """

    lengths: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Tokens of all samples."""
        return sum(self.lengths)

    def batches(self, max_rows: int) -> Iterator[tuple[slice, int]]:
        """Runs of samples of one length as (rows, length), of at most `max_rows` rows or one sample."""
        start, index = 0, 0
        while index < len(self.lengths):
            length, count = self.lengths[index], 1
            while (
                index + count < len(self.lengths)
                and self.lengths[index + count] == length
                and (count + 1) * length <= max_rows
            ):
                count += 1
            yield slice(start, start + count * length), length
            start, index = start + count * length, index + count


@dataclass(frozen=True, kw_only=True, slots=True)
class Streams:
    """Hidden states [R, H] in files; `original` is None where only the quantized model runs."""

    quantized: RowFile
    original: RowFile | None

    def both(self) -> Sequence[RowFile]:
        """Those that there are."""
        return [self.quantized] if self.original is None else [self.quantized, self.original]


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a calibration is: `records` are of the layers that are done."""

    records: tuple[LayerRecord, ...] = ()

    @property
    def layer(self) -> int:
        """The next layer."""
        return len(self.records)


class StreamFiles:
    """The files of a calibration.

    Attributes:
        folder: where they are.
        with_original: whether the original model runs beside the quantized one.
    """

    def __init__(self, folder: Path, num_rows: int, width: int, *, with_original: bool, device: torch.device) -> None:
        """Nothing is created before `open`."""
        self.folder = folder
        self._num_rows, self._width = num_rows, width
        self.with_original, self._device = with_original, device
        self._kept: dict[str, MemoryRows] = {}

    def position(self) -> Position | None:
        """Where an interrupted run was; None if it had not begun."""
        try:
            content = parse_json(read_own(self.folder / _STATE_NAME, MAX_JSON_BYTES), _STATE_NAME)
            records = tuple(LayerRecord.from_json(record) for record in content["records"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        is_whole = [record.layer for record in records] == list(range(len(records)))
        return Position(records=records) if is_whole else None

    def advance(self, position: Position) -> None:
        """Say durably that the streams in front of `position.layer` are complete."""
        data = json.dumps({"records": [asdict(record) for record in position.records]}).encode()
        with os_errors(f"{self.folder}: cannot be written", self.folder, len(data)):
            replace_durably(self.folder / _STATE_NAME, data)

    @contextmanager
    def open(self, layer: int) -> Iterator[Streams]:
        """The streams in front of a layer."""
        with ExitStack() as files:
            generation = layer % 2
            names = ["quantized", "original"] if self.with_original else ["quantized"]
            opened = [files.enter_context(self._stream(f"{name}-{generation}")) for name in names]
            yield Streams(quantized=opened[0], original=opened[1] if self.with_original else None)

    def scratch(self, name: str, width: int, num_rows: int | None = None) -> RowFile:
        """A file for something that lives within a layer; opened, not emptied."""
        wanted = self._num_rows if num_rows is None else num_rows
        kind = MemoryRows if self._fits(wanted, width) else RowFile
        return kind(self.folder / f"{name}.rows", wanted, width, self._device)

    def _stream(self, name: str) -> RowFile:
        """Hidden states; what is in memory stays there from layer to layer."""
        if name not in self._kept:
            opened = self.scratch(name, self._width)
            if not isinstance(opened, MemoryRows):
                return opened
            self._kept[name] = opened
        return self._kept[name]

    def _fits(self, num_rows: int, width: int) -> bool:
        """Whether rows may be in memory: of four files at the same time, in `best` of twice as many."""
        num_files = 8 if self.with_original else 4
        return num_files * num_rows * width * 4 <= rows.MEMORY_BYTES


def forget_position(folder: Path) -> None:
    """Let a calibration in `folder` begin anew."""
    (folder / _STATE_NAME).unlink(missing_ok=True)


def drift(streams: Streams) -> tuple[float | None, float | None]:
    """Relative error and SQNR (dB) of the quantized stream against the original one."""
    if streams.original is None:
        return None, None
    noise = signal = 0.0
    for part in streams.quantized.chunks():
        original_RH = streams.original.read(part).double()
        noise += float((streams.quantized.read(part).double() - original_RH).square().sum())
        signal += float(original_RH.square().sum())
    if not signal or not noise:
        return 0.0, None
    return math.sqrt(noise / signal), 10 * math.log10(signal / noise)
