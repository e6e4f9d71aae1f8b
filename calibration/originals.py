"""Weights of the source for arithmetic, equalized if that is wanted, and tables a part at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llama4_quant.calibration.equalize import Equalizer
from llama4_quant.calibration.source_weights import SourceWeights
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.planning.plan import Plan


class Originals(SourceWeights):
    """The source's weights by module name, as a calibration of this plan will see them."""

    def __init__(self, plan: Plan, reader: CheckpointReader, device: torch.device, *, equalize: bool) -> None:
        """Nothing is read yet; `equalize` moves powers of two between the weights (equalize.py)."""
        super().__init__(plan, reader, device)
        self._equalizer = Equalizer(plan, lambda name: self._decisions[name].scheme, reader) if equalize else None

    def original(self, name: str) -> Tensor:
        """A weight, norm or bias, float32; [out, in] for linear weights."""
        values = self._read(name)
        return (values if self._equalizer is None else self._equalizer.factors(name).apply(values)).to(self.device)

    def rows(self, tensor: str, max_elements: int) -> Iterator[tuple[slice, Tensor]]:
        """A 2-D tensor of the source a part of its rows at a time, float32."""
        num_rows, width = self._reader.tensors[tensor].shape
        step = max(1, max_elements // width)
        for start in range(0, num_rows, step):
            part = slice(start, min(start + step, num_rows))
            rows = self._reader.read_rows(tensor, part.start, part.stop)
            yield part, rows.to(device=self.device, dtype=torch.float32)
