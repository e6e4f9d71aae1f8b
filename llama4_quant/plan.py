"""The plan of a conversion: one decision, with its reason, for every weight, before a byte is read.

A plan follows from config.json, the source's headers and the scheme alone. It is data: `--dry-run` prints it, the
report stores it, the converter and the loader carry it out.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from llama4_quant.architecture import (
    LinearSpec,
    Llama4Config,
    Role,
    TensorSpec,
    attention_names,
    linear_specs,
    tensor_specs,
)
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.checkpoint.reader import TensorEntry
from llama4_quant.errors import CheckpointError, SchemeError
from llama4_quant.formats import bf16, compressed_tensors, fbgemm_fp8, meta_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.scheme import KVCacheScheme, Scheme, Strategy, WeightScheme

SOURCE_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
"""Dtypes a source weight may have, with bytes per element."""

DEFAULT_ROLES = (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP)


class QuantizableRole(StrEnum):
    """Roles that `--quantize` can add to the default ones."""

    ATTENTION = Role.ATTENTION.value
    LM_HEAD = Role.LM_HEAD.value
    VISION = Role.VISION.value
    PROJECTOR = Role.PROJECTOR.value


ALWAYS_KEPT = {
    Role.EMBEDDING: "always BF16: a lookup, not a matrix product",
    Role.NORM: "always BF16: a vector",
    Role.BIAS: "always BF16: a vector",
    Role.ROUTER: "always BF16: it picks the experts, and is tiny",
    Role.PATCH_EMBEDDING: "always BF16: kernels need inputs divisible by 16",
    Role.VISION_OTHER: "always BF16: norms, biases, positions",
}

_VLLM_FUSES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
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
    "transformers and llama4-quant round keys and values alike, and save no memory"
)
_VLLM_FUSED_ROLES = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP)


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
class Choice:
    """A scheme that was chosen for one weight by measuring (mixed precision); None leaves it in BF16."""

    scheme: WeightScheme | None
    reason: str


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
    chooser = _Chooser(
        scheme=scheme,
        roles=_roles(scheme.quantize if scheme else (), specs),
        ignored=_match_ignore(scheme.ignore if scheme else (), linear_specs(config)),
        num_layers=config.text.num_hidden_layers if format is CheckpointFormat.META_FP8 else None,
        choices=choices or {},
    )
    dtypes = {spec.name: entries[spec.name].dtype if entries else "BF16" for spec in specs}
    if ranks is None:
        tensors = tuple(_plan_tensor(spec, chooser, dtypes[spec.name], format) for spec in specs)
    else:
        tensors = tuple(_plan_spread(spec, chooser, dtypes[spec.name], ranks) for spec in specs)
    plan = Plan(
        config=config,
        scheme=scheme,
        tensors=tensors,
        notes=(*_notes(tensors, format, ranks), *([] if kv_cache_scheme is None else [_KV_CACHE_NOTE])),
        format=format,
        model_parallel=ranks,
        kv_cache_scheme=kv_cache_scheme,
        is_mixed=bool(choices),
    )
    _check_experts_agree(plan)
    if scheme is not None and not any(decision.scheme for decision in plan.decisions):
        why = "--ignore matches every weight that the scheme applies to" if ranks is None else meta_fp8.WHAT_IS_FP8
        raise SchemeError(f"nothing is left to quantize: {why}")
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


def check_not_quantized(config: Llama4Config) -> None:
    """Raise CheckpointError if config.json says that the source is quantized already."""
    found = config.quantization
    if found:
        method = shown(found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown")
        raise CheckpointError(
            f"the source is already quantized (config.json: quantization_config, quant_method {method}); "
            "convert from the BF16 checkpoint instead"
        )


def check_entries(specs: Sequence[TensorSpec], entries: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError unless the source's headers hold exactly the model's tensors in float dtypes."""
    expected = {spec.name: spec for spec in specs}
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(f"{some_tensors(missing)} missing from the checkpoint, but part of config.json's model")
    unknown = [name for name in entries if name not in expected]
    if unknown:
        raise CheckpointError(f"{some_tensors(unknown)} in the checkpoint, but not part of the model in config.json")
    for name, spec in expected.items():
        entry = entries[name]
        if tuple(entry.shape) != spec.shape:
            raise CheckpointError(
                f"{name}: shape {list(entry.shape)} in {entry.path.name}, but config.json asks for {list(spec.shape)}"
            )
        if entry.dtype not in SOURCE_DTYPES:
            raise CheckpointError(
                f"{name}: dtype {entry.dtype} in {entry.path.name}, expected {', '.join(SOURCE_DTYPES)}; "
                "is the source quantized already?"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chooser:
    """Chooses a linear weight's scheme.

    Attributes:
        ignored: from names of linear weights to the pattern that caught them.
        num_layers: layers of the decoder, if Meta's loader decides what is quantized.
        choices: schemes chosen weight by weight.
    """

    scheme: Scheme | None
    roles: frozenset[Role]
    ignored: Mapping[str, str]
    num_layers: int | None = None
    choices: Mapping[str, Choice]

    def choose(self, linear: LinearSpec) -> tuple[WeightScheme | None, str]:
        if self.scheme is None:
            return None, "no scheme"
        weights, kept = self.scheme.weights, self._kept(linear)
        if kept is not None:
            return None, kept
        chosen = self.choices.get(linear.name)
        if chosen is not None:
            if chosen.scheme is not None:
                chosen.scheme.check_divides(linear.name, linear.in_features)
            return chosen.scheme, chosen.reason
        is_qkv = linear.role is Role.ATTENTION and not linear.name.endswith(".o_proj")
        if is_qkv and weights.strategy is Strategy.BLOCK:
            return None, "vLLM permutes rows of q and k, which breaks blocks; v is fused with them"
        weights.check_divides(linear.name, linear.in_features)
        return weights, self.scheme.label

    def _kept(self, linear: LinearSpec) -> str | None:
        """Why a weight stays in BF16, if its role or its name says so."""
        if linear.role in ALWAYS_KEPT:
            return ALWAYS_KEPT[linear.role]
        if self.num_layers is not None:
            return meta_fp8.kept_reason(linear.role, linear.layer, self.num_layers)
        if linear.role not in self.roles:
            return f"not asked for: --quantize {linear.role}"
        return f"--ignore {self.ignored[linear.name]}" if linear.name in self.ignored else None


def _plan_tensor(spec: TensorSpec, chooser: _Chooser, dtype: str, storage: CheckpointFormat) -> TensorPlan:
    element = SOURCE_DTYPES[dtype]
    if not spec.linears:
        kept = Decision(
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
        return TensorPlan(spec=spec, dtype=dtype, decisions=(kept,))
    if storage.fuses_experts and len(spec.shape) == 3:
        decisions = tuple(_plan_fused(spec, chooser, element))
    else:
        decisions = tuple(_plan_linear(linear, chooser, element, storage) for linear in spec.linears)
    return TensorPlan(spec=spec, dtype=dtype, decisions=decisions)


def _plan_fused(spec: TensorSpec, chooser: _Chooser, element: int) -> Iterator[Decision]:
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


def _plan_spread(spec: TensorSpec, chooser: _Chooser, dtype: str, num_ranks: int) -> TensorPlan:
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


def _plan_linear(linear: LinearSpec, chooser: _Chooser, element: int, storage: CheckpointFormat) -> Decision:
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


def _roles(quantize: Collection[str], specs: Sequence[TensorSpec]) -> frozenset[Role]:
    present = {spec.role for spec in specs}
    for name in quantize:
        if name not in set(QuantizableRole):
            raise SchemeError(f"--quantize {name}: unknown role; known roles: {', '.join(QuantizableRole)}")
        if Role(name) not in present:
            raise SchemeError(f"--quantize {name}: this model has no such weights")
    return frozenset([*DEFAULT_ROLES, *(Role(name) for name in quantize)])


def _match_ignore(ignore: Sequence[str], linears: Sequence[LinearSpec]) -> dict[str, str]:
    """Map each ignored linear to the pattern that names it."""
    matched: dict[str, str] = {}
    for pattern in ignore:
        names = _matches(pattern, linears)
        if not names:
            near = difflib.get_close_matches(pattern, [linear.name for linear in linears], n=3, cutoff=0.5)
            hint = f"; close names: {', '.join(near)}" if near else "; `llama4-quant inspect --weights` lists all names"
            raise SchemeError(f"--ignore {pattern}: matches none of the model's {len(linears)} linear weights{hint}")
        matched |= dict.fromkeys(names, pattern)
    return matched


def _matches(pattern: str, linears: Sequence[LinearSpec]) -> list[str]:
    """Names that a pattern catches; a plain name may be a module's, its weight's, or a fused expert tensor's."""
    if not pattern.startswith("re:"):
        return [x.name for x in linears if pattern in {x.name, f"{x.name}.weight", x.source}]
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise SchemeError(f"--ignore {pattern}: not a regular expression: {error}") from error
    return [linear.name for linear in linears if expression.match(linear.name)]


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


def _notes(tensors: Sequence[TensorPlan], storage: CheckpointFormat, ranks: int | None) -> tuple[str, ...]:
    if ranks is not None:
        return (_META_NOTE.format(ranks, "" if ranks == 1 else "s"),)
    if storage is CheckpointFormat.FBGEMM_FP8:
        return (_FBGEMM_NOTE,)
    quantized = {d.role for t in tensors for d in t.decisions if d.scheme is not None}
    notes = []
    if quantized & {Role.VISION, Role.PROJECTOR}:
        notes.append(
            "vision or projector weights are quantized: llama4-quant and transformers load them, vLLM does not "
            "(it keeps both in BF16)"
        )
    split = _split_fusions(tensors)
    if split:
        notes.append(
            f"{', '.join(split[:2])}{f' and {len(split) - 2} more' if len(split) > 2 else ''}: quantized in part: "
            "llama4-quant and transformers load that, vLLM does not (it fuses q, k and v, and gate and up)"
        )
    return tuple(notes)


def _split_fusions(tensors: Sequence[TensorPlan]) -> list[str]:
    """Names of modules that vLLM makes of several linear weights, where these are not stored alike."""
    fused = {part: whole for whole, parts in _VLLM_FUSES.items() for part in parts}
    schemes: dict[str, set[WeightScheme | None]] = {}
    for decision in (d for t in tensors for d in t.decisions if d.role in _VLLM_FUSED_ROLES):
        base, _, projection = decision.name.rpartition(".")
        if projection in fused:
            schemes.setdefault(f"{base}.{fused[projection]}", set()).add(decision.scheme)
    return [name for name, found in schemes.items() if len(found) > 1]


def some_tensors(names: Sequence[str]) -> str:
    """`tensor a is`, `tensors a, b, c and 7 more are`; for messages."""
    shown = ", ".join(names[:3])
    if len(names) == 1:
        return f"tensor {shown} is"
    return f"tensors {shown} are" if len(names) <= 3 else f"tensors {shown} and {len(names) - 3} more are"
