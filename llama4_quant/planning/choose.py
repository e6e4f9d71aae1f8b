"""Which scheme a linear weight gets, or why it stays BF16: its role, `--quantize`, `--ignore`, or what was measured."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llama4_quant.architecture import LinearSpec, Llama4Config, Role, TensorSpec, linear_specs
from llama4_quant.errors import SchemeError
from llama4_quant.formats import meta_fp8
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.scheme import Scheme, Strategy, WeightScheme

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A scheme that was chosen for one weight by measuring (mixed precision); None leaves it in BF16."""

    scheme: WeightScheme | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chooser:
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
        """The scheme, or None for BF16, and the reason.

        Raises:
            SchemeError: the weight does not fit the scheme.
        """
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


def chooser_for(
    config: Llama4Config,
    specs: Sequence[TensorSpec],
    scheme: Scheme | None,
    storage: CheckpointFormat,
    choices: Mapping[str, Choice],
) -> Chooser:
    """The chooser for a model's weights.

    Raises:
        SchemeError: `--quantize` names a role that the model lacks, or `--ignore` a weight.
    """
    return Chooser(
        scheme=scheme,
        roles=_roles(scheme.quantize if scheme else (), specs),
        ignored=_match_ignore(scheme.ignore if scheme else (), linear_specs(config)),
        num_layers=config.text.num_hidden_layers if storage is CheckpointFormat.META_FP8 else None,
        choices=choices,
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
