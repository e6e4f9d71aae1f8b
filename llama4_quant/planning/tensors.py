"""From a source tensor to decisions about its parts, each with the tensors it becomes in the output's format."""

import math
from collections.abc import Iterator
from dataclasses import replace

from llama4_quant.architecture import LinearSpec, TensorSpec
from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.errors import SchemeError
from llama4_quant.formats import bf16, compressed_tensors, fbgemm_fp8, meta_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.choose import ALWAYS_KEPT, Chooser
from llama4_quant.planning.plan import Decision, TensorPlan
from llama4_quant.planning.source import SOURCE_DTYPES


def plan_tensor(spec: TensorSpec, chooser: Chooser, dtype: str, storage: CheckpointFormat) -> TensorPlan:
    """Decide about a tensor, for an output in Hugging Face layout."""
    element = SOURCE_DTYPES[dtype]
    if not spec.linears:
        return TensorPlan(spec=spec, dtype=dtype, decisions=(_keep(spec, element),))
    if storage.fuses_experts and len(spec.shape) == 3:
        decisions = tuple(_plan_fused(spec, chooser, element))
    else:
        decisions = tuple(_plan_linear(linear, chooser, element, storage) for linear in spec.linears)
    return TensorPlan(spec=spec, dtype=dtype, decisions=decisions)


def _keep(spec: TensorSpec, element: int) -> Decision:
    """A tensor that is no linear weight."""
    return Decision(
        name=spec.name,
        role=spec.role,
        layer=spec.layer,
        shape=spec.shape,
        scheme=None,
        reason=ALWAYS_KEPT[spec.role],
        linear=None,
        outputs=bf16.output_tensors(spec.name, spec.shape),
        bytes_in=spec.num_weights * element,
    )


def _plan_linear(linear: LinearSpec, chooser: Chooser, element: int, storage: CheckpointFormat) -> Decision:
    weights, reason = chooser.choose(linear)
    shape = (linear.out_features, linear.in_features)
    if weights is None:
        # A kept expert is stored on its own too: beside quantized experts, loaders expect one 2-D weight per expert.
        outputs = bf16.output_tensors(f"{linear.name}.weight", shape)
    else:
        module = fbgemm_fp8 if storage is CheckpointFormat.FBGEMM_FP8 else compressed_tensors
        outputs = module.output_tensors(linear.name, shape, weights)
    return Decision(
        name=linear.name,
        role=linear.role,
        layer=linear.layer,
        shape=shape,
        scheme=weights,
        reason=reason,
        linear=linear,
        outputs=outputs,
        bytes_in=linear.num_weights * element,
    )


def _plan_fused(spec: TensorSpec, chooser: Chooser, element: int) -> Iterator[Decision]:
    """One decision per expert: gate and up are stored, and so quantized, together."""
    num_experts, in_features, out_features = spec.shape
    parts = len(spec.linears) // num_experts
    base, _, projection = spec.name.rpartition(".")
    for expert in range(num_experts):
        choices = [chooser.choose(linear) for linear in spec.linears[expert * parts : (expert + 1) * parts]]
        weights, reason = choices[0]
        name = f"{base}.{expert}.{projection}"
        if any(other != weights for other, _ in choices):
            raise SchemeError(f"{name}: gate and up are stored in one tensor here, but only one of them is in --ignore")
        outputs = (bf16.output_tensors if weights is None else fbgemm_fp8.expert_tensors)(spec.name, spec.shape)
        whole = replace(spec.linears[expert * parts], name=name, out_features=out_features, out_start=0)
        yield Decision(
            name=name,
            role=spec.role,
            layer=spec.layer,
            shape=(out_features, in_features),
            scheme=weights,
            reason=reason,
            linear=whole,
            outputs=outputs,
            bytes_in=whole.num_weights * element,
            shared_by=num_experts,
            fused=True,
        )


def plan_spread(spec: TensorSpec, chooser: Chooser, dtype: str, num_ranks: int) -> TensorPlan:
    """One decision per linear weight (gate and up of an expert are two), spread over the ranks of Meta's layout."""
    spreads = meta_fp8.spreads(spec.name, num_ranks)
    num_experts = spec.shape[0] if len(spec.shape) == 3 else 1
    # The experts of a layer share their tensors, and their decisions the one list of them.
    outputs: dict[tuple[meta_fp8.Spread, bool], tuple[OutputTensor, ...]] = {}
    decisions = []
    for number, linear in enumerate(spec.linears or (None,)):
        spread = spreads[number % len(spreads)]
        weights, reason = (None, ALWAYS_KEPT[spec.role]) if linear is None else chooser.choose(linear)
        shape = spec.shape if linear is None else (linear.out_features, linear.in_features)
        if (spread, weights is not None) not in outputs:
            whole = (num_experts, *shape) if len(spec.shape) == 3 else shape
            outputs[spread, weights is not None] = meta_fp8.output_tensors(spread, whole, is_fp8=weights is not None)
        decision = Decision(
            name=spec.name if linear is None else linear.name,
            role=spec.role if linear is None else linear.role,
            layer=spec.layer,
            shape=shape,
            scheme=weights,
            reason=reason,
            linear=linear,
            outputs=outputs[spread, weights is not None],
            bytes_in=math.prod(shape) * SOURCE_DTYPES[dtype],
            shared_by=num_experts,
            spread=spread,
        )
        decisions.append(decision)
    return TensorPlan(spec=spec, dtype=dtype, decisions=tuple(decisions))
