"""Weights on their way through a calibration: read from the source, solved, stored, or read back if that is done.

A weight whose work items are in the journal is never solved again: after an interruption its stored bytes are read
back, and go on through the layer like those that were just made.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama4_quant.architecture import Role
from llama4_quant.calibration.equalize import Equalizer
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.records import CalibrationRecord
from llama4_quant.calibration.settings import SolverSettings
from llama4_quant.calibration.solve import Solver
from llama4_quant.calibration.source_weights import Pair, SourceWeights
from llama4_quant.checkpoint.journal import WrittenRange
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import QuantizationError
from llama4_quant.formats.compressed_tensors import decode, encode_packed
from llama4_quant.notes import WeightNote
from llama4_quant.planning.plan import Decision, Plan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.quantizers.packed import PackedWeight
from llama4_quant.quantizers.quantize import dequantize_weight
from llama4_quant.scheme import WeightScheme
from llama4_quant.work import WorkItem

KEPT_ROLES = (Role.NORM, Role.ROUTER, Role.BIAS)
"""Of the decoder's layers: they stay BF16, with factors that equalization moves into them."""
DECODER_ROLES = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ROUTED_EXPERT)
VISION_ROLES = (Role.VISION, Role.PROJECTOR)
"""Calibrated where the data has images."""
_NO_ROWS = "no token was routed here: rounded to nearest"
_FEW_ROWS = "few tokens for so many inputs: fitted to them together with other tokens of the layer, which count little"


def is_written(decision: Decision, settings: SolverSettings, *, with_images: bool) -> bool:
    """Whether the pass writes a weight; all others need no data, or there is none for them."""
    if decision.scheme is None:
        return settings.equalize and decision.role in KEPT_ROLES and decision.layer is not None
    return decision.role in (*DECODER_ROLES, Role.LM_HEAD, *(VISION_ROLES if with_images else ()))


class Weights(SourceWeights):
    """The weights of one conversion, by module name: those of the source, and what they are stored as."""

    def __init__(
        self,
        plan: Plan,
        items: Sequence[WorkItem],
        reader: CheckpointReader,
        writer: CheckpointWriter,
        backend: Backend,
        *,
        method: str,
        settings: SolverSettings,
        with_images: bool,
        device: torch.device,
    ) -> None:
        super().__init__(plan, reader, device)
        self._with_images = with_images
        self._writer, self._backend = writer, backend
        self._method, self._settings = method, settings
        self._items: dict[tuple[str, int | None], list[WorkItem]] = {}
        for item in items:
            self._items.setdefault((plan.tensors[item.tensor].spec.name, item.expert), []).append(item)
        self._finished = set(writer.records())
        self._equalizer = Equalizer(plan, self.scheme, reader) if settings.equalize else None

    def scheme(self, name: str) -> WeightScheme | None:
        """How a weight is stored; None as it is."""
        return self._decisions[name].scheme

    def original(self, name: str) -> Tensor:
        """A weight, norm or bias of the source, equalized, float32; [out, in] for linear weights."""
        values = self._read(name)
        return (values if self._equalizer is None else self._equalizer.factors(name).apply(values)).to(self.device)

    def keep(self, name: str) -> int:
        """Write a norm's gain, a bias or a router, which stay BF16, with the factors that were moved into them."""
        decision = self._decisions[name]
        items = self._kept_items(decision)
        if all(item.id in self._finished for item in items):
            return 0
        values = self.original(name).cpu().to(torch.bfloat16)
        if not bool(torch.isfinite(values).all()):
            raise QuantizationError(f"{name}: holds NaN or Inf; the checkpoint is damaged: download it again")
        self._record(items, [self._writer.write(decision.outputs[0].name, values)], [])
        return sum(item.num_bytes for item in items)

    def is_pending(self, names: Sequence[str]) -> bool:
        """Whether some of these weights still have to be quantized, which takes moments."""
        return any(item.id not in self._finished for item in self._items_of(names))

    def num_finished_layers(self, num_layers: int, *, of_vision: bool = False) -> int:
        """Layers from the first on, of the decoder or of the vision tower, of which nothing is left to do."""
        left = [
            decision.layer
            for name, decision in self._decisions.items()
            if decision.layer is not None
            and (decision.role in VISION_ROLES) == of_vision
            and self._is_written(decision)
            and self._is_left(name)
        ]
        return min(left, default=num_layers)

    def _is_written(self, decision: Decision) -> bool:
        return is_written(decision, self._settings, with_images=self._with_images)

    def _is_left(self, name: str) -> bool:
        kept = self._kept_items(self._decisions[name])
        return any(item.id not in self._finished for item in kept or self._items_of([name]))

    def _kept_items(self, decision: Decision) -> list[WorkItem]:
        """Work items of a weight that stays BF16 but is written by the pass; none of any other."""
        if decision.scheme is not None or not self._is_written(decision):
            return []
        return self._items[decision.linear.source if decision.linear else decision.name, None]

    def sync(self) -> None:
        """Bring to the disk what is finished."""
        self._writer.sync()

    def quantize(self, names: Sequence[str], moments: Moments, num_prior_rows: int = 0) -> tuple[dict[str, Pair], int]:
        """Quantize weights that share their inputs, and whose work items hold no other weights.

        Args:
            names: of the weights, in the order of the model.
            moments: of their inputs.
            num_prior_rows: how many of the rows stand for what is not known.

        Returns:
            The weights by name, and the source bytes that are done now.
        """
        items, todo = self._items_of(names), self._to_calibrate(names)
        if not self.is_pending(names):
            return {name: self._read_back(name) for name in names}, 0
        solver = self._solver(names[0], moments)
        pairs: dict[str, Pair] = {}
        ranges: list[WrittenRange] = []
        notes: list[dict[str, Any]] = []
        for name in names:
            original = self.original(name)
            if name not in todo:
                pairs[name] = Pair(original=original, stored=original)
                continue
            packed, note = self._solve(name, original, solver, moments, num_prior_rows)
            ranges += self._write(name, packed)
            notes.append(note.to_json())
            pairs[name] = Pair(original=original, stored=dequantize_weight(packed.unpack(), torch.float32))
        self._record(items, ranges, notes)
        return pairs, sum(item.num_bytes for item in items)

    def quantize_rows(self, name: str, moments: Moments) -> Iterator[int]:
        """Quantize a weight with many outputs, a work item's rows at a time.

        Args:
            name: of the weight.
            moments: of its inputs.

        Yields:
            The source bytes that are done now, after each item.
        """
        decision = self._decisions[name]
        assert decision.linear is not None
        solver = self._solver(name, moments)
        for item in self._items_of([name]):
            if item.id in self._finished:
                continue
            rows_NK = self._reader.read_rows(decision.linear.source, item.start, item.stop)
            packed, note = self._solve(name, rows_NK.to(self.device, torch.float32), solver, moments, 0)
            self._record([item], self._write(name, packed, item.start), [note.to_json()])
            yield item.num_bytes

    def _solver(self, name: str, moments: Moments) -> Solver | None:
        """What solves weights with these inputs; None without rows."""
        if not bool(torch.isfinite(moments.gram).all()):
            raise QuantizationError(
                f"{name}: its inputs grow beyond float32 on the calibration data, so that nothing can be fitted to "
                "them; is the checkpoint damaged?"
            )
        return Solver.of(moments, self._settings, self._backend.library) if moments.num_rows else None

    def _solve(
        self, name: str, original: Tensor, solver: Solver | None, moments: Moments, num_prior_rows: int
    ) -> tuple[PackedWeight, WeightNote]:
        scheme = self._decisions[name].scheme
        assert scheme is not None
        started = time.perf_counter()
        try:
            rounded = self._backend.quantize(original, scheme)
            if solver is None:
                packed = rounded
                record = CalibrationRecord(
                    method="rtn",
                    num_rows=0,
                    note=_NO_ROWS,
                )
            else:
                solved = solver.solve(original, scheme, rounded.unpack())
                packed = solved.packed
                record = CalibrationRecord(
                    method=self._method,
                    num_rows=moments.num_rows,
                    num_prior_rows=num_prior_rows,
                    damp_percent=solver.factored.damp_percent,
                    rounding_error=solved.rounding_error,
                    output_error=solved.output_error,
                    squared_outputs=solved.squared_outputs,
                    num_rounded=solved.num_rounded,
                    note=_FEW_ROWS if num_prior_rows else "",
                )
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
        seconds = time.perf_counter() - started
        return packed, WeightNote(
            weight=name, error=packed.error, seconds=seconds, calibration=dataclasses.asdict(record)
        )

    def _write(self, name: str, packed: PackedWeight, row_start: int = 0) -> list[WrittenRange]:
        rows = encode_packed(name, packed, row_start=row_start, out_features=self._decisions[name].shape[0])
        return [self._writer.write(part.name, part.values, part.row_start) for part in rows]

    def _record(self, items: Sequence[WorkItem], ranges: list[WrittenRange], notes: list[dict[str, Any]]) -> None:
        """All ranges and notes go with the last item, after which the weights count as finished."""
        for item in items[:-1]:
            self._writer.record(item.id, [], [])
        self._writer.record(items[-1].id, ranges, notes)

    def _to_calibrate(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._decisions[name].scheme is not None]

    def _items_of(self, names: Sequence[str]) -> list[WorkItem]:
        """The work items of those that are quantized; all others are copied before the pass."""
        found: dict[int, WorkItem] = {}
        for name in self._to_calibrate(names):
            linear = self._decisions[name].linear
            assert linear is not None
            found |= {item.id: item for item in self._items[linear.source, linear.expert]}
        return list(found.values())

    def _read_back(self, name: str) -> Pair:
        decision = self._decisions[name]
        original = self.original(name)
        if decision.scheme is None:
            return Pair(original=original, stored=original)
        tensors: Mapping[str, Tensor] = {output.name: self._writer.read(output.name) for output in decision.outputs}
        values = dequantize_weight(decode(name, tensors, decision.scheme), torch.float32)
        return Pair(original=original, stored=values.to(self.device))
