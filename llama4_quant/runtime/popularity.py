"""How much each routed expert has been used of late: what decides which of them are worth memory.

A prompt passes every expert of every layer in turn. Keeping the most recently used ones, a cache that is a little too
small would lose each of them just before its turn comes again; kept by popularity, what is in it stays, and a pass
finds as large a share of the experts as there is room for. Decoding has its favourites, which change with the subject:
counts fade, by half in `HALF_LIFE` rows (between LRU and LFU: Lee et al., "LRFU", IEEE Transactions on Computers 50,
2001).

While a pass is on its way, layers that it has been through have counted its rows and the others have not. What is
compared is therefore each expert's share of its own layer's rows.
"""

from collections.abc import Sequence

from llama4_quant.runtime.expert_tensors import Expert

HALF_LIFE = 128
"""Rows of a layer after which a use counts half. On routing of texts, on random tokens and on simulated preferences
that change, 64 to 256 find as much as LRU or more; 1,024 is too slow to follow a change."""


class Popularity:
    """Rows of every expert, older ones for less."""

    def __init__(self) -> None:
        self._rows: dict[int, list[float]] = {}
        self._shares: dict[Expert, float] = {}
        self._row_shares: dict[int, float] = {}

    def count(self, layer: int, rows: Sequence[int]) -> None:
        """Add the rows of a layer's experts, all of them in order; at least one has a row."""
        fading = 0.5 ** (sum(rows) / HALF_LIFE)
        before = self._rows.get(layer) or [0.0] * len(rows)
        now = self._rows[layer] = [old * fading + new for old, new in zip(before, rows, strict=True)]
        one = self._row_shares[layer] = 1 / sum(now)
        for expert, value in enumerate(now):
            self._shares[layer, expert] = value * one

    def share(self, expert: Expert) -> float:
        """Of its layer's rows, 0 to 1; 0 before any were counted."""
        return self._shares.get(expert, 0.0)

    def is_ahead(self, expert: Expert, other: Expert) -> bool:
        """By more than one row: enough that one takes the other's place, and they do not change places all the time."""
        return self.share(expert) > self.share(other) + self._row_shares.get(expert[0], 1.0)
