"""`quantization_config` of config.json in compressed-tensors' spelling, as it is read.

That is wider than what is written (quantization_config.py): several groups, targets by class, name or `re:` pattern,
presets by name, formats per group or for all, older spellings. Whatever this project cannot store or run is refused by
name, since a setting that is skipped silently gives a model that computes something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from llama4_quant.checkpoint.json_fields import Fields
from llama4_quant.checkpoint.json_files import named, shown
from llama4_quant.errors import ConfigError
from llama4_quant.formats.patterns import Patterns
from llama4_quant.formats.quantization_config import FORMATS, FP8_ACTIVATIONS, FP8_CACHE, LINEAR, QUANT_METHOD
from llama4_quant.scheme import (
    FP8_BLOCK_SIZE,
    INT4_GROUP_SIZES,
    Observer,
    SchemeName,
    Strategy,
    WeightScheme,
    WeightType,
    preset,
)

SUPPORTED = "W4A16 (symmetric int4, group or channel), FP8_DYNAMIC and FP8_BLOCK"
_WHERE = "config.json: quantization_config"
_CACHE_DEFAULTS = FP8_CACHE | {"type": "int"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedQuantization:
    """Which module is quantized how.

    Attributes:
        targets: scheme by target: a class name ("Linear"), a full module name, or a `re:` pattern.
        targeted: the targets, ready to be matched.
        ignored: modules left alone, spelled like targets.
        kv_cache_scheme: settings of a quantized KV cache, kept as they were found.
    """

    targets: Mapping[str, WeightScheme]
    targeted: Patterns
    ignored: Patterns
    kv_cache_scheme: Mapping[str, Any] | None

    @property
    def fp8_cache(self) -> bool:
        """Whether the KV cache is FP8 with one static scale each for keys and values; other schemes are not applied."""
        found = self.kv_cache_scheme
        if found is None:
            return False
        return all(found.get(name, default) == FP8_CACHE[name] for name, default in _CACHE_DEFAULTS.items())

    def scheme_of(self, name: str) -> WeightScheme | None:
        """The scheme of the linear module `name`, or None if it is not quantized.

        A full name wins over a pattern and a pattern over the class; of several patterns, the alphabetically first.

        Raises:
            ConfigError: matching the patterns takes too long.
        """
        if name in self.ignored or LINEAR in self.ignored or self.ignored.first_match(name):
            return None
        if name in self.targets:
            return self.targets[name]
        return self.targets.get(self.targeted.first_match(name) or LINEAR)


def parse_quantization_config(config: Mapping[str, Any]) -> ParsedQuantization:
    """Read the `quantization_config` of a compressed-tensors checkpoint.

    Raises:
        ConfigError: malformed, or something that this project does not support; the message names it.
    """
    fields = Fields(config, _WHERE)
    _require(fields, "quant_method", (QUANT_METHOD,))
    _require(fields, "quantization_status", ("compressed", "frozen", None))
    for unsupported in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        _check_unused(fields, unsupported)
    targets: dict[str, WeightScheme] = {}
    groups = fields.section("config_groups")
    for group_name, group in groups.values.items():
        group_targets, scheme = _parse_group(groups.where, group_name, group, fields)
        targets |= dict.fromkeys(group_targets, scheme)
    return ParsedQuantization(
        targets=MappingProxyType(targets),
        targeted=Patterns(targets, f"{groups.where}: targets"),
        ignored=Patterns(_strings(fields, "ignore"), f"{_WHERE}: ignore"),
        kv_cache_scheme=None if fields.get("kv_cache_scheme") is None else fields.section("kv_cache_scheme").values,
    )


def _parse_group(where: str, name: str, group: Any, config: Fields) -> tuple[tuple[str, ...], WeightScheme]:
    """Targets and scheme of one group."""
    if isinstance(group, list):  # short form: a preset's name and its targets
        short = Fields({name: group}, where)
        return _strings(short, name), _parse_preset(where, name)
    fields = Fields({name: group}, where).section(name)
    if fields.get("weights") is None:
        raise _unsupported(fields, "weights null (only activations are quantized)")
    scheme = _parse_weights(fields.section("weights"))
    _check_unused(fields, "output_activations")
    _check_activations(fields, scheme)
    storage = fields.get("format") or config.get("format")
    if storage not in FORMATS[scheme.type]:
        raise _unsupported(fields, f"format {shown(storage)} for {scheme.type} weights")
    return _strings(fields, "targets"), scheme


def _parse_preset(where: str, name: str) -> WeightScheme:
    if name.upper() not in set(SchemeName):
        raise ConfigError(f"{where}: the preset {shown(name)} is not supported; supported: {SUPPORTED}")
    return preset(name).weights


def _parse_weights(fields: Fields) -> WeightScheme:
    """The scheme of a `weights` section; absent keys have the defaults of compressed-tensors."""
    kind, num_bits = fields.string("type", "int").lower(), fields.integer("num_bits", 8)
    types = {("int", 4): WeightType.INT4, ("float", 8): WeightType.FP8}
    if (kind, num_bits) not in types:
        raise _unsupported(fields, f"{num_bits}-bit {named(kind)} weights")
    if not fields.boolean("symmetric", default=True):
        raise _unsupported(fields, "asymmetric weights (symmetric false)")
    _require(fields, "dynamic", (False, None))
    _require(fields, "actorder", (None, False, "weight", "static"))  # these permute nothing in the file
    weight_type = types[kind, num_bits]
    strategy, group_size = _parse_strategy(fields, weight_type)
    is_mse = "mse" in fields.string("observer", "")
    return WeightScheme(
        type=weight_type,
        strategy=strategy,
        group_size=group_size,
        observer=Observer.MSE if is_mse else Observer.ABSMAX,
    )


def _parse_strategy(fields: Fields, weight_type: WeightType) -> tuple[Strategy, int | None]:
    group_size = fields.integer("group_size", -1, low=-1)
    default = "group" if group_size > 0 else "channel" if fields.get("group_size") == -1 else "tensor"
    strategy = fields.string("strategy", default).lower()
    if weight_type is WeightType.INT4 and strategy == "group":
        if group_size not in INT4_GROUP_SIZES or group_size < 0:
            raise _unsupported(fields, f"group_size {shown(fields.get('group_size'))}")
        return Strategy.GROUP, group_size
    if strategy == "channel":
        return Strategy.CHANNEL, None
    if weight_type is WeightType.FP8 and strategy == "block":
        _require(fields, "block_structure", ([FP8_BLOCK_SIZE, FP8_BLOCK_SIZE], f"{FP8_BLOCK_SIZE}x{FP8_BLOCK_SIZE}"))
        return Strategy.BLOCK, None
    raise _unsupported(fields, f"{weight_type} weights with strategy {shown(strategy)}")


def _check_activations(group: Fields, scheme: WeightScheme) -> None:
    """Refuse input activations other than those which belong to `scheme`."""
    if scheme.type is WeightType.INT4:
        _check_unused(group, "input_activations")
        return
    if group.get("input_activations") is None:
        raise _unsupported(group, "fp8 weights without input_activations")
    fields = group.section("input_activations")
    strategy, group_size = FP8_ACTIVATIONS[scheme.strategy]
    _require(fields, "type", ("float",))
    _require(fields, "num_bits", (8, None))
    _require(fields, "symmetric", (True, None))
    _require(fields, "dynamic", (True,))
    _require(fields, "strategy", (strategy,))
    _require(fields, "group_size", (group_size,))


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    """A list of names and `re:` patterns; absent or null is empty."""
    value = fields.get(name)
    items = [] if value is None else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{fields.where}: {named(name)} is not a list of strings")
    return tuple(items)


def _require(fields: Fields, name: str, allowed: tuple[Any, ...]) -> None:
    value = fields.get(name)
    # `1 == True` in Python, but not in JSON.
    if not any(value == known and type(value) is type(known) for known in allowed):
        raise _unsupported(fields, f"{name} {shown(value)}")


def _check_unused(fields: Fields, name: str) -> None:
    if fields.get(name):
        raise _unsupported(fields, f"{name} (it is {shown(fields.get(name))})")


def _unsupported(fields: Fields, what: str) -> ConfigError:
    return ConfigError(f"{fields.where}: {what} is not supported; supported: {SUPPORTED}")
