"""What a calibrated conversion reports, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """How one weight was calibrated.

    Attributes:
        method: "gptq", "best", or "rtn" where there was too little data.
        num_rows: rows of activations that the weight was fitted to; of an expert, the rows routed to it.
        num_prior_rows: rows of the layer's other tokens that were added with little weight.
        damp_percent: what was added to the Hessian's diagonal, as a part of its mean; None without a Hessian.
        rounding_error: squared error of the outputs on these rows after rounding to nearest, against the weight that
            was to be (corrected for drift, with "best"), as a part of the squared outputs; None without rows.
        output_error: the same as stored.
        squared_outputs: what both are a part of: the sum of the squared outputs of the source's weight on these rows.
        num_rounded: outputs stored as rounded to nearest, since what the method found would have cost more.
        note: anything unusual.
    """

    method: str
    num_rows: int
    num_prior_rows: int = 0
    damp_percent: float | None = None
    rounding_error: float | None = None
    output_error: float | None = None
    squared_outputs: float | None = None
    num_rounded: int = 0
    note: str = ""

    def merge(self, other: "CalibrationRecord") -> "CalibrationRecord":
        """The record of a weight whose outputs were solved in two parts, on the same rows."""
        total = (self.squared_outputs or 0.0) + (other.squared_outputs or 0.0)
        return replace(
            self,
            rounding_error=_mean((self.rounding_error, self), (other.rounding_error, other)),
            output_error=_mean((self.output_error, self), (other.output_error, other)),
            squared_outputs=None if self.squared_outputs is None else total,
            num_rounded=self.num_rounded + other.num_rounded,
        )


def _mean(*errors: tuple[float | None, CalibrationRecord]) -> float | None:
    """Of errors relative to each record's outputs."""
    parts = [(error, record.squared_outputs) for error, record in errors]
    known = [(error, squares) for error, squares in parts if error is not None and squares is not None]
    total = sum(squares for _, squares in known)
    return sum(error * squares for error, squares in known) / total if total else None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheScaleRecord:
    """The FP8 KV cache of one layer.

    Attributes:
        k_scale, v_scale: as they are stored.
        largest_key, largest_value: largest magnitudes over all calibration tokens, as they are cached.
    """

    k_scale: float
    v_scale: float
    largest_key: float
    largest_value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """One layer of the running quantized model, of its decoder or of its vision tower.

    Attributes:
        layer: its number.
        rows_per_expert: rows routed to each expert; empty for a dense layer.
        relative_error: |quantized - original| / |original| of the hidden states after the layer, over all tokens;
            None if the original model did not run beside.
        sqnr_db: the same as a signal to noise ratio in dB.
        rerouted: the part of tokens whose experts differ from the original model's; None as above, or without experts.
        cache: of an FP8 KV cache; None without.
    """

    layer: int
    rows_per_expert: tuple[int, ...] = ()
    relative_error: float | None = None
    sqnr_db: float | None = None
    rerouted: float | None = None
    cache: CacheScaleRecord | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LayerRecord":
        """The inverse of `dataclasses.asdict`, once the data went through JSON."""
        cache = content.get("cache")
        return cls(
            **{
                **content,
                "rows_per_expert": tuple(content["rows_per_expert"]),
                "cache": None if cache is None else CacheScaleRecord(**cache),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateRecord:
    """One way to store a unit.

    Attributes:
        scheme: "int4 g128", "fp8 channel", "bf16", ...
        bits: stored bits per weight, scales included.
        predicted_kl: nats per token that it is predicted to cost.
    """

    scheme: str
    bits: float
    predicted_kl: float


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRecord:
    """Weights that share one scheme, and the scheme that was chosen for them.

    Attributes:
        unit: what they are: a fused module's name (`qkv_proj`, `gate_up_proj`), a layer's experts, or one weight's.
        num_weights: elements of all of them.
        chosen: the chosen candidate's `scheme`.
        candidates: all that were looked at, in order of bits.
    """

    unit: str
    num_weights: int
    chosen: str
    candidates: tuple[CandidateRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPrecisionRecord:
    """How mixed precision was decided.

    Attributes:
        target_bits: what was asked for.
        bits: what is stored: bits of codes (or BF16 values) and scales of all weights in `units`, per weight.
        predicted_kl: sum over the chosen candidates, nats per token.
        num_tokens: of the survey.
        units: in order of the model.
    """

    target_bits: float
    bits: float
    predicted_kl: float
    num_tokens: int
    units: tuple[UnitRecord, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "MixedPrecisionRecord | None":
        """The inverse of `dataclasses.asdict`, once the data went through JSON."""
        if content is None:
            return None
        units = tuple(
            UnitRecord(**{**unit, "candidates": tuple(CandidateRecord(**found) for found in unit["candidates"])})
            for unit in content["units"]
        )
        return cls(**{**content, "units": units})


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationReport:
    """A whole calibration.

    Attributes:
        algorithm: "gptq" or "best".
        data: what the tokens were taken from.
        num_samples, num_tokens: how much of it.
        equalized: powers of two were moved between weights, some that stay BF16 among them (calibration/equalize.py).
        layers: a record per decoder layer.
        vision_layers: a record per layer of the vision tower, where that was calibrated.
        notes: experts with too little data and what was done about them, and anything else that a user should know.
        mixed_precision: how schemes were chosen weight by weight; None where all weights have the same.
    """

    algorithm: str
    data: str
    num_samples: int
    num_tokens: int
    equalized: bool
    layers: tuple[LayerRecord, ...]
    notes: tuple[str, ...]
    vision_layers: tuple[LayerRecord, ...] = ()
    mixed_precision: MixedPrecisionRecord | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "CalibrationReport | None":
        """The inverse of `dataclasses.asdict`, once the data went through JSON."""
        if content is None:
            return None
        return cls(
            **{
                **content,
                "layers": tuple(LayerRecord.from_json(layer) for layer in content["layers"]),
                "vision_layers": tuple(LayerRecord.from_json(layer) for layer in content["vision_layers"]),
                "notes": tuple(content["notes"]),
                "mixed_precision": MixedPrecisionRecord.from_json(content["mixed_precision"]),
            }
        )
