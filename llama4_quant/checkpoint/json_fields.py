"""Typed access to a section of untrusted JSON: every value is checked for type and range when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama4_quant.checkpoint.json_files import named, shown
from llama4_quant.errors import ConfigError

LARGEST_INTEGER = 2**40
MAX_INTEGERS = 8192
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-30, 1e30
"""Squares, quotients and sums of such numbers are finite in Python's floats, and nearly all in float32."""
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object and the name by which messages call it.

    A value that is absent or null takes the default; without a default it is an error. All methods raise ConfigError
    that names section, key, expected and found.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, name: str) -> Any:
        """The raw value, or None."""
        return self.values.get(name)

    def section(self, name: str) -> "Fields":
        """A nested object, which must be there."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise self._error(name, "an object", value)
        return Fields(value, f"{self.where}: {named(name)}")

    def string(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._error(name, "a string", value)
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """True or false, or a number in their place (hub files have `attn_temperature_tuning: 4`)."""
        value = self._value(name, default)
        if not isinstance(value, (bool, int)):
            raise self._error(name, "true or false", value)
        return bool(value)

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 1, high: int = LARGEST_INTEGER) -> int:
        """An integer from `low` to `high`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(name, f"an integer from {low} to {high}", value)
        return value

    def optional_integer(self, name: str, default: int | None, *, low: int = 0) -> int | None:
        """An integer, or None where the key is there and null."""
        if name in self.values and self.values[name] is None:
            return None
        return default if name not in self.values else self.integer(name, low=low)

    def integers(self, name: str, *, most: int = MAX_INTEGERS) -> tuple[int, ...]:
        """A list of at most `most` non-negative integers, or a single one; absent is empty."""
        value = self.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if len(items) > most:
            raise ConfigError(f"{self.where}: {name} has {len(items):,} items, expected at most {most:,}")
        if any(type(item) is not int or not 0 <= item <= LARGEST_INTEGER for item in items):
            raise self._error(name, f"a list of integers from 0 to {LARGEST_INTEGER}", value)
        return tuple(items)

    def number(self, name: str, default: Any = _REQUIRED, *, low: float = SMALLEST_NUMBER) -> float:
        """A number of a size that float32 can hold, above zero unless `low` allows that."""
        value = self._value(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= LARGEST_NUMBER:
            raise self._error(name, f"a number from {low:g} to {LARGEST_NUMBER:g}", value)
        return float(value)

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing")
        return default

    def _error(self, name: str, expected: str, found: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {name} is {shown(found)}, expected {expected}")
