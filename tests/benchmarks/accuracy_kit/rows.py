"""A row of the benchmark: one contender, converted, checked and judged; and tables of rows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama4_quant.errors import Llama4QuantError

from .checkpoint_facts import Facts, WrongCheckpointError, inspect
from .child_process import ChildFailedError
from .contenders import Contender
from .conversions import Setting, UnavailableError, convert
from .judge import SETTINGS, Judge

HEADER = (
    f"{'row':24} {'bits':>6} {'KL nats/token':>20} {'perplexity':>11} {'top-1':>7} {'MB':>8} {'MB all':>8} "
    f"{'s':>7} {'s inside':>8} {'CPU s':>7} {'MB RAM':>7} {'load':>5}"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table shows of a contender.

    Attributes:
        name: the contender's.
        system: who converted.
        problem: why there are no numbers; None if there are.
        facts: sizes of the checkpoint.
        conversion: times and memory, see `Conversion.facts`.
        score: what the judge found, see `EvaluationResult.to_json`.
        settings: the contender's.
    """

    name: str
    system: str
    settings: dict[str, Any]
    problem: str | None = None
    facts: Facts | None = None
    conversion: dict[str, Any] | None = None
    score: dict[str, Any] | None = None

    @property
    def divergence(self) -> float | None:
        """KL(reference || quantized), nats per token."""
        return None if self.score is None else float(self.score["comparison"]["divergence"]["value"])

    @property
    def seconds(self) -> float | None:
        """Wall time of the whole process."""
        return None if self.conversion is None else float(self.conversion["seconds"])

    @property
    def inside_seconds(self) -> float | None:
        """Wall time of the conversion itself, by the contender's own clock: no imports, no saving of a peer's."""
        if self.conversion is None:
            return None
        steps = self.conversion["steps"]
        return float(steps["convert"] if "convert" in steps else steps["oneshot"])

    def to_json(self) -> dict[str, Any]:
        """Everything, and bits per weight."""
        bits = {} if self.facts is None else {"bits_per_weight": self.facts.bits_per_weight}
        return asdict(self) | bits


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What every checkpoint of a table is checked for; see `checkpoint_facts.inspect`."""

    roles: frozenset[Any]
    scheme: str
    group_size: int | None


def make_row(contender: Contender, setting: Setting, wanted: Wanted, judge: Judge, held_out_digest: str) -> Row:
    """Convert, check, judge; a contender that fails gives a row that says how."""
    row = Row(name=contender.name, system=contender.system, settings=contender.settings)
    try:
        conversion = convert(contender, setting)
        facts = inspect(
            conversion.checkpoint,
            setting.model,
            roles=wanted.roles,
            scheme=wanted.scheme,
            group_size=contender.group_size or wanted.group_size,
            mixed=contender.mixed,
        )
        score = _score(conversion.folder, judge, held_out_digest)
    except (UnavailableError, ChildFailedError, WrongCheckpointError, Llama4QuantError, ValueError) as error:
        return Row(**asdict(row) | {"problem": f"{type(error).__name__}: {error}"})
    return Row(**asdict(row) | {"facts": facts, "conversion": dict(conversion.facts), "score": score})


def _score(folder: Path, judge: Judge, held_out_digest: str) -> dict[str, Any]:
    key = json.dumps(SETTINGS | {"windows": held_out_digest}, sort_keys=True)
    path = folder / f"score-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.write_text(json.dumps(judge.score(folder / "checkpoint")), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def line(row: Row) -> str:
    """A row of the table under `HEADER`."""
    if row.score is None or row.facts is None or row.conversion is None:
        return f"{row.name:24} {(row.problem or '').splitlines()[-1][-150:]}"
    compared, done, facts = row.score["comparison"], row.conversion, row.facts
    divergence, agreement = compared["divergence"], compared["agreement"]
    error = divergence["standard_error"] or 0.0
    return (
        f"{row.name:24} {facts.bits_per_weight:6.3f} {divergence['value']:11.6f} ± {error:8.6f}"
        f" {row.score['perplexity']['value']:11.4f} {agreement['value']:7.4f} {facts.quantized_bytes / 1e6:8.3f}"
        f" {facts.total_bytes / 1e6:8.3f} {row.seconds:7.1f} {row.inside_seconds:8.1f} {done['cpu_seconds']:7.1f}"
        f" {done['peak_bytes'] / 1e6:7.0f} {done['load_before']:5.2f}"
    )


def reference_perplexity(rows: Sequence[Row]) -> float | None:
    """Of the BF16 model on the held-out windows, as the judge found it."""
    for row in rows:
        if row.score is not None:
            return float(row.score["comparison"]["reference_perplexity"]["value"])
    return None
