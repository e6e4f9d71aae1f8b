"""Random damage to bytes and to JSON: wrong types, extreme numbers, keys twice, pieces cut out and put elsewhere.

JSON is changed as a tree, in which an object is a list of pairs, so that keys may occur twice; what comes out is JSON
that a lenient parser accepts, NaN and 1e999 included. All functions are deterministic in the generator they are given.
"""

import json
import random
from collections.abc import Callable
from typing import Any

EXTREMES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 31, 63, 64, 127, 128, 255, 256, 4095, 4096, 65536, 10**6, 10**9, 10**12),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**100, 10**400, -(2**63)),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, -1e300, 1e-30, 5e-324, 128.0),
    *(True, False, None, "", "0", "128", "x", "..", "../victim.bin", "/etc/passwd", "a/b", "\\", ".", "con\0", "é"),
    *("\x1b[2J", "\n", "\ud800", "re:.*", "re:(a*)*b", "re:(", "Linear", "BF16", "F32", "U8", "I64", "F8_E4M3", "int"),
    *("group", "channel", "float", "compressed-tensors", "llama3", "default", "model.safetensors", "bfloat16"),
)
"""Values that programs forget."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object."""


class Raw(str):
    """Text that goes into JSON as it is."""

    __slots__ = ()


RAW = tuple(
    map(Raw, ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E5", "9" * 4000, "9" * 5000, "[", "{}", "nul"])
)


def parse(data: bytes) -> Any:
    """The tree of some sound JSON."""
    return json.loads(data, object_pairs_hook=Pairs)


def render(value: Any) -> str:
    """The tree as text."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{render(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(render, value)) + "]"
    return json.dumps(value)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Some changes to the tree, and now and then to the text."""
    tree = parse(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        tree = _changed(tree, rng)
    text = render(tree).encode("utf-8", "surrogatepass")
    return mutate_bytes(text, rng) if rng.random() < 0.1 else text


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some changes to the bytes."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        data = rng.choice(_BYTES)(data, rng)
    return data


def _places(tree: Any) -> list[tuple[Any, int]]:
    """Every (container, index) of the tree; the index of an object counts its pairs."""
    found: list[tuple[Any, int]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            found += [(node, index) for index in range(len(node))]
            waiting += [item[1] if isinstance(node, Pairs) else item for item in node]
    return found


def _get(place: tuple[Any, int]) -> Any:
    node, index = place
    return node[index][1] if isinstance(node, Pairs) else node[index]


def _set(place: tuple[Any, int], value: Any) -> None:
    node, index = place
    node[index] = (node[index][0], value) if isinstance(node, Pairs) else value


def _copy(value: Any) -> Any:
    if isinstance(value, Pairs):
        return Pairs((key, _copy(item)) for key, item in value)
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _changed(tree: Any, rng: random.Random) -> Any:
    places = _places(tree)
    if not places:
        return rng.choice(EXTREMES)
    place = rng.choice(places)
    node, index = place
    kind = rng.randrange(10)
    if kind <= 3:
        _set(place, _another(_get(place), rng))
    elif kind == 4:
        del node[index]
    elif kind == 5:
        node.insert(rng.randrange(len(node) + 1), _copy_of_item(node[index]))
    elif kind == 6:
        _set(place, _copy(_get(rng.choice(places))))
    elif kind == 7 and isinstance(node, Pairs):
        node[index] = (_another_key(node, rng), node[index][1])
    elif kind == 8:
        _set(place, _wrapped(_get(place), rng))
    else:
        other = rng.choice(places)
        mine, theirs = _copy(_get(place)), _copy(_get(other))
        _set(place, theirs)
        _set(other, mine)
    return tree


def _copy_of_item(item: Any) -> Any:
    return (item[0], _copy(item[1])) if isinstance(item, tuple) else _copy(item)


def _another(value: Any, rng: random.Random) -> Any:
    """A value that is wrong in some way, or near the right one."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and rng.random() < 0.5:
        change: Callable[[Any], Any] = rng.choice(
            [lambda x: x + 1, lambda x: x - 1, lambda x: x * 2, lambda x: -x, lambda x: x // 2, float, str]
        )
        return change(value) if abs(value) < 2**70 else 0
    if isinstance(value, str) and rng.random() < 0.4:
        position = rng.randrange(len(value) + 1)
        return (
            value[:position]
            + rng.choice(["", "x", "/", "..", "\0", "\x1b", "0", "\ud800", "x" * 1000])
            + value[position:]
        )
    if rng.random() < 0.15:
        return rng.choice(RAW)
    return rng.choice([*EXTREMES, [], Pairs(), [value], [_copy(value)] * 3])


def _another_key(node: Pairs, rng: random.Random) -> str:
    keys = [key for key, _ in node]
    return rng.choice([rng.choice(keys), "", "__metadata__", "x", "\x1b", "\ud800", "x" * 2000, rng.choice(keys) + "0"])


def _wrapped(value: Any, rng: random.Random) -> Any:
    depth = rng.choice([1, 2, 10, 70, 5000])
    return Raw("[" * depth + render(value) + "]" * depth) if depth > 10 else [value]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 10])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 2, 8, 100, len(data)]) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice([b"\0", b"\xff" * 8, rng.randbytes(rng.randrange(20)), b"[" * 100]) + data[start:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    stop = start + rng.choice([1, 4, 30, 300])
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[start:stop] * rng.choice([1, 1, 3, 50]) + data[place:]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), rng.randrange(2**64)])
    width = rng.choice([1, 2, 4, 8])
    piece = (number % 2 ** (8 * width)).to_bytes(width, rng.choice(["little", "big"]))
    start = rng.randrange(max(1, len(data) - width + 1))
    return data[:start] + piece + data[start + width :]


_BYTES = (_flip, _flip, _cut, _insert, _repeat, _overwrite)
