"""Loading: from a BF16 checkpoint, from a quantized one, or from a BF16 one that is quantized on the way in.

Every tensor streams from its file straight into its place in the model. On the fly, each expert slice goes through
the same quantizers as in offline conversion and its packed weights are bit-identical; a BF16 copy of the model never
exists.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from llama4_quant.architecture import LinearSpec, Role, linear_specs
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import open_source
from llama4_quant.config import Llama4Config
from llama4_quant.errors import CheckpointError, UsageError
from llama4_quant.ops import Kernel
from llama4_quant.planning.make import make_plan
from llama4_quant.quantizers.backend import Backend, choose_backend
from llama4_quant.runtime import flex
from llama4_quant.runtime.attention import Attention
from llama4_quant.runtime.cache_formats import CacheScales
from llama4_quant.runtime.expert_store import Offload
from llama4_quant.runtime.head import HeadFiller, head_scheme, refuse_second_scheme
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.scheme import Scheme, WeightScheme, preset
from llama4_quant.stored import (
    StoredWeight,
    cache_scale_names,
    quantization_section,
    quantized_weights,
    read_cache_scale,
)
from llama4_quant.stream import Piece, Progress, encode_piece, quantize_piece, read_pieces
from llama4_quant.work import CHUNK_BYTES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(
    path_or_id: str | Path,
    scheme: str | Scheme | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.bfloat16,
    *,
    revision: str | None = None,
    attention: str = "sdpa",
    kernel: str = "auto",
    lm_head: str | None = None,
    offload: str | None = None,
    expert_cache: int | str | None = None,
    progress: Progress | None = None,
) -> Llama4Model:
    """Load a Llama 4 for inference.

    Args:
        path_or_id: a local directory, or a Hub id; BF16, or quantized in compressed-tensors layout.
        scheme: quantize a BF16 checkpoint while loading: "W4A16", "FP8_DYNAMIC", "FP8_BLOCK", or a Scheme with
            settings (see `preset`).
        device: where the model goes.
        dtype: compute dtype, and dtype of weights that are not quantized.
        revision: branch, tag or commit of a Hub id.
        attention: "sdpa", "eager", or "flex" where torch can compile its `flex_attention`.
        kernel: what multiplies with the weights: "native", "torch", "reference", or "auto" for the first of these that
            can, weight by weight; `model.kernels()` says what it became.
        lm_head: quantize the head while loading, whatever else is quantized: "int8" or "int4".
        offload: "experts": leave routed experts in the checkpoint's files, which have to stay where they are, and read
            them when tokens are routed to them: for models larger than memory.
        expert_cache: with `offload`: bytes of memory, or a size such as "8GiB", for the most used experts.
            Default: the kernel's page cache decides; for a BF16 checkpoint, whose experts have to be turned over, a
            quarter of the machine's memory.
        progress: called after each piece of work.

    Raises:
        Llama4QuantError: not a usable checkpoint, or settings that do not fit it.
    """
    target = _placement(device, dtype, attention, kernel, lm_head, Offload.parse(offload, expert_cache, scheme))
    with open_source(str(path_or_id), revision) as reader:
        config = Llama4Config.from_dict(reader.config)
        if scheme is None and quantization_section(config) is not None:
            return _load_quantized(config, reader, target, progress)
        plan = make_plan(config, None if scheme is None else preset(scheme), reader.tensors)
        model = target.model(config, {decision.name: decision.scheme for decision in plan.decisions})
        filler = _Filler(model, progress, target.head, None if scheme is None else choose_backend())
        for tensor in plan.tensors:
            if not (target.offload and tensor.spec.role is Role.ROUTED_EXPERT):
                for piece in read_pieces(reader, tensor):
                    filler.put_piece(piece)
        if target.offload:
            model.attach_experts(target.offload.of_source(reader, linear_specs(config), model.dtype, model.device))
        model.repack()
        return model


def load_size(path_or_id: str | Path, *, revision: str | None = None) -> int:
    """Bytes of tensors that `load` will read, for a progress bar."""
    with open_source(str(path_or_id), revision) as reader:
        return sum(entry.nbytes for entry in reader.tensors.values())


class _Target:
    """Where the model goes and how it computes.

    Attributes:
        head: how the head is to be stored, None as the checkpoint has it.
        offload: how routed experts stay in the file; None in memory.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        attention: Attention,
        kernel: Kernel,
        head: WeightScheme | None,
        offload: Offload | None,
    ) -> None:
        self._device, self._dtype, self._attention, self._kernel = device, dtype, attention, kernel
        self.head, self.offload = head, offload

    def model(self, config: Llama4Config, schemes: Mapping[str, WeightScheme | None]) -> Llama4Model:
        """A model with uninitialized weights, whose linear weights are stored as `schemes` says by name."""
        if self.head is not None:
            refuse_second_scheme(f"{config.prefix}lm_head", schemes.get(f"{config.prefix}lm_head"))
        model = Llama4Model(
            config,
            scheme_of=schemes.__getitem__,
            dtype=self._dtype,
            attention=self._attention,
            kernel=self._kernel,
            lm_head=self.head,
            offload_experts=self.offload is not None,
        )
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        try:
            return model.materialize(self._device).eval()
        except RuntimeError as error:  # out of memory, in the words of each device
            raise UsageError(
                f"no memory for {num_bytes:,} bytes of weights on {self._device}: {str(error).splitlines()[0]}; "
                "quantize while loading (scheme), or choose another device"
            ) from error


def _placement(
    device: str | torch.device,
    dtype: str | torch.dtype,
    attention: str,
    kernel: str = "auto",
    lm_head: str | None = None,
    offload: Offload | None = None,
) -> _Target:
    """Check what a user chose, before a file is opened."""
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise UsageError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")
    if attention not in set(Attention):
        raise UsageError(f"attention {attention!r} is unknown; use one of {', '.join(Attention)}")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!s} cannot be used here: {str(error).splitlines()[0]}") from error
    assert chosen is not None
    if attention == Attention.FLEX:
        flex.require(place, chosen)
    return _Target(place, chosen, Attention(attention), Kernel.parse(kernel), head_scheme(lm_head), offload)


def _load_quantized(
    config: Llama4Config, reader: CheckpointReader, target: _Target, progress: Progress | None
) -> Llama4Model:
    weights = quantized_weights(config, reader.tensors)
    model = target.model(config, {weight.name: weight.scheme for weight in weights})
    filler = _Filler(model, progress, target.head)
    for weight in weights:
        if not (target.offload and weight.role is Role.ROUTED_EXPERT):
            filler.put_stored(weight, reader)
    if target.offload:
        model.attach_experts(target.offload.of_quantized(reader, weights, model.dtype, model.device))
    for layer, (key, value) in enumerate(cache_scale_names(config, reader.tensors)):
        scales = CacheScales(key=read_cache_scale(reader, key), value=read_cache_scale(reader, value))
        model.use_cache_scales(layer, scales)
    model.repack()
    return model


class _Filler:
    """Copies what was read into a model's buffers, and refuses what cannot be right."""

    def __init__(
        self,
        model: Llama4Model,
        progress: Progress | None,
        head: WeightScheme | None,
        backend: Backend | None = None,
    ) -> None:
        self._model = model
        self._head: HeadFiller | None = None
        if head is not None:
            assert model.lm_head is not None
            self._head = HeadFiller(model.config, model.lm_head.stored(), head)
        self._plain = model.plain_targets()
        self._progress = progress
        self._backend = backend

    def put_piece(self, piece: Piece) -> None:
        """Rows of a BF16 weight, quantized here if the plan says so."""
        decision = piece.decision
        if decision.scheme is None:
            self._put_rows(decision.name, decision.linear, "weight", piece.row_start, piece.values)
        else:
            assert self._backend is not None
            for part in encode_piece(piece, quantize_piece(piece, self._backend)):
                suffix = part.name.rpartition(".")[2]
                if suffix != "weight_shape":
                    self._put_rows(decision.name, decision.linear, suffix, part.row_start, part.values)
        self._advance(decision.name, piece.num_bytes)

    def put_stored(self, weight: StoredWeight, reader: CheckpointReader) -> None:
        """All tensors of a weight of a quantized checkpoint, in chunks."""
        for name in weight.tensors:
            suffix = name.rpartition(".")[2]
            if suffix == "weight_shape":
                self._check_shape(weight, reader.read(name))
                continue
            for start, stop in _chunks(reader.tensors[name].shape, reader.tensors[name].nbytes):
                self._put_rows(weight.name, weight.linear, suffix, start, reader.read_rows(name, start, stop))
            self._advance(weight.name, reader.tensors[name].nbytes)

    def _put_rows(
        self, name: str, linear: LinearSpec | None, suffix: str, row_start: int, values: torch.Tensor
    ) -> None:
        """Some rows of one tensor of a weight."""
        if self._head is not None and name == self._head.source:
            self._head.put(row_start, values)
            if not self._head.is_tied:
                return
        target = self._plain[name] if linear is None else self._model.linear_target(linear)[suffix]
        target[row_start : row_start + len(values)].copy_(values)

    def _check_shape(self, weight: StoredWeight, stored: torch.Tensor) -> None:
        if tuple(stored.tolist()) != weight.shape:
            raise CheckpointError(
                f"{weight.name}.weight_shape says {stored.tolist()}, but config.json asks for {list(weight.shape)}"
            )

    def _advance(self, name: str, num_bytes: int) -> None:
        if self._progress is not None:
            self._progress(name, num_bytes)


def _chunks(shape: Sequence[int], nbytes: int) -> Iterable[tuple[int, int]]:
    """Ranges of dimension 0 of at most CHUNK_BYTES."""
    step = max(1, shape[0] * CHUNK_BYTES // max(nbytes, 1))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
