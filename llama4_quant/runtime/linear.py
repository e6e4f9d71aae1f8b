"""Linear layers that keep their weight as it is stored on disk, and the builder that allocates them.

A layer's parameters have the names, shapes and dtypes of a compressed-tensors checkpoint: `weight`, or `weight_packed`
and `weight_scale`. They are allocated uninitialized (on the meta device, if asked) and filled by a loader; nothing is
trainable and no dequantized copy is kept. When a weight gets its place, its layer chooses the kernel that will run.

Shape letters: G groups, K in, N out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llama4_quant import ops
from llama4_quant.errors import SchemeError
from llama4_quant.ops import native
from llama4_quant.ops.native_tape import NotRecordableError, Tape
from llama4_quant.scheme import SchemeLookup, WeightScheme, WeightType


class WeightStorage(nn.Module):
    """Storage of one [N, K] weight, or with `num_experts` of a stack of them: every tensor then has E in front.

    Attributes:
        stored_names: names of the parameters that make up the weight (a bias is not among them).
        choice: the kernel that will run.
        call: what `forward` calls.
    """

    choice: ops.Choice
    call: Callable[..., Tensor]

    def __init__(
        self,
        builder: "Builder",
        name: str,
        scheme: WeightScheme | None,
        out_features: int,
        in_features: int,
        *,
        num_experts: int | None = None,
    ) -> None:
        """Allocate.

        Args:
            builder: dtype, device and kernel.
            name: of the weight, for messages.
            scheme: how it is stored.
            out_features: N.
            in_features: K.
            num_experts: E of a stack, None for one weight.

        Raises:
            UsageError: the kernel that the builder asks for cannot run this weight.
        """
        super().__init__()
        self._kernel = builder.kernel
        self._use = ops.Use(
            name=name,
            scheme=scheme,
            out_features=out_features,
            in_features=in_features,
            dtype=builder.dtype,
            device=builder.device,
            num_experts=num_experts,
        )
        layout = self._use.stored_tensors()
        for tensor, (shape, stored_dtype) in layout.items():
            self.register_parameter(tensor, empty_parameter(shape, stored_dtype, builder.device))
        self.stored_names = tuple(layout)
        self.choose(builder.device)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: `call` as whether it is the choice's, since torch's operators cannot be pickled."""
        return {**self.__dict__, "call": self.call is self.choice.call}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The reverse."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.call = self.choice.call if state["call"] else self.choice.stored_call

    def choice_for(self, device: torch.device) -> ops.Choice:
        """The kernel that would run on a device.

        Raises:
            UsageError: the kernel asked for cannot run this weight there.
        """
        return ops.choose(self._kernel, replace(self._use, device=device))

    def choose(self, device: torch.device) -> None:
        """Choose the kernel for a device, where the weight is from now on.

        Raises:
            UsageError: the kernel asked for cannot run this weight there.
        """
        # On meta nothing runs, and a kernel that is asked for may well not run there.
        self.choice = ops.choose(ops.Kernel.REFERENCE, self._use) if device.type == "meta" else self.choice_for(device)
        # Before `repack` the bytes are the stored ones, which the reference takes.
        self.call = self.choice.stored_call

    def repack(self) -> None:
        """Once the weight is filled: put it in the order that its kernel wants, if that is not the stored one."""
        if not self.choice.repacks or self.call is self.choice.call:
            return
        for name, tensor in zip(self.stored_names, ops.repack_int4(*self.stored().values()), strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.call = self.choice.call

    def stored(self, expert: int | None = None) -> dict[str, Tensor]:
        """The tensors of this weight, or views of one expert's part of them, by their names on disk."""
        tensors = {name: self.get_parameter(name).detach() for name in self.stored_names}
        return tensors if expert is None else {name: tensor[expert] for name, tensor in tensors.items()}

    def record(self, tape: Tape, x_1K: Tensor, rows_per_expert: Tensor | None = None) -> Tensor:
        """`forward` of one token on a tape: [1, K] -> [1, N], buffers of the tape.

        Args:
            tape: to add to.
            x_1K: input.
            rows_per_expert: of a stack.

        Raises:
            NotRecordableError: another backend runs this weight.
        """
        if self.choice.kernel is not ops.Kernel.NATIVE:
            raise NotRecordableError(f"{self._use.label} runs on {self.choice.kernel}")
        stored, bias = tuple(self.stored().values()), getattr(self, "bias", None)
        return native.record(tape, self._use.operator, x_1K, stored, bias=bias, rows_per_expert=rows_per_expert)


class Linear(WeightStorage):
    """What the linear layers of every format share: an optional bias [N] in the compute dtype."""

    bias: nn.Parameter | None

    def __init__(
        self,
        builder: "Builder",
        name: str,
        scheme: WeightScheme | None,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
    ) -> None:
        super().__init__(builder, name, scheme, out_features, in_features)
        self.register_parameter("bias", builder.parameter(out_features) if bias else None)


class DenseLinear(Linear):
    """`weight` [N, K] in the compute dtype."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.call(x, self.weight, self.bias)


class Int4Linear(Linear):
    """`weight_packed` int32 [N, ceil(K/8)] and `weight_scale` bf16 [N, G]."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.call(x, self.weight_packed, self.weight_scale, self.bias)


class Int8Linear(Linear):
    """`weight` int8 [N, K] and `weight_scale` bf16 [N, 1]."""

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.call(x, self.weight, self.weight_scale, self.bias)


class Fp8Linear(Linear):
    """`weight` e4m3 [N, K] and `weight_scale` fp32 [N, 1] or [ceil(N/128), ceil(K/128)]."""

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; activations are rounded to FP8 token by token."""
        return self.call(x, self.weight, self.weight_scale, self.bias)


_LINEARS: dict[WeightType | None, type[Linear]] = {
    None: DenseLinear,
    WeightType.INT4: Int4Linear,
    WeightType.INT8: Int8Linear,
    WeightType.FP8: Fp8Linear,
}


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialized and not trainable."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """What a module needs to allocate its weights: where, in which dtype, how each is stored, and what runs it.

    Attributes:
        dtype: the model's compute dtype; unquantized weights have it too.
        device: where to allocate; meta allocates nothing.
        scheme_of: how each linear weight is stored, by its name in the checkpoint.
        kernel: the backend that weights are to run on, or auto.
        offload_experts: routed experts get no place here, they stay in the file.
        name: the name in the checkpoint of the module under construction.
    """

    dtype: torch.dtype
    device: torch.device
    scheme_of: SchemeLookup
    kernel: ops.Kernel = ops.Kernel.AUTO
    offload_experts: bool = False
    name: str = ""

    @property
    def allows_native(self) -> bool:
        """Whether kernels of bf16 activations are to run that have no weights, and so no choice of their own."""
        return self.kernel in {ops.Kernel.AUTO, ops.Kernel.NATIVE} and self.dtype is torch.bfloat16

    def child(self, name: str) -> "Builder":
        """The builder for submodule `name`."""
        return replace(self, name=f"{self.name}.{name}" if self.name else name)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialized parameter in the compute dtype."""
        return empty_parameter(shape, self.dtype, self.device)

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool = False) -> Linear:
        """An uninitialized linear layer for submodule `name`, of the right class for its scheme.

        Raises:
            SchemeError: the scheme of this weight does not divide its inputs.
            UsageError: `kernel` cannot run this weight.
        """
        full_name = self.child(name).name
        scheme = self.scheme_of(full_name)
        if scheme is not None:
            scheme.check_divides(full_name, in_features)
        kind = _LINEARS[None if scheme is None else scheme.type]
        return kind(self, full_name, scheme, out_features, in_features, bias=bias)

    def common_scheme(self, projection: str, num_experts: int, in_features: int) -> WeightScheme | None:
        """How one projection of all experts of a layer is stored.

        Raises:
            SchemeError: the experts are not all stored the same way, or the scheme does not divide the inputs.
        """
        names = [self.child(f"{expert}.{projection}").name for expert in range(num_experts)]
        scheme = self.scheme_of(names[0])
        for name in names:
            if self.scheme_of(name) != scheme:
                raise SchemeError(
                    f"{name} is stored as {self.scheme_of(name)}, but {names[0]} as {scheme}; the experts of a layer "
                    "share one scheme: quantize all of them or none"
                )
        if scheme is not None:
            scheme.check_divides(names[0], in_features)
        return scheme
