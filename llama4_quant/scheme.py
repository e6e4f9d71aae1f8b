"""Quantization schemes: how a weight is stored, as data.

A `WeightScheme` says everything that decides the stored bytes of one weight. A `Scheme` is what a user asks for by
name (`W4A16`, `FP8_DYNAMIC`, `FP8_BLOCK`). Names and terms are those of compressed-tensors.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llama4_quant.errors import SchemeError

INT4_GROUP_SIZES = (32, 64, 128, -1)
FP8_BLOCK_SIZE = 128


class Observer(StrEnum):
    """How a scale is chosen from the weights that it covers."""

    ABSMAX = "absmax"
    """The largest magnitude lands on the edge of the grid."""
    MSE = "mse"
    """A search for the scale with the least squared rounding error; never worse than ABSMAX."""


class Strategy(StrEnum):
    """Which weights share one scale."""

    GROUP = "group"
    """`group_size` consecutive inputs of one output row."""
    CHANNEL = "channel"
    """One output row."""
    BLOCK = "block"
    """A tile of 128 outputs x 128 inputs."""


class WeightType(StrEnum):
    """The number format of the codes."""

    INT4 = "int4"
    INT8 = "int8"
    """For a head that is quantized while loading; no checkpoint has it."""
    FP8 = "fp8"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScheme:
    """Storage of one [out, in] weight.

    Attributes:
        type: INT4 (signed codes -8..7, eight to an int32), INT8 (codes -127..127) or FP8 (e4m3fn).
        strategy: which weights share a scale.
        group_size: inputs per scale for `Strategy.GROUP`, else None.
        observer: how scales are chosen; it does not change the layout.
    """

    type: WeightType
    strategy: Strategy
    group_size: int | None = None
    observer: Observer = Observer.MSE

    def __post_init__(self) -> None:
        allowed = {
            WeightType.INT4: (Strategy.GROUP, Strategy.CHANNEL),
            WeightType.INT8: (Strategy.CHANNEL,),
            WeightType.FP8: (Strategy.CHANNEL, Strategy.BLOCK),
        }
        if self.strategy not in allowed[self.type] or (self.group_size is None) == (self.strategy is Strategy.GROUP):
            raise SchemeError(f"no {self.type} weights with strategy {self.strategy} and group_size {self.group_size}")

    @property
    def label(self) -> str:
        """For tables: `int4 g128`, `int4 channel`, `fp8 channel`, `fp8 128x128`."""
        if self.strategy is Strategy.BLOCK:
            return f"{self.type} {FP8_BLOCK_SIZE}x{FP8_BLOCK_SIZE}"
        return f"{self.type} {self.strategy if self.group_size is None else f'g{self.group_size}'}"

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of an [out_features, in_features] weight."""
        if self.strategy is Strategy.CHANNEL:
            return (out_features, 1)
        if self.strategy is Strategy.BLOCK:
            return (-(-out_features // FP8_BLOCK_SIZE), -(-in_features // FP8_BLOCK_SIZE))
        assert self.group_size is not None
        return (out_features, in_features // self.group_size)

    def check_divides(self, name: str, in_features: int) -> None:
        """Raise SchemeError if this scheme cannot store a weight with `in_features` inputs."""
        size = FP8_BLOCK_SIZE if self.strategy is Strategy.BLOCK else self.group_size
        if size is None or in_features % size == 0:
            return
        fits = [str(g) for g in INT4_GROUP_SIZES if g > 0 and in_features % g == 0]
        other = f"use --group-size {' or '.join([*fits, '-1'])}" if self.type is WeightType.INT4 else "use FP8_DYNAMIC"
        raise SchemeError(
            f"{name}: in_features {in_features} is not divisible by {self.strategy} size {size}; {other}, or leave "
            f"this weight alone with --ignore '{name}'"
        )


class KVCacheScheme(StrEnum):
    """How serving keeps keys and values."""

    FP8 = "fp8"
    """e4m3fn, with one static scale for the keys of a layer and one for its values."""

    @classmethod
    def parse(cls, name: str | None) -> "KVCacheScheme | None":
        """Look up a scheme by name; None is none.

        Raises:
            SchemeError: unknown; lists the known ones.
        """
        if name is not None and name not in set(cls):
            raise SchemeError(f"unknown KV-cache scheme {name!r}; known schemes: {', '.join(cls)}")
        return None if name is None else cls(name)


SchemeLookup = Callable[[str], WeightScheme | None]
"""From a linear weight's name (`LinearSpec.name`) to how it is stored; None is unquantized."""


class SchemeName(StrEnum):
    """Schemes that can be asked for by name."""

    W4A16 = "W4A16"
    FP8_DYNAMIC = "FP8_DYNAMIC"
    FP8_BLOCK = "FP8_BLOCK"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A named scheme with its settings: everything that a user chooses about quantization. Made by `preset`.

    Attributes:
        weights: how every quantized weight is stored.
        quantize: roles that are quantized besides routed experts, shared expert and dense MLP.
        ignore: weights to leave in BF16: names, or `re:` patterns matched from the start of the name.
    """

    name: SchemeName
    weights: WeightScheme
    quantize: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For tables and messages: `W4A16 (int4 g128, mse)`."""
        return f"{self.name} ({self.weights.label}, {self.weights.observer})"


def preset(
    name: str | Scheme,
    *,
    group_size: int | None = None,
    observer: str = "mse",
    quantize: Collection[str] = (),
    ignore: Sequence[str] = (),
) -> Scheme:
    """Look up a scheme by name.

    Args:
        name: `W4A16`, `FP8_DYNAMIC` or `FP8_BLOCK`; case, `-` and `_` do not matter. A Scheme is given back as it is.
        group_size: for W4A16: 32, 64, 128 (default), or -1 for one scale per output channel.
        observer: `absmax` or `mse`.
        quantize: roles to add: `attention`, `lm-head`, `vision`, `projector`.
        ignore: weights to leave in BF16, by name or `re:` pattern.

    Raises:
        SchemeError: unknown name, observer or group size; lists the known ones.
    """
    if isinstance(name, Scheme):
        return name
    by_spelling = {_spelling(known): known for known in SchemeName}
    if _spelling(name) not in by_spelling:
        raise SchemeError(f"unknown scheme {name!r}; known schemes: {', '.join(SchemeName)}")
    known = by_spelling[_spelling(name)]
    if observer not in set(Observer):
        raise SchemeError(f"unknown observer {observer!r}; known observers: {', '.join(Observer)}")
    weights = _weights(known, group_size, Observer(observer))
    return Scheme(name=known, weights=weights, quantize=tuple(quantize), ignore=tuple(ignore))


def _spelling(name: str) -> str:
    return name.upper().replace("-", "").replace("_", "")


def _weights(name: SchemeName, group_size: int | None, observer: Observer) -> WeightScheme:
    if name is not SchemeName.W4A16:
        if group_size is not None:
            raise SchemeError(f"--group-size is for W4A16; {name} has no groups")
        strategy = Strategy.CHANNEL if name is SchemeName.FP8_DYNAMIC else Strategy.BLOCK
        return WeightScheme(type=WeightType.FP8, strategy=strategy, observer=observer)
    size = 128 if group_size is None else group_size
    if size not in INT4_GROUP_SIZES:
        raise SchemeError(f"group size {size} is not supported; use one of {', '.join(map(str, INT4_GROUP_SIZES))}")
    if size == -1:
        return WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL, observer=observer)
    return WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=size, observer=observer)
