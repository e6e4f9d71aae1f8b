"""Linear layers that keep their weight as it is stored on disk, and the builder that allocates them.

A layer's parameters have the names, shapes and dtypes of a compressed-tensors checkpoint: `weight`, or `weight_packed`
and `weight_scale`. They are allocated uninitialized (on the meta device, if asked) and filled by a loader; nothing is
trainable and no dequantized copy is kept.

Shape letters: G groups, K in, N out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama4_quant import ops
from llama4_quant.scheme import SchemeLookup, WeightScheme, WeightType


def stored_tensors(
    scheme: WeightScheme | None, out_features: int, in_features: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype, by name, of the tensors that store one [out_features, in_features] weight."""
    if scheme is None:
        return {"weight": ((out_features, in_features), dtype)}
    scale_shape = scheme.scale_shape(out_features, in_features)
    if scheme.type is WeightType.INT4:
        packed_shape = (out_features, -(-in_features // 8))
        return {"weight_packed": (packed_shape, torch.int32), "weight_scale": (scale_shape, torch.bfloat16)}
    return {"weight": ((out_features, in_features), torch.float8_e4m3fn), "weight_scale": (scale_shape, torch.float32)}


class WeightStorage(nn.Module):
    """Storage of one [N, K] weight, or with `num_experts` of a stack of them: every tensor then has E in front.

    Attributes:
        stored_names: names of the parameters that make up the weight (a bias is not among them).
    """

    def __init__(
        self,
        scheme: WeightScheme | None,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        leading = () if num_experts is None else (num_experts,)
        layout = stored_tensors(scheme, out_features, in_features, dtype)
        for name, (shape, stored_dtype) in layout.items():
            self.register_parameter(name, empty_parameter((*leading, *shape), stored_dtype, device))
        self.stored_names = tuple(layout)

    def stored(self, expert: int | None = None) -> dict[str, Tensor]:
        """The tensors of this weight, or views of one expert's part of them, by their names on disk."""
        tensors = {name: self.get_parameter(name).detach() for name in self.stored_names}
        return tensors if expert is None else {name: tensor[expert] for name, tensor in tensors.items()}


class Linear(WeightStorage):
    """What the linear layers of every format share: an optional bias [N] in the compute dtype."""

    bias: nn.Parameter | None

    def __init__(
        self,
        scheme: WeightScheme | None,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(scheme, out_features, in_features, dtype=dtype, device=device)
        self.register_parameter("bias", empty_parameter((out_features,), dtype, device) if bias else None)


class DenseLinear(Linear):
    """`weight` [N, K] in the compute dtype."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return functional.linear(x, self.weight, self.bias)


class Int4Linear(Linear):
    """`weight_packed` int32 [N, ceil(K/8)] and `weight_scale` bf16 [N, G]."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return ops.linear_int4(x, self.weight_packed, self.weight_scale, self.bias)


class Fp8Linear(Linear):
    """`weight` e4m3 [N, K] and `weight_scale` fp32 [N, 1] or [ceil(N/128), ceil(K/128)]."""

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; activations are rounded to FP8 token by token."""
        return ops.linear_fp8(x, self.weight, self.weight_scale, self.bias)


def make_linear(
    scheme: WeightScheme | None,
    out_features: int,
    in_features: int,
    *,
    bias: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> Linear:
    """An uninitialized linear layer of the right class for `scheme`."""
    if scheme is None:
        kind: type[Linear] = DenseLinear
    else:
        kind = Int4Linear if scheme.type is WeightType.INT4 else Fp8Linear
    return kind(scheme, out_features, in_features, bias=bias, dtype=dtype, device=device)


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialized and not trainable."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """What a module needs to allocate its weights: where, in which dtype, and how each is stored.

    Attributes:
        dtype: the model's compute dtype; unquantized weights have it too.
        device: where to allocate; meta allocates nothing.
        scheme_of: how each linear weight is stored, by its name in the checkpoint.
        name: the name in the checkpoint of the module under construction.
    """

    dtype: torch.dtype
    device: torch.device
    scheme_of: SchemeLookup
    name: str = ""

    def child(self, name: str) -> "Builder":
        """The builder for submodule `name`."""
        return replace(self, name=f"{self.name}.{name}" if self.name else name)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialized parameter in the compute dtype."""
        return empty_parameter(shape, self.dtype, self.device)

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool = False) -> Linear:
        """An uninitialized linear layer for submodule `name`.

        Raises:
            SchemeError: the scheme of this weight does not divide its inputs.
        """
        full_name = self.child(name).name
        scheme = self.scheme_of(full_name)
        if scheme is not None:
            scheme.check_divides(full_name, in_features)
        return make_linear(scheme, out_features, in_features, bias=bias, dtype=self.dtype, device=self.device)
