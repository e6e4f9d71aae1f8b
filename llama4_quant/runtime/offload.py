"""A mixture-of-experts layer whose routed experts stay in the file.

Same products, with the same kernels, as of experts in memory, one expert after the other: results are equal bit by
bit. While an expert works the next one is read. Behind the last one it is guessed what the next layer will want: its
router is asked about this layer's inputs, which differ from its own by one layer's contribution to the residual stream.
A wrong guess costs a read, never a result.

Shape letters: E experts, H hidden, K in, N out, R rows of expert work.
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from llama4_quant import ops
from llama4_quant.config import TextConfig
from llama4_quant.errors import UsageError
from llama4_quant.runtime.elementwise import Gate
from llama4_quant.runtime.expert_store import ExpertStore
from llama4_quant.runtime.expert_tensors import Expert, ExpertWeights
from llama4_quant.runtime.linear import Builder, Linear


class OffloadedExperts(nn.Module):
    """SwiGLU of every routed expert, on rows sorted by expert, with weights that a store gives.

    Attributes:
        choices: by projection, the kernel that runs.
    """

    def __init__(self, config: TextConfig, builder: Builder) -> None:
        """Nothing is allocated.

        Raises:
            SchemeError: the experts are not all stored the same way.
            UsageError: the kernel that the builder asks for cannot run them as they are stored.
        """
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self._experts_per_token = config.num_experts_per_tok
        self._kernel = builder.kernel
        self._uses = {
            projection: ops.Use(
                name=builder.child(f"*.{projection}").name,
                scheme=builder.common_scheme(projection, config.num_local_experts, in_features),
                out_features=out_features,
                in_features=in_features,
                dtype=builder.dtype,
                device=builder.device,
            )
            for projection, out_features, in_features in (
                ("gate_proj", intermediate, hidden),
                ("up_proj", intermediate, hidden),
                ("down_proj", hidden, intermediate),
            )
        }
        self.gated = Gate(builder)
        self.choices: dict[str, ops.Choice] = {}
        self._store: ExpertStore | None = None
        self._layer = 0
        self._next: tuple[int, Linear] | None = None
        self.choose(builder.device)

    def choose(self, device: torch.device) -> None:
        """Choose the kernels for a device, where the experts will work; errors as of the constructor."""
        self.choices = {} if device.type == "meta" else self.choices_for(device)

    def choices_for(self, device: torch.device) -> dict[str, ops.Choice]:
        """By projection, the kernel that would run on a device; errors as of the constructor."""
        return {projection: self._choose(replace(use, device=device)) for projection, use in self._uses.items()}

    def _choose(self, use: ops.Use) -> ops.Choice:
        choice = ops.choose(self._kernel, use)
        if not choice.repacks:
            return choice
        if self._kernel is not ops.Kernel.AUTO:
            raise UsageError(
                f"kernel {self._kernel} wants {use.name} in another order of bytes than the file's, where offloaded "
                "experts stay; use native, reference or auto"
            )
        return ops.choose(ops.Kernel.REFERENCE, use)

    def attach(self, store: ExpertStore, layer: int, following: tuple[int, Linear] | None) -> None:
        """Say where weights come from.

        Args:
            store: has all experts of the model.
            layer: this one's number.
            following: number and router of the next layer with experts.
        """
        self._store, self._layer = store, layer
        self._next = following  # in a tuple, so that the router is no submodule of this one

    def forward(self, x_RH: Tensor, rows_per_expert: Tensor) -> Tensor:
        """[R, H] sorted by expert, [E] -> [R, H] in the same order."""
        assert self._store is not None
        rows = rows_per_expert.tolist()
        starts = list(accumulate(rows, initial=0))
        wanted = self._store.begin(self._layer, rows)
        coming = [*wanted, *self._guess(x_RH)]
        y_RH = torch.empty_like(x_RH)
        for number, (layer, expert) in enumerate(wanted, start=1):
            weights = self._store.get((layer, expert))
            self._store.prefetch(coming[number:])
            own = slice(starts[expert], starts[expert + 1])
            y_RH[own] = self._expert(x_RH[own], weights)
        return y_RH

    def _expert(self, x_RH: Tensor, weights: ExpertWeights) -> Tensor:
        gate_RI, up_RI = (self._project(name, x_RH, weights) for name in ("gate_proj", "up_proj"))
        return self._project("down_proj", self.gated(gate_RI, up_RI), weights)

    def _project(self, projection: str, x_RK: Tensor, weights: ExpertWeights) -> Tensor:
        stored = [tensor.to(x_RK.device) for tensor in weights[projection].values()]
        return self.choices[projection].call(x_RK, *stored)

    def _guess(self, x_RH: Tensor) -> list[Expert]:
        """What the next layer will want, most wanted first."""
        if self._next is None:
            return []
        layer, router = self._next
        experts_Rk = router(x_RH).topk(self._experts_per_token, dim=-1).indices
        counts_E = torch.bincount(experts_Rk.flatten())
        order = counts_E.argsort(descending=True, stable=True).tolist()
        return [(layer, expert) for expert in order if counts_E[expert]]
