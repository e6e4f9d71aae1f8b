"""One token of one sequence through all layers as one call of compiled code: what decoding is.

The layers say what they do (`record`, beside each `forward`), on a tape that is kept. It is recorded when it is first
needed, and again when anything has changed that it was recorded from. Where something cannot go on a tape, and for
anything but a single token with a cache, layers run one by one, with the same results bit by bit.

Shape letters: B batch, H hidden, P pairs of a head's features, T new tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llama4_quant.ops.native_tape import NotRecordableError, Tape, probe
from llama4_quant.runtime.attention import RecordedStep, query_temperature
from llama4_quant.runtime.rope import Rotation
from llama4_quant.runtime.visibility import plan_segments

if TYPE_CHECKING:
    from llama4_quant.runtime.cache import KVCache
    from llama4_quant.runtime.cache_formats import LayerFormat
    from llama4_quant.runtime.text import TextModel

Formats = tuple["LayerFormat", ...]
_POSITIONS = 256


class TokenStep:
    """The tapes of one model, one for every way to keep the cache; nothing in copies and pickles of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._origin: _Origin | None = None
        self._recordings: dict[Formats, _Recording | None] = {}

    def __reduce__(self) -> tuple[type[TokenStep], tuple[()]]:
        return TokenStep, ()

    def run(self, model: TextModel, x_BTH: Tensor, padding: Sequence[int], cache: KVCache) -> Tensor | None:
        """`TextModel.forward`, or None where the layers are to run one by one."""
        is_one = x_BTH.shape[:2] == (1, 1) and x_BTH.dtype is torch.bfloat16 and x_BTH.device.type == "cpu"
        if not is_one or type(x_BTH) is not Tensor or (x_BTH.requires_grad and torch.is_grad_enabled()):
            return None
        if not self._lock.acquire(blocking=False):  # another thread runs: its buffers are not ours
            return None
        try:
            recording = self._current(model, tuple(layer.format for layer in cache.layers))
            return None if recording is None else recording.run(x_BTH, padding[0], cache)
        finally:
            self._lock.release()

    def _current(self, model: TextModel, formats: Formats) -> _Recording | None:
        if self._origin is None or not self._origin.is_unchanged():
            self._recordings.clear()
            self._origin = _Origin.of(model)
        if self._origin.has_hooks():
            return None
        if formats not in self._recordings:
            self._recordings[formats] = _record(model, formats)
        return self._recordings[formats]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """What a tape was recorded from: modules, and where their weights lie; and the number of threads."""

    modules: tuple[tuple[nn.Module, tuple[nn.Module | None, ...], list[int]], ...]
    num_threads: int

    @classmethod
    def of(cls, model: TextModel) -> _Origin:
        modules = tuple(
            (module, tuple(module._modules.values()), _addresses(module))  # noqa: SLF001 - as `children`, but quick
            for root in (model.layers, model.norm)
            for module in root.modules()
        )
        return cls(modules=modules, num_threads=torch.get_num_threads())

    def is_unchanged(self) -> bool:
        """Whether a tape still computes what the modules do."""
        return self.num_threads == torch.get_num_threads() and all(
            tuple(module._modules.values()) == children and _addresses(module) == addresses  # noqa: SLF001
            for module, children, addresses in self.modules
        )

    def has_hooks(self) -> bool:
        """Whether somebody wants to see what single modules do."""
        return any(module._forward_hooks or module._forward_pre_hooks for module, *_ in self.modules)  # noqa: SLF001


def _addresses(module: nn.Module) -> list[int]:
    return [p.data_ptr() for p in module._parameters.values() if p is not None]  # noqa: SLF001


class _Recording:
    """A tape with its inputs and its result, and what depends on position for the tokens near the last one."""

    def __init__(self, model: TextModel, formats: Formats) -> None:
        """Record.

        Raises:
            NotRecordableError: a part runs in torch.
        """
        config = model.config
        self._rotary, self._floor_scale, self._attn_scale = model.rotary, config.floor_scale, config.attn_scale
        self._chunk_sizes = tuple(config.attention_chunk_size if rope else None for rope in config.rope_layers)
        self._tape, self._x_1H = Tape(), torch.zeros(1, config.hidden_size, dtype=torch.bfloat16)
        angles = torch.zeros(1, 1, config.head_dim // 2)
        temperature = torch.zeros(1) if config.attn_temperature_tuning else None
        self._step = RecordedStep(rotation=Rotation(cos=angles, sin=angles.clone()), temperature=temperature)
        self._y_1H = model.record(self._tape, self._x_1H, self._step, formats)
        self._first_position: int | None = None

    def run(self, x_11H: Tensor, padding: int, cache: KVCache) -> Tensor:
        """[1, 1, H] -> [1, 1, H]; the layers' caches have the token then."""
        column = cache.length
        self._x_1H.copy_(x_11H[0])
        self._place(max(0, column - padding))
        starts = {
            chunk_size: plan_segments((padding,), column, 1, chunk_size, x_11H.device)[0].key_start
            for chunk_size in set(self._chunk_sizes)
        }
        layers = zip(self._step.attentions, cache.layers, self._chunk_sizes, strict=True)
        for attention, layer, chunk_size in layers:
            layer.claim(column + 1)
            attention.point(layer.pieces(starts[chunk_size], column + 1))
        self._tape.run()
        return self._y_1H.unsqueeze(0).clone()

    def _place(self, position: int) -> None:
        """Fill the buffers that depend on position; computed for some positions at a time, since each call costs."""
        first = position // _POSITIONS * _POSITIONS
        if first != self._first_position:
            positions_1T = torch.arange(first, first + _POSITIONS).unsqueeze(0)
            self._rotations: Rotation = self._rotary(positions_1T)
            self._temperatures = query_temperature(positions_1T, self._floor_scale, self._attn_scale).flatten()
            self._first_position = first
        index = position - first
        self._step.rotation.cos[0, 0] = self._rotations.cos[0, index]
        self._step.rotation.sin[0, 0] = self._rotations.sin[0, index]
        if self._step.temperature is not None:
            self._step.temperature[0] = self._temperatures[index]


def _record(model: TextModel, formats: Formats) -> _Recording | None:
    """None where a part cannot be recorded."""
    if probe() is not None:
        return None
    try:
        with torch.inference_mode(mode=False), torch.no_grad():  # or buffers could not be written outside of it
            return _Recording(model, formats)
    except NotRecordableError:
        return None
