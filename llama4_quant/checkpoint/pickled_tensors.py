"""What a pickle of `torch.save` says about tensors, found out without carrying it out.

A pickle is a program for a stack machine that can name any function and call it. torch's restricted unpickler
(`weights_only=True`) calls a few dozen known ones only; but `bytearray(10**11)` is among them, and a small pickle may
call them often. Here nothing is imported and nothing called: the instructions that `torch.save` uses are followed with
symbols in place of objects, so time and memory are bounded by the length of the pickle. Any other instruction, and any
name but those which plain tensors need, is refused.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch

from llama4_quant.checkpoint.json_files import shown

MAX_OPERATIONS = 500_000
"""Maverick's pickles have some 30 thousand."""

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_TYPED = {f"torch {name}": dtype for name, dtype in _STORAGES.items()}
_UNTYPED = "torch.storage UntypedStorage"
_DTYPES = {
    str(dtype).replace(".", " "): dtype
    for dtype in (*_STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
}
_TENSOR_2 = "torch._utils _rebuild_tensor_v2"
_TENSOR_3 = "torch._utils _rebuild_tensor_v3"
_PARAMETER = "torch._utils _rebuild_parameter"
_WITHOUT_MEANING = frozenset(  # hooks of tensors, and `_extra_state`: a file in memory
    ["collections OrderedDict", "_io BytesIO", "io BytesIO", "__builtin__ bytes", "builtins bytes", "_codecs encode"]
)
KNOWN = frozenset([*_TYPED, _UNTYPED, *_DTYPES, _TENSOR_2, _TENSOR_3, _PARAMETER, *_WITHOUT_MEANING])


class ForeignPickleError(ValueError):
    """A pickle that holds more than tensors, or is damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PickledTensor:
    """A strided tensor: `key` names the record of its storage; offset and strides count elements."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie side by side, in order."""
        expected = 1
        for size, stride in reversed(list(zip(self.shape, self.strides, strict=True))):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Name:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype | None


_MARK, _OPAQUE = object(), object()


def read_pickle(data: bytes) -> Any:
    """The object in a pickle: containers, numbers and strings as they are, tensors as `PickledTensor`.

    Raises:
        ForeignPickleError: damaged, or holds anything else.
    """
    machine = _Machine()
    try:
        for operation, argument, _ in islice(pickletools.genops(data), MAX_OPERATIONS):
            if operation.name == "STOP":
                return machine.pop()
            machine.step(operation.name, argument)
    except ForeignPickleError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ForeignPickleError(f"{type(problem).__name__} in it") from problem
    raise ForeignPickleError(f"it has more than {MAX_OPERATIONS:,} instructions")


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(argument)
        elif name in _FIXED:
            self._stack.append(_FIXED[name]())
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self._memo[argument] = self._stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            self._stack.append(self._memo[argument])
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name == "GLOBAL":
            self._stack.append(_known(argument))
        elif name != "PROTO":
            raise ForeignPickleError(f"it has the instruction {name}")

    def pop(self) -> Any:
        return self._stack.pop()

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark."""
        above: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            above.append(value)
        return above[::-1]

    def tuple_of(self, size: int) -> None:
        items = [self.pop() for _ in range(size)][::-1]
        self._stack.append(tuple(items))

    def marked_tuple(self) -> None:
        self._stack.append(tuple(self.pop_mark()))

    def append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError
        self._stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or not all(type(key) in {str, int} for key in items[::2]):
            raise TypeError
        target.update(zip(items[::2], items[1::2], strict=True))

    def persistent(self) -> None:
        kind, storage, key, _place, _size = self.pop()
        if kind != "storage" or not isinstance(key, str) or storage.name not in {*_TYPED, _UNTYPED}:
            raise TypeError
        self._stack.append(_Storage(key, _TYPED.get(storage.name)))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        self._stack.append(_called(function.name, arguments))

    def new(self) -> None:
        self.pop(), self.pop()
        self._stack.append(_OPAQUE)

    def build(self) -> None:
        self.pop()
        if self._stack[-1] is not _OPAQUE:
            raise TypeError


def _known(spaced: str) -> _Name:
    if spaced not in KNOWN:
        raise ForeignPickleError(f"it names {shown(spaced.replace(' ', '.'))}")
    return _Name(spaced)


def _called(name: str, arguments: Any) -> Any:
    if type(arguments) is not tuple:
        raise TypeError
    if name == _PARAMETER:
        return arguments[0]
    if name in _WITHOUT_MEANING:
        return _OPAQUE
    if name not in {_TENSOR_2, _TENSOR_3}:
        raise ForeignPickleError(f"it calls {shown(name)}")
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype if name == _TENSOR_2 else _DTYPES[arguments[6].name]
    if not isinstance(storage, _Storage) or dtype is None or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError
    if not all(type(size) is int and 0 <= size < 2**63 for size in (offset, *shape, *strides)):
        raise ForeignPickleError("a tensor in it has impossible sizes")
    if len(shape) != len(strides):
        raise ForeignPickleError("a tensor in it has more sizes than strides, or fewer")
    return PickledTensor(key=storage.key, dtype=dtype, offset=offset, shape=shape, strides=strides)


_CONSTANTS = frozenset(
    [
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINUNICODE",
    ]
)
_FIXED: MappingProxyType[str, Callable[[], Any]] = MappingProxyType(
    {
        "MARK": lambda: _MARK,
        "NONE": lambda: None,
        "NEWTRUE": lambda: True,
        "NEWFALSE": lambda: False,
        "EMPTY_TUPLE": tuple,
        "EMPTY_LIST": list,
        "EMPTY_DICT": dict,
    }
)
_ACTIONS: MappingProxyType[str, Callable[[_Machine], None]] = MappingProxyType(
    {
        "TUPLE": _Machine.marked_tuple,
        "TUPLE1": lambda machine: machine.tuple_of(1),
        "TUPLE2": lambda machine: machine.tuple_of(2),
        "TUPLE3": lambda machine: machine.tuple_of(3),
        "APPEND": lambda machine: machine.append([machine.pop()]),
        "APPENDS": lambda machine: machine.append(machine.pop_mark()),
        "SETITEM": lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
        "SETITEMS": lambda machine: machine.set_items(machine.pop_mark()),
        "BINPERSID": _Machine.persistent,
        "REDUCE": _Machine.call,
        "NEWOBJ": _Machine.new,
        "BUILD": _Machine.build,
    }
)
