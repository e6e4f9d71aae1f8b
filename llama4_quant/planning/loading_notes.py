"""What a user should know about where the result of a plan can be loaded."""

from collections.abc import Iterator, Sequence

from llama4_quant.architecture import Role
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.plan import TensorPlan
from llama4_quant.scheme import KVCacheScheme, WeightScheme

_VLLM_FUSES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_VLLM_FUSED_ROLES = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP)
_FBGEMM_NOTE = (
    "fbgemm-fp8: for transformers with fbgemm-gpu, on GPUs of compute capability 9.0 and up; vLLM and llama4-quant do "
    "not load it"
)
_META_NOTE = (
    "meta-fp8: for Meta's own loader (llama-models, quantization mode fp8_mixed) with {} model-parallel rank{}; it "
    "does not run elsewhere, nor with another number of ranks"
)
_KV_CACHE_NOTE = (
    "KV cache in FP8, scales in the checkpoint: vLLM then keeps one by itself (--kv-cache-dtype bfloat16 prevents it); "
    "so does llama4-quant; transformers rounds keys and values alike, and saves no memory"
)


def loading_notes(
    tensors: Sequence[TensorPlan], storage: CheckpointFormat, ranks: int | None, kv_cache_scheme: KVCacheScheme | None
) -> tuple[str, ...]:
    """What a plan's checkpoint asks of a loader.

    Args:
        tensors: of the plan.
        storage: its format.
        ranks: in Meta's layout, the number of ranks.
        kv_cache_scheme: the checkpoint has scales for such a cache.
    """
    if ranks is not None:
        return (_META_NOTE.format(ranks, "" if ranks == 1 else "s"),)
    if storage is CheckpointFormat.FBGEMM_FP8:
        return (_FBGEMM_NOTE,)
    return (*_vllm_notes(tensors), *([] if kv_cache_scheme is None else [_KV_CACHE_NOTE]))


def _vllm_notes(tensors: Sequence[TensorPlan]) -> Iterator[str]:
    """Where vLLM does not load what transformers and llama4-quant do."""
    quantized = {d.role for t in tensors for d in t.decisions if d.scheme is not None}
    if quantized & {Role.VISION, Role.PROJECTOR}:
        yield (
            "vision or projector weights are quantized: llama4-quant and transformers load them, vLLM does not "
            "(it keeps both in BF16)"
        )
    split = _split_fusions(tensors)
    if split:
        yield (
            f"{', '.join(split[:2])}{f' and {len(split) - 2} more' if len(split) > 2 else ''}: quantized in part: "
            "llama4-quant and transformers load that, vLLM does not (it fuses q, k and v, and gate and up)"
        )


def _split_fusions(tensors: Sequence[TensorPlan]) -> list[str]:
    """Names of modules that vLLM makes of several linear weights, where these are not stored alike."""
    fused = {part: whole for whole, parts in _VLLM_FUSES.items() for part in parts}
    schemes: dict[str, set[WeightScheme | None]] = {}
    for decision in (d for t in tensors for d in t.decisions if d.role in _VLLM_FUSED_ROLES):
        base, _, projection = decision.name.rpartition(".")
        if projection in fused:
            schemes.setdefault(f"{base}.{fused[projection]}", set()).add(decision.scheme)
    return [name for name, found in schemes.items() if len(found) > 1]
