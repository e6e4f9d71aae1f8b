"""Carrying out work items: read, quantize, measure, write, note. What is noted is enough to report later."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from llama4_quant.checkpoint.buffers import PAGE_BYTES
from llama4_quant.checkpoint.journal import WrittenRange
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.conversion.report import WeightRecord, weight_record
from llama4_quant.conversion.workers import Workers
from llama4_quant.errors import OutputError
from llama4_quant.formats.compressed_tensors import EncodedRows
from llama4_quant.notes import WeightNote
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.stream import Piece, Progress, encode_kept, encode_piece, quantize_piece, read_item, split_piece
from llama4_quant.work import MemoryUse, WorkItem, buffer_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Buffers:
    """What a worker reuses from item to item, since fresh memory costs as much time as quantizing into it.

    Attributes:
        source: uint8, for the source bytes of an item.
        codes: uint8, for the codes of one weight, and a page to move them in.
    """

    source: torch.Tensor
    codes: torch.Tensor


class Conversion:
    """One plan on its way from a reader to a writer."""

    def __init__(self, plan: Plan, reader: CheckpointReader, writer: CheckpointWriter, backend: Backend) -> None:
        self._plan = plan
        self._backend = backend
        self._reader = reader
        self._writer = writer

    def run(
        self,
        items: Sequence[WorkItem],
        left: Sequence[WorkItem],
        mine: Sequence[WorkItem],
        memory: MemoryUse,
        progress: Progress | None,
    ) -> None:
        """Do some of the items.

        Args:
            items: all items of the plan.
            left: those that this process, here or later, has to do.
            mine: those to do here.
            memory: how many workers may work at a time.
            progress: told of each item; those that are not left count as done from the start.

        Raises:
            Llama4QuantError: an item failed; those that were in hand beside it are finished and noted.
        """
        told = progress or (lambda _what, _num_bytes: None)
        total = sum(item.num_bytes for item in items)
        told("", total - sum(item.num_bytes for item in left))
        if mine:
            sizes = buffer_sizes(self._plan, mine, self._backend)
            workers = Workers(mine, self._do, num_workers=memory.num_workers, new_buffers=lambda: _new_buffers(*sizes))
            with closing(workers.run(self._writer.sync, self._reader.stop_waiting)) as finished:
                for item in finished:
                    told(self._plan.tensors[item.tensor].spec.name, item.num_bytes)
        self._writer.sync()

    def weight_records(self, items: Sequence[WorkItem]) -> tuple[WeightRecord, ...]:
        """A record for every weight, from the journals; all items must be finished.

        Raises:
            OutputError: a journal does not hold what a conversion writes.
        """
        try:
            return self._weight_records(items)
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as problem:
            raise OutputError(
                f"{self._writer.out}: the journal of this conversion is damaged ({shown(problem)}); give --resume "
                "never to delete what is there and start anew"
            ) from problem

    def _weight_records(self, items: Sequence[WorkItem]) -> tuple[WeightRecord, ...]:
        records = self._writer.records()
        merged: dict[str, WeightNote] = {}
        for item in items:  # in order, so that sums of floats do not depend on who was first
            for content in records[item.id].notes:
                done = WeightNote.from_json(content)
                earlier = merged.get(done.weight)
                merged[done.weight] = done if earlier is None else earlier.merge(done)
        return tuple(weight_record(decision, merged.get(decision.name)) for decision in self._plan.decisions)

    def _do(self, item: WorkItem, buffers: _Buffers) -> None:
        ranges: list[WrittenRange] = []
        done: dict[str, WeightNote] = {}
        for piece in read_item(self._reader, self._plan.tensors[item.tensor], item, buffers.source):
            for part in split_piece(piece):
                if part.decision.scheme is None:
                    ranges.append(self._write(encode_kept(part)))
                    continue
                quantized = self._quantize(part, buffers.codes, ranges)
                earlier = done.get(quantized.weight)
                done[quantized.weight] = quantized if earlier is None else earlier.merge(quantized)
        self._writer.record(item.id, ranges, [quantized.to_json() for quantized in done.values()])

    def _quantize(self, piece: Piece, codes: torch.Tensor, ranges: list[WrittenRange]) -> WeightNote:
        out = _at_page_offset(codes, self._writer.position(piece.decision.outputs[0].name, piece.row_start))
        started = time.perf_counter()
        quantized = quantize_piece(piece, self._backend, out)
        seconds = time.perf_counter() - started
        ranges += [self._write(rows) for rows in encode_piece(piece, quantized)]
        return WeightNote(weight=piece.decision.name, error=quantized.error, seconds=seconds)

    def _write(self, rows: EncodedRows) -> WrittenRange:
        return self._writer.write(rows.name, rows.values, rows.row_start)


def _at_page_offset(buffer: torch.Tensor, position: int) -> torch.Tensor:
    """The part of a buffer that begins as far into a page of memory as `position` lies in a page of its file."""
    return buffer[(position - buffer.data_ptr()) % PAGE_BYTES :]


def _new_buffers(source_bytes: int, codes_bytes: int) -> _Buffers:
    return _Buffers(
        source=torch.empty(source_bytes, dtype=torch.uint8), codes=torch.empty(codes_bytes, dtype=torch.uint8)
    )
