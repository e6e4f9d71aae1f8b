"""What is noted in the journal about a finished piece of a weight: enough to report on it later."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama4_quant.calibration.records import CalibrationRecord
from llama4_quant.quantizers.error import WeightError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightNote:
    """What came of one piece: its weight, and for quantized ones the error and the time that quantizing took.

    Attributes:
        calibration: a CalibrationRecord as JSON; None for data-free quantization.
    """

    weight: str
    error: WeightError
    seconds: float
    calibration: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "WeightNote":
        """The inverse of `to_json`."""
        return cls(**{**content, "error": WeightError(**content["error"])})

    def merge(self, other: "WeightNote") -> "WeightNote":
        """Both pieces of one weight together."""
        return dataclasses.replace(
            self,
            error=self.error.merge(other.error),
            seconds=self.seconds + other.seconds,
            calibration=_merged(self.calibration, other.calibration),
        )


def _merged(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if one is None or other is None:
        return one or other
    return dataclasses.asdict(CalibrationRecord(**one).merge(CalibrationRecord(**other)))
