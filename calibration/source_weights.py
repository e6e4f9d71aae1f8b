"""The weights of a source for a calibration, by module name; and the model before quantization, made of them alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.architecture import LinearSpec
from llama4_quant.calibration.hessian import Moments
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.planning.plan import Plan
from llama4_quant.scheme import WeightScheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A weight twice, float32 [out, in]: as it was, and as it is stored."""

    original: Tensor
    stored: Tensor


class SourceWeights:
    """The weights of the source by module name, all of them as they are: the model before quantization.

    Attributes:
        device: where the arithmetic is done.
    """

    def __init__(self, plan: Plan, reader: CheckpointReader, device: torch.device) -> None:
        self._reader, self.device = reader, device
        self._held: tuple[LinearSpec, Tensor] | None = None
        self._decisions = {decision.name: decision for decision in plan.decisions}

    def scheme(self, name: str) -> WeightScheme | None:  # noqa: ARG002 - of other models it depends on the name
        """How a weight is stored; None as it is."""
        return None

    def num_inputs(self, name: str) -> int:
        """Inputs of a linear weight."""
        return self._decisions[name].shape[1]

    def original(self, name: str) -> Tensor:
        """A weight, norm or bias of the source, float32; [out, in] for linear weights."""
        return self._read(name).to(self.device)

    def keep(self, name: str) -> int:  # noqa: ARG002
        """Write a weight that stays as it is, where that has not been done; the source bytes that are done now."""
        return 0

    def is_pending(self, names: Sequence[str]) -> bool:  # noqa: ARG002
        """Whether some of these weights still have to be quantized, which takes moments."""
        return False

    def num_finished_layers(self, num_layers: int, *, of_vision: bool = False) -> int:  # noqa: ARG002
        """Layers from the first on, of the decoder or of the vision tower, of which nothing is left to do."""
        return num_layers

    def quantize_rows(self, name: str, moments: Moments) -> Iterator[int]:  # noqa: ARG002
        """Quantize a weight a part of its rows at a time; see `Weights.quantize_rows`."""
        return iter(())

    def sync(self) -> None:
        """Bring to the disk what is finished."""

    def quantize(
        self,
        names: Sequence[str],
        moments: Moments,  # noqa: ARG002
        num_prior_rows: int = 0,  # noqa: ARG002
    ) -> tuple[dict[str, Pair], int]:
        """The weights by name, and the source bytes that are done now; see `Weights.quantize`."""
        originals = {name: self.original(name) for name in names}
        return {name: Pair(original=weight, stored=weight) for name, weight in originals.items()}, 0

    def _read(self, name: str) -> Tensor:
        decision = self._decisions[name]
        linear = decision.linear
        if linear is None or linear.expert is None:
            values = self._reader.read(linear.source if linear else name)
        else:
            values = self._expert_slice(linear, linear.expert)[:, linear.out_start :][:, : linear.out_features].T
        return values.to(torch.float32)

    def _expert_slice(self, linear: LinearSpec, expert: int) -> Tensor:
        """An expert of a fused tensor, [in, out of all its weights]; held from its first weight to its last."""
        held, self._held = self._held, None
        if held is not None and (held[0].source, held[0].expert) == (linear.source, expert):
            stored_KN = held[1]
        else:
            stored_KN = self._reader.read_slice(linear.source, expert, 0, linear.in_features)
        if linear.out_start + linear.out_features < stored_KN.shape[1]:
            self._held = linear, stored_KN
        return stored_KN
