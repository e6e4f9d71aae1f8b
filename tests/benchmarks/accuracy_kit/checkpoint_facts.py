"""What a contender wrote: are exactly the wanted weights quantized, as wanted, and how many bytes do they take.

Nothing that a contender says about itself is believed: names, dtypes and shapes are read from the safetensors headers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama4_quant.architecture import LinearSpec, Llama4Config, Role, linear_specs, tensor_specs
from llama4_quant.checkpoint.reader import CheckpointReader, TensorEntry

ROLES = {
    "all-text-linears": frozenset({Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT, Role.ROUTED_EXPERT}),
    "feed-forward": frozenset({Role.DENSE_MLP, Role.SHARED_EXPERT, Role.ROUTED_EXPERT}),
}
"""What `--roles` may say. lm_head, router, embeddings, vision and projector are in none of them."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Sizes of a checkpoint.

    Attributes:
        quantized_bytes: all tensors that store the weights of the roles: codes, scales, shapes.
        total_bytes: all tensors.
        num_weights: weights of the roles.
    """

    quantized_bytes: int
    total_bytes: int
    num_weights: int

    @property
    def bits_per_weight(self) -> float:
        """Scales and shapes included."""
        return 8 * self.quantized_bytes / self.num_weights


class WrongCheckpointError(ValueError):
    """A contender quantized something else than it was asked to."""


def targets(config: Llama4Config, roles: frozenset[Role]) -> dict[str, LinearSpec]:
    """The linear weights of the roles, by module name."""
    return {linear.name: linear for linear in linear_specs(config) if linear.role in roles}


def inspect(
    folder: Path, source: Path, *, roles: frozenset[Role], scheme: str, group_size: int | None, mixed: bool = False
) -> Facts:
    """Check a quantized checkpoint against its source, and measure it.

    Args:
        folder: what a contender wrote.
        source: the BF16 checkpoint that it was made from.
        roles: what should be quantized.
        scheme: `W4A16` or `FP8_DYNAMIC`.
        group_size: weights to a scale, for W4A16.
        mixed: schemes may differ from weight to weight, and weights of the roles may stay as they are.

    Raises:
        WrongCheckpointError: names the weights that are stored differently than asked, or changed beside that.
    """
    config = Llama4Config.from_file(source / "config.json")
    wanted = targets(config, roles)
    with CheckpointReader.open(folder) as found, CheckpointReader.open(source) as original:
        entries = dict(found.tensors)
        if not mixed:
            _refuse([n for n, s in wanted.items() if not _is_stored(s, entries, scheme, group_size)], f"not {scheme}")
        sources = {linear.source for linear in wanted.values()}
        others = {s.name for s in tensor_specs(config) if s.name not in sources}
        _refuse([n for n in others if not _is_like(entries.get(n), original.tensors[n])], "not as in the source")
        own = {name for name in entries if name.rsplit(".", 1)[0] in wanted or (mixed and name in sources)}
        _refuse(sorted(entries.keys() - own - others), "not the model's")
        return Facts(
            quantized_bytes=sum(entries[name].nbytes for name in own),
            total_bytes=sum(entry.nbytes for entry in entries.values()),
            num_weights=sum(linear.num_weights for linear in wanted.values()),
        )


def _is_stored(spec: LinearSpec, entries: Mapping[str, TensorEntry], scheme: str, group_size: int | None) -> bool:
    N, K = spec.out_features, spec.in_features
    scale = entries.get(f"{spec.name}.weight_scale")
    if scheme == "W4A16":
        codes = entries.get(f"{spec.name}.weight_packed")
        assert group_size is not None
        groups = K // group_size if group_size > 0 else 1
        return _has(codes, "I32", (N, -(-K // 8))) and scale is not None and tuple(scale.shape) == (N, groups)
    codes = entries.get(f"{spec.name}.weight")
    return _has(codes, "F8_E4M3", (N, K)) and scale is not None and tuple(scale.shape) == (N, 1)


def _has(entry: TensorEntry | None, dtype: str, shape: tuple[int, ...]) -> bool:
    return entry is not None and entry.dtype == dtype and tuple(entry.shape) == shape


def _is_like(entry: TensorEntry | None, original: TensorEntry) -> bool:
    return _has(entry, original.dtype, tuple(original.shape))


def _refuse(names: list[str], problem: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WrongCheckpointError(f"{', '.join(sorted(names)[:3])}{more}: {problem}")
