r"""Module names and `re:` patterns out of a config.json: matched, or refused where matching could take for ever.

Python's `re` backtracks, so a pattern as short as `(a*)*b` needs years for a short name. The ways in which a pattern
can match are counted before it is used, from its choices: a repeated item can end at every character of the name, an
optional one has two ways, a group as many as it has alternatives; a repeated group is refused. What checkpoints have
(`re:.*lm_head`, `re:.*layers\.[0-9]+\..*(q|k|v)_proj$`) is far below the limit.
"""

import math
import re
import time
import warnings
from collections.abc import Iterable

from llama4_quant.checkpoint.json_files import shown
from llama4_quant.errors import ConfigError

PREFIX = "re:"
MAX_PATTERNS = 256
MAX_LENGTH = 500
MAX_WAYS = 2**20
"""Some milliseconds for a name; `.*a.*b.*c.*d` has 2^19.4."""
MAX_SECONDS = 5.0
"""For all names; Maverick's ten thousand take some hundredths of a second for a pattern."""
_NAME_LENGTH = 64
_CLASS = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
_GROUP = r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?"
_REPEAT = r"[*+]|\{[0-9]*,?[0-9]*\}"
_TOKEN = re.compile(
    rf"(?P<group>{_GROUP})|(?P<end>\))|(?P<bar>\|)|(?P<repeat>{_REPEAT})|(?P<maybe>\?)|\\.|{_CLASS}|.", re.DOTALL
)


class Patterns:
    """Some names and patterns; `items` are they, as the file has them."""

    def __init__(self, items: Iterable[str], where: str) -> None:
        """Check all patterns.

        Args:
            items: names, and patterns that start with `re:`.
            where: what messages open with.

        Raises:
            ConfigError: not a regular expression, or one that may take too long; or too many.
        """
        self.items = tuple(items)
        unique = set(self.items)
        patterns = sorted(item for item in unique if item.startswith(PREFIX))
        if len(patterns) > MAX_PATTERNS:
            raise ConfigError(f"{where}: {len(patterns):,} patterns, expected at most {MAX_PATTERNS}")
        self._names = unique.difference(patterns)
        self._patterns = [(item, _compiled(item.removeprefix(PREFIX), where)) for item in patterns]
        self._where = where
        self._seconds = 0.0

    def __contains__(self, name: str) -> bool:
        """Whether `name` stands in the list; patterns are not asked."""
        return name in self._names

    def first_match(self, name: str) -> str | None:
        """The alphabetically first pattern (with its `re:`) that matches from the start of `name`.

        Raises:
            ConfigError: matching has taken longer than any real list does.
        """
        started = time.perf_counter()
        found = next((item for item, pattern in self._patterns if pattern.match(name)), None)
        self._seconds += time.perf_counter() - started
        if self._seconds > MAX_SECONDS:
            raise ConfigError(f"{self._where}: matching its patterns takes more than {MAX_SECONDS:g} s; simplify them")
        return found


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    if len(pattern) > MAX_LENGTH or _num_ways(pattern) > MAX_WAYS:
        raise ConfigError(
            f"{where}: {shown(pattern)}: a pattern that could take too long to match; use fewer `*` and `+`, none of "
            "them after a group, and no flags"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about spellings whose meaning may change
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: {shown(pattern)} is not a regular expression: {error}") from error


def _num_ways(pattern: str) -> float:
    """An upper bound for the ways in which a pattern can match a name of `_NAME_LENGTH` characters."""
    ways, num_repeats, alternatives, before = 1.0, 0, [1], ""
    for token in _TOKEN.finditer(pattern):
        kind = token.lastgroup or ""
        if kind == "group":
            if pattern.startswith("?", token.end()):  # flags, comments, conditions, references
                return math.inf
            alternatives.append(1)
        elif kind == "end" and len(alternatives) > 1:
            ways *= alternatives.pop()
        elif kind == "bar":
            alternatives[-1] += 1
        elif kind == "repeat" and before not in {"repeat", "maybe"}:  # after these: possessive
            if before == "end":
                return math.inf
            num_repeats += 1
            ways *= _NAME_LENGTH / num_repeats  # their ends are in order
        elif kind == "maybe" and before != "repeat":  # after that: lazy
            ways *= 2
        before = kind
    return ways * math.prod(alternatives)
