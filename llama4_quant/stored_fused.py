"""What an output holds whose experts stay fused: bf16 and fbgemm-fp8. Each expert of a fused tensor is a weight.

    experts.gate_up_proj [E, in, out] (and experts.gate_up_proj_scale)   ->  experts.0.gate_up_proj, ..., [out, in]

Which weights are FP8 is seen in the headers, and config.json has to say the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from llama4_quant.checkpoint.header import TensorEntry
from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.config import Llama4Config
from llama4_quant.errors import CheckpointError, some_tensors
from llama4_quant.formats import fbgemm_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Decision, TensorPlan
from llama4_quant.quantizers.quantize import QuantizedWeight
from llama4_quant.scheme import preset
from llama4_quant.stored import StoredWeight


def is_fbgemm(config: Llama4Config) -> bool:
    """Whether config.json says that a checkpoint is in fbgemm-fp8 format."""
    found = config.quantization
    return isinstance(found, Mapping) and found.get("quant_method") == fbgemm_fp8.QUANT_METHOD


def fused_weights(config: Llama4Config, entries: Mapping[str, TensorEntry]) -> tuple[StoredWeight, ...]:
    """Every weight of a bf16 or fbgemm-fp8 output, in order of the model.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape or dtype, or config.json does not name
            exactly the modules that are not quantized.
    """
    raw = {key: value for key, value in config.raw.items() if key != "quantization_config"}
    plan = make_plan(replace(config, raw=raw), None, format=CheckpointFormat.FBGEMM_FP8)
    weights = tuple(
        _stored(tensor, decision, entries, may_be_fp8=is_fbgemm(config))
        for tensor in plan.tensors
        for decision in tensor.decisions
    )
    known = {name for weight in weights for name in weight.tensors}
    unknown = [name for name in entries if name not in known]
    if unknown:
        raise CheckpointError(f"{some_tensors(unknown)} in the checkpoint, but not part of the model in config.json")
    if is_fbgemm(config):
        _check_kept(config, weights)
    return weights


def is_fused(weight: StoredWeight) -> bool:
    """Whether a weight is an expert of a fused tensor."""
    return weight.linear is not None and weight.tensors[0] == weight.linear.source and weight.linear.expert is not None


def expert_rows(weight: StoredWeight, reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    """The part of each tensor of an expert of fused tensors that is this expert's, by tensor name."""
    assert weight.linear is not None
    assert weight.linear.expert is not None
    for name in weight.tensors:
        yield name, reader.read_rows(name, weight.linear.expert, weight.linear.expert + 1)


def read_expert(weight: StoredWeight, reader: CheckpointReader) -> QuantizedWeight:
    """One FP8 expert of a fused tensor, as an [out, in] weight."""
    assert weight.scheme is not None
    codes_1IN, scales = (rows for _, rows in expert_rows(weight, reader))
    return QuantizedWeight(codes=codes_1IN[0].T, scale=scales.reshape(-1, 1), scheme=weight.scheme)


def _stored(
    tensor: TensorPlan, decision: Decision, entries: Mapping[str, TensorEntry], *, may_be_fp8: bool
) -> StoredWeight:
    outputs, scheme = decision.outputs, None
    entry = entries.get(outputs[0].name)
    if may_be_fp8 and decision.linear is not None and entry is not None and entry.dtype == "F8_E4M3":
        scheme = preset("FP8_DYNAMIC").weights
        shape = (decision.shape[0], decision.shape[1])
        outputs = (
            fbgemm_fp8.expert_tensors(tensor.spec.name, tensor.spec.shape)
            if decision.fused
            else fbgemm_fp8.output_tensors(decision.name, shape, scheme)
        )
    for output in outputs:
        _check(output, entries)
    return StoredWeight(
        name=decision.name,
        role=decision.role,
        shape=decision.shape,
        scheme=scheme,
        linear=decision.linear,
        tensors=tuple(output.name for output in outputs),
    )


def _check(expected: OutputTensor, entries: Mapping[str, TensorEntry]) -> None:
    entry = entries.get(expected.name)
    if entry is None:
        raise CheckpointError(f"tensor {expected.name} is missing from the checkpoint, but config.json asks for it")
    if tuple(entry.shape) != expected.shape or entry.torch_dtype != expected.dtype:
        wanted = f"{str(expected.dtype).removeprefix('torch.')} {list(expected.shape)}"
        raise CheckpointError(
            f"{expected.name}: {entry.dtype} {list(entry.shape)} in {entry.path.name}; config.json asks for {wanted}"
        )


def _check_kept(config: Llama4Config, weights: tuple[StoredWeight, ...]) -> None:
    kept = [weight.name for weight in weights if weight.linear is not None and weight.scheme is None]
    expected = set(fbgemm_fp8.quantization_config(kept)["modules_to_not_convert"])
    found = config.quantization.get("modules_to_not_convert")
    if not isinstance(found, list) or expected != {name for name in found if isinstance(name, str)}:
        raise CheckpointError(
            f"config.json: quantization_config: modules_to_not_convert has to name exactly the {len(expected)} modules "
            "that are not FP8, and does not"
        )
