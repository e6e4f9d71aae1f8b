"""Scales of an FP8 KV cache: one for the keys of a layer and one for its values, from the largest magnitude of each.

An FP8 code has the same relative error in every power of two, so a finer search hardly helps; `kv_cache.py` among the
benchmarks measures it. What is measured is what is cached: keys after RoPE and, where the model has it, qk-norm, and
values, both of the quantized model, over all calibration tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llama4_quant.calibration.records import CacheScaleRecord
from llama4_quant.checkpoint.journal import Record
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import QuantizationError
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.fp8 import GRID
from llama4_quant.quantizers.search import choose_scales
from llama4_quant.runtime.cache_formats import CacheScales
from llama4_quant.work import WorkItem, cache_items


class CacheCalibration:
    """Finds, writes and remembers the scales of one conversion, layer by layer."""

    def __init__(self, plan: Plan, items: Sequence[WorkItem], writer: CheckpointWriter) -> None:
        """Nothing is written yet.

        Args:
            plan: of the conversion.
            items: all its items.
            writer: the output; scales that an interrupted run has written are taken from it.
        """
        self._tensors, self._items = plan.cache_scales, cache_items(plan, items)
        self._writer = writer
        self._finished: Mapping[int, Record] = writer.records() if self._tensors else {}

    def scales(self, layer: int, ranges: Callable[[], tuple[float, float]]) -> CacheScaleRecord | None:
        """The scales of a layer, or None if the plan has none.

        Args:
            layer: its number.
            ranges: gives the largest magnitudes of keys and of values; not called if the scales are written already.

        Raises:
            QuantizationError: a magnitude is NaN or Inf.
        """
        if not self._tensors:
            return None
        item = self._items[layer]
        if item in self._finished:
            return CacheScaleRecord(**self._finished[item].notes)
        outputs = self._tensors[layer]
        largest = ranges()
        values = [_checked_scale(output.name, absmax) for output, absmax in zip(outputs, largest, strict=True)]
        record = CacheScaleRecord(
            k_scale=values[0], v_scale=values[1], largest_key=largest[0], largest_value=largest[1]
        )
        written = [
            self._writer.write(output.name, torch.tensor([value], dtype=output.dtype))
            for output, value in zip(outputs, values, strict=True)
        ]
        self._writer.record(item, written, dataclasses.asdict(record))
        return record


def cache_scale(absmax: float) -> float:
    """The scale that puts `absmax` on the largest code: absmax / 448 as a bf16 number; 1 for 0."""
    base = torch.tensor([absmax], dtype=torch.float32)
    return float(choose_scales(base.unsqueeze(0), base, GRID, ()))


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each tensor, as one vector; NaN where a tensor has one."""
    return torch.stack([tensor.abs().amax().float() for tensor in tensors])


def scales_of(record: CacheScaleRecord | None) -> CacheScales | None:
    """A record's scales, for the runtime's attention."""
    return None if record is None else CacheScales(key=record.k_scale, value=record.v_scale)


def _checked_scale(name: str, absmax: float) -> float:
    scale = cache_scale(absmax)
    if not 0 < scale < float("inf"):
        raise QuantizationError(
            f"{name}: the largest magnitude of the calibration tokens is {absmax}; the model overflows on this text, "
            "so leave out --kv-cache-scheme or give other calibration data"
        )
    return scale
