"""What a row measured, and what follows from it."""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from .contenders import Contender
from .traffic import Traffic, expected_hits


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second over rounds, and the variant of settings that was the best.

    Attributes:
        rounds: of the best variant.
    """

    best: float
    median: float
    variant: str
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Mapping[str, Sequence[float]], num_tokens: int) -> Self:
        """From the seconds of rounds that computed `num_tokens` each, by variant."""
        variant = min(seconds, key=lambda name: min(seconds[name]))
        rounds = tuple(num_tokens / value for value in seconds[variant])
        return cls(best=max(rounds), median=median(rounds), variant=variant, rounds=rounds)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        decode: by batch size.
        hits: distinct experts of a layer that a step read, by batch size, where the row's engine could tell.
        logits: where the row's logits are.
        problem: why there is nothing else.
    """

    contender: Contender
    traffic: Traffic | None = None
    prefill: Speed | None = None
    decode: Mapping[int, Speed] | None = None
    hits: Mapping[int, float] | None = None
    peak_bytes: int = 0
    load_seconds: float = 0.0
    load: float = 0.0
    notes: tuple[str, ...] = ()
    logits: Path | None = None
    problem: str | None = None

    @classmethod
    def from_result(cls, contender: Contender, traffic: Traffic, result: dict[str, Any], num_prompt: int) -> Self:
        """From what a worker wrote."""
        variants = result["variants"]
        sizes = next(iter(variants.values()))["decode"]
        decode = {
            int(size): Speed.of({name: found["decode"][size] for name, found in variants.items()}, int(size))
            for size in sizes
        }
        hits = {int(size): hit for size, hit in result.get("experts_hit", {}).items() if size.isdigit()}
        return cls(
            contender=contender,
            traffic=traffic,
            prefill=Speed.of({name: found["prefill"] for name, found in variants.items()}, num_prompt),
            decode=decode,
            hits=hits or None,
            peak_bytes=result["peak_bytes"],
            load_seconds=result["load_seconds"],
            load=result["load"],
            notes=tuple(result["notes"]),
            logits=Path(next(reversed(variants.values()))["fingerprint"]),
        )

    def speed(self, batch_size: int) -> float | None:
        """Decoded tokens per second of all rows of a batch."""
        return None if self.decode is None else self.decode[batch_size].best

    def bytes_per_step(self, batch_size: int, hits: Mapping[int, float] | None) -> float | None:
        """Of weights that one step reads; `hits` are those of a row that could tell."""
        if self.traffic is None:
            return None
        if self.contender.reads_all_experts:
            return self.traffic.per_step(self.traffic.num_experts)
        known = hits or {}
        return self.traffic.per_step(known.get(batch_size, expected_hits(self.traffic.num_experts, batch_size)))

    def bytes_per_second(self, batch_size: int, hits: Mapping[int, float] | None) -> float | None:
        """What decoding reads."""
        speed, step = self.speed(batch_size), self.bytes_per_step(batch_size, hits)
        return None if speed is None or step is None else speed / batch_size * step

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"logits": None}


def measured_hits(rows: Sequence[Row]) -> Mapping[int, float] | None:
    """Of our BF16 row, or of another that could tell: all rows compute the same tokens."""
    known = {row.contender.name: row.hits for row in rows if row.hits is not None}
    return known.get("ours-bf16") or next(iter(known.values()), None)


def difference(row: Row, reference: Row, width: int) -> float | None:
    """Of two rows' logits: the median over positions, for at a near tie of its router a token changes its expert."""
    if row.logits is None or reference.logits is None:
        return None
    return median(apart(row.logits, reference.logits, width))


def apart(logits: Path, reference: Path, width: int) -> list[float]:
    """|logits - reference| / |reference| of each position; `width` logits are one."""
    ours, theirs = (_floats(path) for path in (logits, reference))
    squares = [(a - b) ** 2 for a, b in zip(ours, theirs, strict=True)]
    starts = range(0, len(theirs), width)
    norms = [math.fsum(value * value for value in theirs[start : start + width]) for start in starts]
    return [math.sqrt(math.fsum(squares[s : s + width]) / norm) for s, norm in zip(starts, norms, strict=True)]


def _floats(path: Path) -> "array[float]":
    values = array("f")
    values.frombytes(path.read_bytes())
    return values
