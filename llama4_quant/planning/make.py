"""Making the plan: checks of what is asked for, a decision about every weight, and checks of the whole.

A plan follows from config.json, the source's headers and the scheme alone.
"""

import re
from collections.abc import Mapping, Sequence

from llama4_quant.architecture import Llama4Config, Role, TensorSpec, tensor_specs
from llama4_quant.checkpoint.reader import TensorEntry
from llama4_quant.errors import SchemeError
from llama4_quant.formats import meta_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.choose import Choice, chooser_for
from llama4_quant.planning.loading_notes import loading_notes
from llama4_quant.planning.plan import Decision, Plan
from llama4_quant.planning.source import check_entries, check_not_quantized
from llama4_quant.planning.tensors import plan_spread, plan_tensor
from llama4_quant.scheme import KVCacheScheme, Scheme


def make_plan(
    config: Llama4Config,
    scheme: Scheme | None,
    entries: Mapping[str, TensorEntry] | None = None,
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS,  # noqa: A002 - the flag's name
    model_parallel: int | None = None,
    kv_cache_scheme: KVCacheScheme | None = None,
    *,
    choices: Mapping[str, Choice] | None = None,
) -> Plan:
    """Decide about every weight.

    Args:
        config: the model.
        scheme: what quantized weights become, and which; None keeps every weight (for inspection and plain loading).
        entries: the source's tensors by name; they must be exactly the model's. None plans for a BF16 source that
            nobody has looked at.
        format: how the output is stored; see `choose_format` for the schemes that go with it.
        model_parallel: for Meta's layout: the number of ranks; default: 8, or the largest of 4, 2, 1 that fits.
        kv_cache_scheme: add scales of such a KV cache; for compressed-tensors.
        choices: for mixed precision: by name of a linear weight, what to store it as instead of `scheme`. Weights that
            `scheme` leaves alone stay alone.

    Raises:
        SchemeError: a role that the model lacks, a pattern that matches nothing, a weight that does not fit the scheme
            or the ranks, a KV-cache scheme that does not go with the format.
        CheckpointError: the source is quantized already, or its tensors are not the model's.
    """
    check_not_quantized(config)
    if kv_cache_scheme is not None and format is not CheckpointFormat.COMPRESSED_TENSORS:
        raise SchemeError(f"--format {format} has no place for scales of a KV cache; drop --kv-cache-scheme")
    specs = tensor_specs(config)
    if entries is not None:
        check_entries(specs, entries)
    ranks = _ranks(config, specs, format, model_parallel)
    chooser = chooser_for(config, specs, scheme, format, choices or {})
    dtypes = {spec.name: entries[spec.name].dtype if entries else "BF16" for spec in specs}
    if ranks is None:
        tensors = tuple(plan_tensor(spec, chooser, dtypes[spec.name], format) for spec in specs)
    else:
        tensors = tuple(plan_spread(spec, chooser, dtypes[spec.name], ranks) for spec in specs)
    plan = Plan(
        config=config,
        scheme=scheme,
        tensors=tensors,
        notes=loading_notes(tensors, format, ranks, kv_cache_scheme),
        format=format,
        model_parallel=ranks,
        kv_cache_scheme=kv_cache_scheme,
        is_mixed=bool(choices),
    )
    _check_experts_agree(plan)
    _check_anything_quantized(plan)
    return plan


def _ranks(
    config: Llama4Config, specs: Sequence[TensorSpec], storage: CheckpointFormat, asked: int | None
) -> int | None:
    """Model-parallel ranks of Meta's layout; None for any other format."""
    if storage is not CheckpointFormat.META_FP8:
        if asked is not None:
            raise SchemeError(f"--model-parallel is for --format meta-fp8; {storage} has no ranks")
        return None
    if asked is None:
        return meta_fp8.default_ranks(config, specs)
    meta_fp8.check_ranks(config, specs, asked)
    return asked


def _check_experts_agree(plan: Plan) -> None:
    """The experts of a layer must share one scheme: vLLM and our runtime run them as one stacked kernel."""
    seen: dict[str, Decision] = {}
    for decision in plan.decisions:
        if decision.role is not Role.ROUTED_EXPERT:
            continue
        layer = decision.name.partition(".experts.")[0] + ".experts"
        first = seen.setdefault(layer, decision)
        if first.scheme != decision.scheme:
            raise SchemeError(
                f"{layer}: the routed experts of a layer need one scheme, but {first.name} and {decision.name} differ; "
                f"leave all of them alone with --ignore 're:{re.escape(layer)}'"
            )


def _check_anything_quantized(plan: Plan) -> None:
    """A scheme that applies to nothing is a mistake."""
    if plan.scheme is None or any(decision.scheme for decision in plan.decisions):
        return
    is_meta = plan.format is CheckpointFormat.META_FP8
    why = meta_fp8.WHAT_IS_FP8 if is_meta else "--ignore matches every weight that the scheme applies to"
    raise SchemeError(f"nothing is left to quantize: {why}")
