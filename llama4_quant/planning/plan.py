"""The plan of a conversion: one decision, with its reason, for every weight.

It is data: `--dry-run` prints it, the report stores it, the converter and the loader carry it out. How it is made
stands in make.py.
"""

import math
from dataclasses import dataclass

from llama4_quant.architecture import LinearSpec, Llama4Config, Role, TensorSpec, attention_names
from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.formats import compressed_tensors, meta_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.scheme import KVCacheScheme, Scheme, WeightScheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What happens to one weight.

    Attributes:
        name: module name of a linear weight, tensor name of anything else.
        shape: [out, in] for linear weights.
        scheme: how it is stored, or None for BF16.
        reason: why, in a few words.
        linear: where it comes from, for linear weights.
        outputs: the tensors it becomes.
        shared_by: how many weights share these tensors evenly.
        fused: it is an expert of fused tensors, and becomes row `linear.expert` of dimension 0 of each output.
        spread: in Meta's layout, what goes to which rank.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    scheme: WeightScheme | None
    reason: str
    linear: LinearSpec | None
    outputs: tuple[OutputTensor, ...]
    bytes_in: int
    shared_by: int = 1
    fused: bool = False
    spread: meta_fp8.Spread | None = None

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored_as(self) -> str:
        """For tables: "bf16", "int4 g128", ..."""
        return "bf16" if self.scheme is None else self.scheme.label

    @property
    def bytes_out(self) -> int:
        """Bytes in the output."""
        return sum(output.nbytes for output in self.outputs) // self.shared_by


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """One source tensor and the decisions about its parts, in stored order."""

    spec: TensorSpec
    dtype: str
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything a conversion does.

    Attributes:
        notes: what a user should know about where the result can be loaded.
        model_parallel: in Meta's layout, the number of ranks.
        kv_cache_scheme: the checkpoint has calibrated scales for such a cache; None: it has none.
        is_mixed: some weights had their scheme chosen one by one.
    """

    config: Llama4Config
    scheme: Scheme | None
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS
    model_parallel: int | None = None
    kv_cache_scheme: KVCacheScheme | None = None
    is_mixed: bool = False

    @property
    def label(self) -> str:
        """For tables and messages: scheme and format."""
        if self.scheme is None:
            return str(self.format)
        if self.is_mixed:
            return f"mixed precision ({', '.join(dict.fromkeys(d.stored_as for d in self.decisions if d.scheme))})"
        is_default = self.format is CheckpointFormat.COMPRESSED_TENSORS
        return self.scheme.label if is_default else f"{self.scheme.label}, {self.format}"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision, in order of the model."""
        return tuple(decision for tensor in self.tensors for decision in tensor.decisions)

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor of the output, in order of the model; then scales of the KV cache."""
        weights = dict.fromkeys(output for decision in self.decisions for output in decision.outputs)
        return (*weights, *(output for pair in self.cache_scales for output in pair))

    @property
    def cache_scales(self) -> tuple[tuple[OutputTensor, OutputTensor], ...]:
        """By decoder layer, the scales of its keys and of its values; none without `kv_cache_scheme`."""
        if self.kv_cache_scheme is None:
            return ()
        return tuple(map(compressed_tensors.cache_scale_tensors, attention_names(self.config)))

    @property
    def ignore(self) -> tuple[str, ...]:
        """Names of all linear modules that stay BF16: exactly the `ignore` list of quantization_config."""
        kept = tuple(d.name for d in self.decisions if d.linear is not None and d.scheme is None)
        # A tied head has no weight of its own, but loaders have a module for it, which `targets` would catch.
        return (*kept, f"{self.config.prefix}lm_head") if self.config.text.tie_word_embeddings else kept
