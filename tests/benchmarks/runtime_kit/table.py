"""The table, and the bars below it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .results import Row, Speed, difference, measured_hits


def header(num_prompt: int, batch_size: int) -> str:
    """Two lines."""
    first = f"{'':19}{f'prefill {num_prompt}':>16}{'decode':>16}{f'decode, {batch_size} rows':>18}"
    second = f"{'tokens per second':19}{'best (median)':>16}{'best (median)':>16}{'best (median)':>18}"
    return (
        f"{first}{'peak':>7}{'MB per':>8}{'':>7}{'% of':>6}{'logits':>8}\n"
        f"{second}{'GB':>7}{'token':>8}{'GB/s':>7}{'read':>6}{'differ':>8}{'load':>6}"
    )


def lines(rows: Sequence[Row], *, batch_size: int, bandwidth: float, vocabulary: int) -> list[str]:
    """One a row; `bandwidth` in bytes per second."""
    hits = measured_hits(rows)
    reference = next((row for row in rows if row.contender.name == "ours-bf16"), None)
    found = []
    for row in rows:
        apart = None if reference is None else difference(row, reference, vocabulary)
        found.append(_line(row, hits, apart, batch_size, bandwidth))
    return found


def settings(row: Row) -> str:
    """What ran, and which variants were the best."""
    assert row.prefill is not None
    assert row.decode is not None
    speeds = {"prefill": row.prefill} | {f"decode {size}": speed for size, speed in row.decode.items()}
    variants = [f"{what}: {speed.variant}" for what, speed in speeds.items() if speed.variant]
    return f"{row.contender.name}: " + "; ".join([row.contender.what, *row.notes, *variants])


def _line(row: Row, hits: Mapping[int, float] | None, apart: float | None, batch_size: int, bandwidth: float) -> str:
    if row.prefill is None or row.decode is None:
        return f"{row.contender.name:19}{row.problem}"
    step, speed = row.bytes_per_step(1, hits), row.bytes_per_second(1, hits)
    assert step is not None
    assert speed is not None
    return (
        f"{row.contender.name:19}{_speed(row.prefill):>16}{_speed(row.decode[1]):>16}{_speed(row.decode[batch_size]):>18}"
        f"{row.peak_bytes / 1e9:7.2f}{step / 1e6:8.0f}{speed / 1e9:7.2f}{speed / bandwidth:6.0%}"
        f"{'-' if apart is None else f'{apart:.4f}':>8}{row.load:6.1f}"
    )


def _speed(speed: Speed) -> str:
    return f"{_number(speed.best)} ({_number(speed.median)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value that should be at least `bar`."""

    what: str
    value: float
    bar: float

    @property
    def is_met(self) -> bool:
        return self.value >= self.bar

    @property
    def line(self) -> str:
        """`met       0.81 >= 0.70  ...`."""
        return f"{'met' if self.is_met else 'MISSED':7} {self.value:6.2f} >= {self.bar:.2f}  {self.what}"


def bars(rows: Sequence[Row], *, bandwidth: float, num_experts: int) -> list[Bar]:
    """The comparisons that the rows at hand allow."""
    by_name = {row.contender.name: row for row in rows if row.problem is None}
    found = []
    if "ours-int4" in by_name:
        reached = by_name["ours-int4"].bytes_per_second(1, measured_hits(rows))
        assert reached is not None
        what = "ours-int4: bytes that decoding reads per second / measured bandwidth"
        found.append(Bar(what=what, value=reached / bandwidth, bar=0.7))
    decode = [
        ("ours-int4", "llamacpp-q4_0", 1.0),
        ("ours-int4", "ours-bf16", 3.0),
        ("ours-int4", "transformers-bf16", 8.0),
        ("ours-fp8", "ours-bf16", 1.5),
    ]
    for ours, other, bar in decode:
        if ours in by_name and other in by_name:
            value = _ratio(by_name[ours].speed(1), by_name[other].speed(1))
            found.append(Bar(what=f"{ours} / {other}: decode, 1 row", value=value, bar=bar))
    for ours in ("ours-int4", "ours-bf16"):
        if ours in by_name and "transformers-bf16" in by_name:
            prefill = (by_name[name].prefill for name in (ours, "transformers-bf16"))
            value = _ratio(*(None if speed is None else speed.best for speed in prefill))
            what = f"{ours} / transformers-bf16: prefill; the bar is E/2"
            found.append(Bar(what=what, value=value, bar=num_experts / 2))
    return found


def _ratio(ours: float | None, other: float | None) -> float:
    assert ours is not None
    assert other is not None
    return ours / other
