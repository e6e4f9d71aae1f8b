"""Texts that end a text, found wherever token boundaries are."""

from collections.abc import Sequence


class StopFinder:
    """Passes text through up to the first stop string, and holds back what may be the beginning of one.

    What comes out does not depend on how the text is cut into pieces: the stop string that is complete first ends the
    text, and of several that are complete at the same character the longest.

    Attributes:
        found: the stop string that ended the text, or None so far.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for these, none of them empty."""
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain now and was not before; may be empty."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back: no more text comes, so it was no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, which is not in it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
