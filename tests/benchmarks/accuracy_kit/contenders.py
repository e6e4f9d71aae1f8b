"""Who takes part: our algorithms, llm-compressor with its options, AutoRound.

A contender is data: its name, who runs it, and settings as JSON that the runner understands. A row of the benchmark is
cached under these settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TEXT_LINEARS = {
    "all-text-linears": r"(self_attn\.[qkvo]_proj|feed_forward(\..+)?\.(gate|up|down)_proj)$",
    "feed-forward": r"feed_forward(\..+)?\.(gate|up|down)_proj$",
}
"""What `checkpoint_facts.ROLES` names, as the end of a module's name in a compressed-tensors checkpoint."""

AWQ: dict[str, Any] = {"mappings": "per-layer"}


class System(StrEnum):
    """Who converts."""

    OURS = "llama4-quant"
    LLM_COMPRESSOR = "llm-compressor"
    AUTO_ROUND = "auto-round"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row.

    Attributes:
        name: what `--only` takes.
        system: who converts.
        settings: for ours `arguments` of `llama4-quant convert`; for llm-compressor a `recipe` of modifiers and their
            arguments; for AutoRound its arguments.
        mixed: weights may have different schemes, or none.
        group_size: of this row, where it is another than the table's.
    """

    name: str
    system: System
    settings: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False
    group_size: int | None = None


def contenders(scheme: str, group_size: int | None, roles: str) -> tuple[Contender, ...]:
    """All that take part in a scheme, cheap ones first.

    Args:
        scheme: `W4A16` or `FP8_DYNAMIC`.
        group_size: weights to a scale, for W4A16.
        roles: a key of `TEXT_LINEARS`.
    """
    scheme_arguments = scheme_options(scheme, group_size, roles)
    if scheme == "W4A16":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, **_groups(group_size)}
        return (*_ours(scheme_arguments, ("rtn", "gptq", "best")), *_their_int4(weights, TEXT_LINEARS[roles]))
    return (*_ours(scheme_arguments, ("rtn", "best")), *_their_fp8(TEXT_LINEARS[roles]))


def scheme_options(scheme: str, group_size: int | None, roles: str) -> list[str]:
    """`llama4-quant convert`'s options for what is quantized and how it is stored."""
    size = [] if group_size is None else ["--group-size", str(group_size)]
    attention = ["--quantize", "attention"] if roles == "all-text-linears" else []
    return ["--scheme", scheme, *size, *attention]


def choose(names: Sequence[str], known: Sequence[Contender]) -> tuple[Contender, ...]:
    """The contenders of these names; `ours`, `llmc` and the like choose all that start so. All for no names.

    Raises:
        ValueError: a name fits nothing; lists the known ones.
    """
    chosen: list[Contender] = []
    for name in names:
        found = [c for c in known if c.name == name] or [c for c in known if c.name.startswith(f"{name}-")]
        if not found:
            raise ValueError(f"--only {name}: no such row; known: {', '.join(c.name for c in known)}")
        chosen += [c for c in found if c not in chosen]
    return tuple(chosen) if names else tuple(known)


def _ours(scheme: list[str], algorithms: Sequence[str]) -> list[Contender]:
    def ours(name: str, *more: str) -> Contender:
        return Contender(name=f"ours-{name}", system=System.OURS, settings={"arguments": [*scheme, *more]})

    rows = [ours("rtn-absmax", "--algorithm", "rtn", "--observer", "absmax")]
    return rows + [ours(algorithm, "--algorithm", algorithm) for algorithm in algorithms]


def _groups(group_size: int | None) -> dict[str, Any]:
    if group_size is None or group_size == -1:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": group_size}


def _their_int4(weights: dict[str, Any], target: str) -> list[Contender]:
    """llm-compressor's and AutoRound's int4; GPTQ's own default is static ordering and 1 % dampening."""

    def group(**more: Any) -> dict[str, Any]:
        return {
            "config_groups": {"group_0": {"targets": [f"re:.*language_model.*{target}"], "weights": weights | more}}
        }

    llmc = _llm_compressor
    rtn, gptq, rounds = "QuantizationModifier", "GPTQModifier", "AutoRoundModifier"
    mse, imatrix = {"observer": "memoryless_mse"}, {"observer": "imatrix_mse"}
    awq: list[Any] = ["AWQModifier", AWQ]
    duo: list[Any] = ["AWQModifier", AWQ | {"duo_scaling": "both"}]
    smooth: list[Any] = ["SmoothQuantModifier", {"smoothing_strength": 0.5, "mappings": "per-layer"}]
    return [
        llmc("rtn", [rtn, group()]),
        llmc("rtn-mse", [rtn, group(**mse)]),
        llmc("rtn-imatrix", [rtn, group(**imatrix)]),
        llmc("gptq", [gptq, group()]),
        llmc("gptq-unordered", [gptq, group() | {"actorder": None}]),
        llmc("gptq-weight", [gptq, group() | {"actorder": "weight"}]),
        llmc("gptq-mse", [gptq, group(**mse)]),
        llmc("gptq-imatrix", [gptq, group(**imatrix)]),
        llmc("gptq-damp0.1", [gptq, group() | {"dampening_frac": 0.1}]),
        llmc("gptq-mse-damp0.1", [gptq, group(**mse) | {"dampening_frac": 0.1}]),
        llmc("gptq-mse-routed", [gptq, group(**mse)], moe_calibrate_all_experts=False),
        llmc("awq", awq, [rtn, group()]),
        llmc("awq-mse", duo, [rtn, group(**mse)]),
        llmc("awq-gptq", awq, [gptq, group()]),
        llmc("awq-gptq-mse", awq, [gptq, group(**mse)]),
        llmc("smoothquant-gptq-mse", smooth, [gptq, group(**mse)]),
        llmc("autoround", [rounds, group() | {"iters": 200, "enable_torch_compile": False}]),
        Contender(
            name="autoround",
            system=System.AUTO_ROUND,
            settings={"iters": 200, "bits": 4, "group_size": weights.get("group_size", -1), "target": target},
        ),
    ]


def _their_fp8(target: str) -> list[Contender]:
    def group(**more: Any) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        targets = [f"re:.*language_model.*{target}"]
        return {
            "config_groups": {"group_0": {"targets": targets, "weights": weights | more, "input_activations": inputs}}
        }

    llmc, mse = _llm_compressor, {"observer": "memoryless_mse"}
    smooth: list[Any] = ["SmoothQuantModifier", {"smoothing_strength": 0.5, "mappings": "per-layer"}]
    awq: list[Any] = ["AWQModifier", AWQ]
    return [
        llmc("fp8", ["QuantizationModifier", group()]),
        llmc("fp8-mse", ["QuantizationModifier", group(**mse)]),
        llmc("fp8-gptq", ["GPTQModifier", group()]),
        llmc("fp8-gptq-mse", ["GPTQModifier", group(**mse)]),
        llmc("fp8-smoothquant", smooth, ["QuantizationModifier", group()]),
        llmc("fp8-awq", awq, ["QuantizationModifier", group()]),
    ]


def _llm_compressor(name: str, *recipe: list[Any], **oneshot: Any) -> Contender:
    settings = {"recipe": list(recipe), "oneshot": oneshot}
    return Contender(name=f"llmc-{name}", system=System.LLM_COMPRESSOR, settings=settings)
