"""What a conversion does or did, weight by weight: what a dry run shows, and quantization_report.json."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama4_quant._version import __version__
from llama4_quant.calibration.records import CalibrationRecord, CalibrationReport
from llama4_quant.checkpoint.manifest import CHECKSUM_KEY, with_self_checksum
from llama4_quant.notes import WeightNote
from llama4_quant.planning.plan import Decision, Plan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.work import MemoryUse

REPORT_NAME = "quantization_report.json"
SCHEMA_VERSION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRecord:
    """One weight of the output.

    Attributes:
        name: module name of a linear weight, tensor name of anything else.
        shape: [out, in] for linear weights.
        scheme: "bf16", or how it is quantized: "int4 g128", "fp8 channel", ...
        reason: why this scheme.
        scale_min, scale_max: smallest and largest scale; None for BF16.
        relative_error: |w - dequantized w| / |w| (Frobenius norms); None for BF16.
        sqnr_db: signal to quantization noise, 10 log10(|w|^2 / |error|^2), in dB; None for BF16 or without error.
        seconds: time in the quantizer; None for BF16.
        calibration: how it was calibrated; None without calibration.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    scheme: str
    reason: str
    bytes_in: int
    bytes_out: int
    scale_min: float | None = None
    scale_max: float | None = None
    relative_error: float | None = None
    sqnr_db: float | None = None
    seconds: float | None = None
    calibration: CalibrationRecord | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleSummary:
    """All weights of one role that share scheme and reason: a line of the dry run's table, and coverage per role."""

    role: str
    scheme: str
    reason: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    num_weights: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over a plan.

    Attributes:
        bits_per_weight: 8 * bytes_out / num_weights over the whole checkpoint.
        quantized_bits_per_weight: the same over quantized weights only, scales included; 0 if there are none.
        quantized_fraction: part of all weights that is quantized.
    """

    num_weights: int
    bytes_in: int
    bytes_out: int
    bits_per_weight: float
    quantized_bits_per_weight: float
    quantized_fraction: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A conversion, planned (`dry_run`: no output, no errors, no times) or done (`convert`).

    Attributes:
        source: what was converted, as the user named it.
        output: where it went; None for a dry run.
        scheme: name and settings of the scheme; the format, where it is not compressed-tensors.
        roles: weights summed up by role, scheme and reason: coverage.
        notes: what to know about where the result can be loaded.
        ignore: the `ignore` list of quantization_config: every linear module that stays BF16.
        weights: a record per weight.
        memory: how much memory it takes, and how many workers share it.
        backend: what quantizes, and its compiler, or why it is the plain one; None where nothing is quantized.
        seconds: wall time; None for a dry run.
        calibration: data, layers and notes of a calibration; None without.
    """

    source: str
    output: str | None
    architecture: str
    scheme: str
    totals: Totals
    roles: tuple[RoleSummary, ...]
    notes: tuple[str, ...]
    ignore: tuple[str, ...]
    weights: tuple[WeightRecord, ...]
    memory: MemoryUse
    backend: str | None
    seconds: float | None
    calibration: CalibrationReport | None = None
    schema_version: int = SCHEMA_VERSION
    llama4_quant_version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`, with a checksum of itself (see manifest.py)."""
        return with_self_checksum(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Report":
        """The inverse of `to_json`, once the data went through JSON."""
        return cls(
            **{key: value for key, value in content.items() if key != CHECKSUM_KEY}
            | {
                "totals": Totals(**content["totals"]),
                "memory": MemoryUse(**content["memory"]),
                "roles": tuple(
                    RoleSummary(**role | {"shapes": tuple(map(tuple, role["shapes"]))}) for role in content["roles"]
                ),
                "weights": tuple(
                    WeightRecord(
                        **weight
                        | {"shape": tuple(weight["shape"]), "calibration": _calibration_record(weight["calibration"])}
                    )
                    for weight in content["weights"]
                ),
                "calibration": CalibrationReport.from_json(content["calibration"]),
                "notes": tuple(content["notes"]),
                "ignore": tuple(content["ignore"]),
            }
        )


def make_report(
    plan: Plan,
    source: str,
    *,
    memory: MemoryUse,
    backend: Backend,
    output: str | None = None,
    weights: Sequence[WeightRecord] | None = None,
    seconds: float | None = None,
    calibration: CalibrationReport | None = None,
) -> Report:
    """Report a plan, and what came of it where `weights` are given."""
    decisions = plan.decisions
    records = [weight_record(decision) for decision in decisions] if weights is None else weights
    return Report(
        source=source,
        output=output,
        architecture=plan.config.architecture,
        scheme=plan.label,
        totals=_totals(decisions, sum(output.nbytes for pair in plan.cache_scales for output in pair)),
        roles=_summarise(decisions),
        notes=plan.notes,
        ignore=plan.ignore,
        weights=tuple(records),
        memory=memory,
        backend=None if plan.scheme is None else f"{backend.name}: {backend.detail}",
        seconds=seconds,
        calibration=calibration,
    )


def weight_record(decision: Decision, note: WeightNote | None = None) -> WeightRecord:
    """The record of one weight; `note` is what is known once it is quantized."""
    error = None if note is None else note.error
    return WeightRecord(
        name=decision.name,
        role=decision.role,
        layer=decision.layer,
        shape=decision.shape,
        scheme=decision.stored_as,
        reason=decision.reason,
        bytes_in=decision.bytes_in,
        bytes_out=decision.bytes_out,
        scale_min=None if error is None else error.scale_min,
        scale_max=None if error is None else error.scale_max,
        relative_error=None if error is None else error.relative_error,
        sqnr_db=None if error is None or not error.squared_error else error.sqnr_db,
        seconds=None if note is None else note.seconds,
        calibration=None if note is None else _calibration_record(note.calibration),
    )


def _calibration_record(content: Mapping[str, Any] | None) -> CalibrationRecord | None:
    return None if content is None else CalibrationRecord(**content)


def _totals(decisions: Sequence[Decision], cache_bytes: int) -> Totals:
    num_weights, bytes_out = sum(d.num_weights for d in decisions), sum(d.bytes_out for d in decisions) + cache_bytes
    quantized = [d for d in decisions if d.scheme is not None]
    num_quantized = sum(d.num_weights for d in quantized)
    return Totals(
        num_weights=num_weights,
        bytes_in=sum(d.bytes_in for d in decisions),
        bytes_out=bytes_out,
        bits_per_weight=8 * bytes_out / num_weights,
        quantized_bits_per_weight=8 * sum(d.bytes_out for d in quantized) / max(1, num_quantized),
        quantized_fraction=num_quantized / num_weights,
    )


def _summarise(decisions: Iterable[Decision]) -> tuple[RoleSummary, ...]:
    groups: dict[tuple[str, str, str], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((decision.role, decision.stored_as, decision.reason), []).append(decision)
    return tuple(
        RoleSummary(
            role=role,
            scheme=scheme,
            reason=reason,
            count=len(members),
            shapes=_shapes(members),
            num_weights=sum(d.num_weights for d in members),
            bytes_in=sum(d.bytes_in for d in members),
            bytes_out=sum(d.bytes_out for d in members),
        )
        for (role, scheme, reason), members in groups.items()
    )


def _shapes(members: Sequence[Decision]) -> tuple[tuple[int, ...], ...]:
    """Distinct shapes, most frequent first."""
    return tuple(shape for shape, _ in Counter(d.shape for d in members).most_common())
