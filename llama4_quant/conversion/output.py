"""What an output is made of besides its tensors: config.json, and the files that tensors are laid out in."""

import copy
from typing import Any

from llama4_quant.architecture import Role
from llama4_quant.checkpoint.layout import Layout, layout_shards
from llama4_quant.checkpoint.meta import MetaReader
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.state_dicts import layout_state_dicts
from llama4_quant.formats import compressed_tensors, fbgemm_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.formats.meta_params import params_of
from llama4_quant.planning.plan import Plan


def output_config(plan: Plan, reader: CheckpointReader | None = None) -> dict[str, Any]:
    """config.json of the output: the source's, in BF16, with an exact `quantization_config` if it is quantized.

    In Meta's layout: params.json, which says nothing of quantization; that of a source in this layout as it is.

    Raises:
        SchemeError: Meta's params.json cannot express the model.
    """
    if plan.format is CheckpointFormat.META_FP8:
        return dict(reader.params) if isinstance(reader, MetaReader) else params_of(plan.config)
    config = copy.deepcopy(dict(plan.config.raw))
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict):
            section.update({key: "bfloat16" for key in ("torch_dtype", "dtype") if key in section})
    if plan.format is CheckpointFormat.FBGEMM_FP8:
        config["quantization_config"] = fbgemm_fp8.quantization_config(plan.ignore)
    elif plan.is_mixed:
        schemes = {d.name: d.scheme for d in plan.decisions if d.scheme is not None}
        config["quantization_config"] = compressed_tensors.mixed_quantization_config(
            schemes, plan.ignore, plan.kv_cache_scheme
        )
    elif plan.scheme is not None:
        heads = [d.name for d in plan.decisions if d.role is Role.LM_HEAD and d.scheme is not None]
        config["quantization_config"] = compressed_tensors.quantization_config(
            plan.scheme, plan.ignore, heads, plan.kv_cache_scheme
        )
    return config


def output_layout(plan: Plan, max_shard_size: int) -> Layout:
    """Where every tensor of a plan lies; files of Meta's layout are as large as a rank."""
    if plan.format is CheckpointFormat.META_FP8:
        return layout_state_dicts(plan.outputs)
    return layout_shards(plan.outputs, max_shard_size)
