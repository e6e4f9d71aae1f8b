"""One token of one sequence through all layers as one call of compiled code: what decoding is.

The layers say what they do (`record`, beside each `forward`), on a tape that is kept. It is recorded when it is first
needed, and again when anything has changed that it was recorded from. Where something cannot go on a tape, and for
anything but a single token with a cache, layers run one by one, with the same results bit by bit.

Shape letters: B batch, H hidden, P pairs of a head's features, T new tokens.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama4_quant.ops.native_tape import NotRecordableError, Tape, probe
from llama4_quant.runtime.attention import RecordedStep, Step
from llama4_quant.runtime.rope import Rotation

if TYPE_CHECKING:
    from llama4_quant.runtime.cache import KVCache
    from llama4_quant.runtime.cache_formats import LayerFormat
    from llama4_quant.runtime.text import TextModel

Formats = tuple["LayerFormat", ...]


class TokenStep:
    """The tapes of one model, one for every way to keep the cache; nothing in copies and pickles of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._origin: _Origin | None = None
        self._recordings: dict[Formats, _Recording | None] = {}

    def __reduce__(self) -> tuple[type[TokenStep], tuple[()]]:
        return TokenStep, ()

    def run(self, model: TextModel, x_BTH: Tensor, step: Step, cache: KVCache) -> Tensor | None:
        """`TextModel.forward` behind `make_step`, or None where the layers are to run one by one."""
        is_one = x_BTH.shape[:2] == (1, 1) and x_BTH.dtype is torch.bfloat16 and x_BTH.device.type == "cpu"
        if not is_one or type(x_BTH) is not Tensor or (x_BTH.requires_grad and torch.is_grad_enabled()):
            return None
        if not self._lock.acquire(blocking=False):  # another thread runs: its buffers are not ours
            return None
        try:
            recording = self._current(model, tuple(layer.format for layer in cache.layers))
            return None if recording is None else recording.run(x_BTH, step, cache)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recording:
    """A tape with its inputs and its result.

    Attributes:
        x_1H: the token's embedding; the residual stream while the tape runs.
        step: buffers for what the layers share.
        uses_rope: of each layer.
        y_1H: normalized hidden state.
    """

    tape: Tape
    x_1H: Tensor
    step: RecordedStep
    uses_rope: tuple[bool, ...]
    y_1H: Tensor

    def run(self, x_11H: Tensor, step: Step, cache: KVCache) -> Tensor:
        """[1, 1, H] -> [1, 1, H]; the layers' caches have the token then."""
        self.x_1H.copy_(x_11H[0])
        self.step.rotation.cos.copy_(step.rotation.cos)
        self.step.rotation.sin.copy_(step.rotation.sin)
        if self.step.temperature is not None and step.temperature is not None:
            self.step.temperature.copy_(step.temperature.view(1))
        for attention, layer, uses_rope in zip(self.step.attentions, cache.layers, self.uses_rope, strict=True):
            visible: Any = step.chunked if uses_rope else step.full  # segments: flex is not recorded
            key_slot, value_slot = layer.claim(step.past)
            attention.point(key_slot, value_slot, list(layer.stored(visible[0].key_start, step.past + 1)))
        self.tape.run()
        return self.y_1H.unsqueeze(0).clone()


def _record(model: TextModel, formats: Formats) -> _Recording | None:
    """None where a part cannot be recorded."""
    if probe() is not None:
        return None
    config = model.config
    with torch.inference_mode(mode=False), torch.no_grad():  # or buffers could not be written outside of it
        tape, x_1H = Tape(), torch.zeros(1, config.hidden_size, dtype=torch.bfloat16)
        rotation = Rotation(cos=torch.zeros(1, 1, config.head_dim // 2), sin=torch.zeros(1, 1, config.head_dim // 2))
        step = RecordedStep(rotation=rotation, temperature=torch.zeros(1) if config.attn_temperature_tuning else None)
        try:
            for layer, layer_format in zip(model.layers, formats, strict=True):
                tape.reuse_buffers()
                layer.record(tape, x_1H, step, layer_format)
            y_1H = model.norm.record(tape, x_1H)
        except NotRecordableError:
            return None
    return _Recording(tape=tape, x_1H=x_1H, step=step, uses_rope=tuple(config.rope_layers), y_1H=y_1H)
