"""What the benchmark is for: ratios between our rows and the peers', each beside its bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .contenders import System
from .rows import Row

MAX_MIXED_RATIO = 0.85


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A ratio that should be at most `bar`."""

    what: str
    ratio: float
    bar: float

    @property
    def line(self) -> str:
        """`PASS  0.412 <= 0.5   KL of ours-gptq / KL of llmc-gptq`."""
        return f"{'PASS' if self.ratio <= self.bar else 'FAIL'}  {self.ratio:.3f} <= {self.bar}   {self.what}"


def verdicts(scheme: str, rows: Sequence[Row]) -> list[Verdict]:
    """The comparisons that the rows at hand allow."""
    by_name = {row.name: row for row in rows if row.score is not None}
    peers = [row for row in by_name.values() if row.system != System.OURS]
    best_peer = min(peers, key=lambda row: row.divergence or 0.0, default=None)
    default = "llmc-gptq" if scheme == "W4A16" else "llmc-fp8"
    wanted: list[tuple[str, str | None, float, str, Callable[[Row], float | None]]] = []
    kl: Callable[[Row], float | None] = lambda row: row.divergence  # noqa: E731
    if scheme == "W4A16":
        wanted += [("ours-gptq", default, 0.5, "KL", kl), ("ours-best", default, 0.2, "KL", kl)]
    else:
        wanted += [("ours-best", default, 0.7, "KL", kl)]
    wanted += [("ours-best", best_peer.name if best_peer else None, 0.7, "KL", kl)]
    if scheme == "W4A16":
        wanted += [("ours-gptq", default, 0.1, "seconds", lambda row: row.seconds)]
        wanted += [("ours-best", default, 1.0, "seconds", lambda row: row.seconds)]
        wanted += [("ours-gptq", default, 0.1, "seconds inside", lambda row: row.inside_seconds)]
        wanted += [("ours-best", default, 1.0, "seconds inside", lambda row: row.inside_seconds)]
    return [v for ours, theirs, bar, what, of in wanted if (v := _verdict(by_name, ours, theirs, bar, what, of))]


def _verdict(
    rows: Mapping[str, Row],
    ours: str,
    theirs: str | None,
    bar: float,
    what: str,
    of: Callable[[Row], float | None],
) -> Verdict | None:
    if theirs is None or ours not in rows or theirs not in rows:
        return None
    mine, other = of(rows[ours]), of(rows[theirs])
    if mine is None or not other:
        return None
    return Verdict(what=f"{what} of {ours} / {what} of {theirs}", ratio=mine / other, bar=bar)


def mixed_verdict(rows: Sequence[Row], uniform: str) -> Verdict | None:
    """Mixed precision against a uniform row: the best mixed row that takes no more bytes in all."""
    by_name = {row.name: row for row in rows}
    base = by_name.get(uniform)
    if base is None or base.facts is None or not base.divergence:
        return None
    limit = base.facts.total_bytes
    fitting = [r for r in rows if r.name.startswith("mixed") and r.facts and r.facts.total_bytes <= limit]
    best = min(fitting, key=lambda row: row.divergence or 0.0, default=None)
    if best is None or best.divergence is None:
        return None
    what = f"KL of {best.name} / KL of {uniform}, at no more bytes"
    return Verdict(what=what, ratio=best.divergence / base.divergence, bar=MAX_MIXED_RATIO)
