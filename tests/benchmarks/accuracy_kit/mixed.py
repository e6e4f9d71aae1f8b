"""Contenders of the curve of KL over bits: uniform int4 with three group sizes, and mixed precision."""

from collections.abc import Sequence

from .contenders import Contender, System, scheme_options

UNIFORM_GROUP_SIZES = (128, 64, 32)
UNIFORM_BASE = "uniform-g128"


def mixed_contenders(target_bits: Sequence[float], roles: str) -> tuple[Contender, ...]:
    """Uniform rows first; all with the best algorithm."""
    uniform = [
        Contender(
            name=f"uniform-g{size}",
            system=System.OURS,
            settings={"arguments": [*scheme_options("W4A16", size, roles), "--algorithm", "best"]},
            group_size=size,
        )
        for size in UNIFORM_GROUP_SIZES
    ]
    mixed = [
        Contender(
            name=f"mixed-{bits:g}",
            system=System.OURS,
            settings={
                "arguments": [*scheme_options("W4A16", None, roles), "--algorithm", "best", f"--target-bits={bits:g}"]
            },
            mixed=True,
        )
        for bits in target_bits
    ]
    return (*uniform, *mixed)
