"""A head (`lm_head`) that is quantized while a model is loaded, from whatever the checkpoint has.

A decoding step reads the whole head for every token: in Scout 2.07 GB, a fifth of what a token reads once everything
else is int4. int8 halves that, and int4 takes 4.5 bits a weight instead of 16. A head that is tied to the embeddings
gets a copy of its own, since the embeddings stay as they are: memory grows by what the head takes, reading shrinks all
the same.

Shape letters: K in, R rows, V vocabulary.
"""

from enum import StrEnum

from torch import Tensor

from llama4_quant.config import Llama4Config
from llama4_quant.errors import QuantizationError, UsageError
from llama4_quant.quantizers.backend import choose_backend
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.scheme import Observer, Strategy, WeightScheme, WeightType


class HeadFormat(StrEnum):
    """How a head can be stored, with `load(..., lm_head=...)`."""

    INT8 = "int8"
    """One scale per token of the vocabulary; activations stay as they are."""
    INT4 = "int4"
    """One scale per 32 inputs, chosen for the least squared error."""


_SCHEMES = {
    HeadFormat.INT8: WeightScheme(type=WeightType.INT8, strategy=Strategy.CHANNEL, observer=Observer.ABSMAX),
    HeadFormat.INT4: WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32),
}


def head_scheme(name: str | None) -> WeightScheme | None:
    """The scheme that `lm_head` names; None leaves the head as the checkpoint has it.

    Raises:
        UsageError: unknown name.
    """
    if name is None:
        return None
    if name not in set(HeadFormat):
        raise UsageError(f"lm_head {name!r} is unknown; use one of {', '.join(HeadFormat)}")
    return _SCHEMES[HeadFormat(name)]


class HeadFiller:
    """Quantizes a head's rows into their place as they come.

    Attributes:
        source: name of the weight that the rows are of: the head's, or that of the embeddings it is tied to.
        is_tied: the rows are wanted as embeddings too.
    """

    def __init__(self, config: Llama4Config, stored: dict[str, Tensor], scheme: WeightScheme) -> None:
        """Prepare.

        Args:
            config: of the model.
            stored: the head's tensors, to be filled.
            scheme: how they store it.
        """
        self.is_tied = config.text.tie_word_embeddings
        self.source = f"{config.prefix}{'model.embed_tokens.weight' if self.is_tied else 'lm_head'}"
        self._scheme = scheme
        self._stored = stored
        self._backend = choose_backend() if scheme.type is WeightType.INT4 else None

    def put(self, row_start: int, values_RK: Tensor) -> None:
        """Quantize rows `row_start` and on.

        Raises:
            QuantizationError: NaN or Inf; the message names the weight.
        """
        rows = slice(row_start, row_start + len(values_RK))
        try:
            codes, scale = self._quantize(values_RK)
        except QuantizationError as error:
            raise QuantizationError(f"{self.source}, rows from {row_start}: {error}") from error
        for target, values in zip(self._stored.values(), (codes, scale), strict=True):
            target[rows].copy_(values)

    def _quantize(self, values_RK: Tensor) -> tuple[Tensor, Tensor]:
        if self._backend is not None:
            packed = self._backend.quantize(values_RK, self._scheme)
            return packed.codes, packed.scale
        quantized = quantize_weight(values_RK, self._scheme)
        return quantized.codes, quantized.scale


def refuse_second_scheme(name: str, stored: WeightScheme | None) -> None:
    """Raise UsageError if a head that is to be quantized while loading is stored, or planned, quantized already."""
    if stored is not None:
        raise UsageError(f"{name} is {stored.label} already; leave out lm_head (--lm-head)")
