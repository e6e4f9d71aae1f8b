"""Meta's own FP8 layout: the state dict of each model-parallel rank, and the scales of its FP8 weights beside it.

    consolidated.NN.pth    all tensors of rank NN, named and split as in BF16 checkpoints (checkpoint/meta_names.py)
    fp8_scales_N.pt        float32 scales of rank N
    params.json            as in BF16 checkpoints

FP8 are the routed experts of all MoE layers but the first and the last layer of the model, and nothing else: that is
what Meta's loader makes of a checkpoint (`fp8_mixed`), so it is not for a user to choose. In each rank

    feed_forward.experts.moe_w_in_eD_F      e4m3fn [E * D, F / ranks]    scales experts.w1    fp32 [E, F / ranks]
    feed_forward.experts.moe_w_swiglu_eD_F  e4m3fn [E * D, F / ranks]    scales experts.w3    fp32 [E, F / ranks]
    feed_forward.experts.moe_w_out_eF_D     e4m3fn [E * F / ranks, D]    scales experts.w2    fp32 [E, D]

with weight = code * scale. There is one scale for each output of what a rank has. Gate and up are split by outputs;
down is split by inputs, and each rank has scales of its own for its part of the inputs, as in Meta's own quantization.
Codes and scales belong to these ranks: unlike BF16 checkpoints they cannot be read with another number of them.

Source: llama-models 0.3.0, `llama4/quantization/loader.py`, `quantize_impls.py`, `llama4/scripts/quantize.py`.

Shape letters: D hidden, E experts, F intermediate.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.architecture import Llama4Config, Role, TensorSpec
from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.checkpoint.meta_names import Split, spellings_of
from llama4_quant.checkpoint.state_dicts import tensor_name
from llama4_quant.errors import SchemeError
from llama4_quant.formats.compressed_tensors import EncodedRows

DEFAULT_RANKS = (8, 4, 2, 1)
"""What a source without ranks is split for: the first that fits. Meta published Llama 4 for 8."""
WHAT_IS_FP8 = "Meta's loader wants FP8 for routed experts, without the first and the last layer, and for nothing else"
ALIGNMENT = 16
"""FBGEMM's FP8 kernels load 16 bytes at a time."""

_EXPERT_SCALES = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
_DECODER_PREFIX = re.compile(r"^language_model\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Where the parts of one source tensor (of gate or up, for fused experts) go.

    Attributes:
        key: its name in the state dict of every rank.
        split: what each rank has of it.
        num_ranks: how many there are.
    """

    key: str
    split: Split
    num_ranks: int

    @property
    def scale_key(self) -> str:
        """Name of an expert weight's scales."""
        base, _, name = self.key.rpartition(".")
        return f"{base}.{_EXPERT_SCALES[name]}"

    def weights(self, rank: int) -> str:
        """Name of the output tensor of a rank."""
        return tensor_name(f"consolidated.{rank:02d}.pth", self.key)

    def scales(self, rank: int) -> str:
        """Name of the output tensor of the scales of a rank."""
        return tensor_name(f"fp8_scales_{rank}.pt", self.scale_key)


def spreads(name: str, num_ranks: int) -> tuple[Spread, ...]:
    """How a tensor of the Hugging Face layout is spread; two for fused gate and up.

    Raises:
        SchemeError: Meta's layout has no such tensor.
    """
    found = spellings_of(_DECODER_PREFIX.sub("", name))
    if not found:
        raise SchemeError(f"{name}: Meta's layout has no place for this tensor; use another --format")
    return tuple(Spread(key=key, split=target.split, num_ranks=num_ranks) for key, target in found)


def output_tensors(spread: Spread, shape: Sequence[int], *, is_fp8: bool) -> tuple[OutputTensor, ...]:
    """The tensors that store a weight, rank by rank; of experts: all of them, in one tensor per rank.

    Args:
        spread: where it goes.
        shape: [out, in] of a linear weight, [experts, out, in] of experts, or as it is.
        is_fp8: whether it is quantized; only experts can be.

    Raises:
        SchemeError: the ranks cannot share it evenly, or the kernels cannot take a rank's part.
    """
    stored = _rank_shape(spread, shape)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    outputs = [OutputTensor(name=spread.weights(rank), dtype=dtype, shape=stored) for rank in range(spread.num_ranks)]
    if is_fp8:
        scale_shape = _scale_shape(spread, shape)
        outputs += [
            OutputTensor(name=spread.scales(rank), dtype=torch.float32, shape=scale_shape)
            for rank in range(spread.num_ranks)
        ]
    return tuple(outputs)


def rank_rows(spread: Spread, rank: int, values: Tensor, row_start: int, num_rows: int) -> tuple[Tensor, int] | None:
    """What a rank has of some rows of a weight: a view, and its first row in the stored tensor; None if nothing.

    Args:
        spread: where the weight goes; not experts.
        rank: the rank.
        values: rows `row_start` to `row_start + len(values)` of the weight; all of them, if it is transposed.
        row_start: the first of them.
        num_rows: rows of the whole weight.
    """
    if spread.split is Split.NONE:
        return values, row_start
    if spread.split is Split.TRANSPOSED:
        assert len(values) == num_rows
        return values.T, 0
    if spread.split is Split.COLUMNS:
        return values.chunk(spread.num_ranks, dim=1)[rank], row_start
    size = num_rows // spread.num_ranks
    start, stop = max(row_start, rank * size), min(row_start + len(values), (rank + 1) * size)
    return (values[start - row_start : stop - row_start], start - rank * size) if start < stop else None


def rank_matrix(spread: Spread, rank: int, expert_OI: Tensor) -> Tensor:
    """What a rank has of one expert, [out, in]: a view."""
    dim = 0 if spread.split is Split.EXPERT_COLUMNS else 1
    return expert_OI.chunk(spread.num_ranks, dim=dim)[rank]


def encode_expert(
    spread: Spread, rank: int, expert: int, codes_OI: Tensor, scale_O1: Tensor
) -> tuple[EncodedRows, ...]:
    """What one expert contributes to the tensors of a rank.

    Args:
        spread: where the weight goes.
        rank: the rank.
        expert: index of the expert.
        codes_OI: float8_e4m3fn [out, in] of `rank_matrix`.
        scale_O1: float32 [out, 1].
    """
    return (
        EncodedRows(name=spread.weights(rank), values=codes_OI.T.contiguous(), row_start=expert * codes_OI.shape[1]),
        EncodedRows(name=spread.scales(rank), values=scale_O1.to(torch.float32).reshape(1, -1), row_start=expert),
    )


def kept_reason(role: Role, layer: int | None, num_layers: int) -> str | None:
    """Why Meta's loader wants a linear weight in BF16; None if it wants FP8."""
    if role is not Role.ROUTED_EXPERT:
        return "Meta's loader: FP8 for routed experts only"
    return "Meta's loader: the first and the last layer in BF16" if layer in {0, num_layers - 1} else None


def check_ranks(config: Llama4Config, specs: Sequence[TensorSpec], num_ranks: int) -> None:
    """Raise SchemeError unless so many ranks can share the model."""
    text, vision = config.text, config.vision
    heads = {"attention heads": text.num_attention_heads, "key and value heads": text.num_key_value_heads}
    if vision is not None:
        heads["attention heads of the vision tower"] = vision.num_attention_heads
    for what, count in heads.items():
        if num_ranks < 1 or count % num_ranks:
            raise SchemeError(f"--model-parallel {num_ranks}: {count} {what} cannot be shared evenly")
    for spec in specs:
        shape = spec.shape if len(spec.shape) != 3 else (spec.shape[0], spec.shape[2], spec.shape[1])
        found = spreads(spec.name, num_ranks)
        part = (shape[0], shape[1] // 2, shape[2]) if len(found) == 2 else shape
        is_fp8 = kept_reason(spec.role, spec.layer, text.num_hidden_layers) is None
        for spread in found:
            output_tensors(spread, part, is_fp8=is_fp8)


def default_ranks(config: Llama4Config, specs: Sequence[TensorSpec]) -> int:
    """The first of `DEFAULT_RANKS` that fits; 1 fits or says why not."""
    for num_ranks in DEFAULT_RANKS[:-1]:
        try:
            check_ranks(config, specs, num_ranks)
        except SchemeError:
            continue
        return num_ranks
    check_ranks(config, specs, 1)
    return 1


def _rank_shape(spread: Spread, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the stored tensor of one rank."""
    if spread.split is Split.EXPERT_COLUMNS:
        num_experts, outputs, inputs = shape
        return (num_experts * inputs, _share(spread, outputs, "outputs"))
    if spread.split is Split.EXPERT_ROWS:
        num_experts, outputs, inputs = shape
        return (num_experts * _share(spread, inputs, "inputs"), outputs)
    if spread.split is Split.TRANSPOSED:
        return (shape[1], shape[0])
    if spread.split is Split.COLUMNS:
        return (shape[0], _share(spread, shape[1], "inputs"))
    return (_share(spread, shape[0], "rows"), *shape[1:]) if spread.split is Split.ROWS else tuple(shape)


def _scale_shape(spread: Spread, shape: Sequence[int]) -> tuple[int, int]:
    num_experts, outputs, inputs = shape
    is_by_outputs = spread.split is Split.EXPERT_COLUMNS
    part = (outputs // spread.num_ranks, inputs) if is_by_outputs else (outputs, inputs // spread.num_ranks)
    if any(size % ALIGNMENT for size in part):
        raise SchemeError(
            f"{spread.key}: {part[0]} outputs and {part[1]} inputs in each of {spread.num_ranks} ranks, but FP8 "
            f"kernels need multiples of {ALIGNMENT}; use a smaller --model-parallel, or another --format"
        )
    return (num_experts, part[0])


def _share(spread: Spread, size: int, what: str) -> int:
    if size % spread.num_ranks:
        raise SchemeError(
            f"{spread.key}: {size} {what} cannot be shared evenly by {spread.num_ranks} ranks; use another "
            "--model-parallel"
        )
    return size // spread.num_ranks
