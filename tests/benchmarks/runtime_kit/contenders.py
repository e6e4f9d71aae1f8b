"""The rows of the table: who runs, on which files, with which settings."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class System(StrEnum):
    """Whose code runs."""

    OURS = "ours"
    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"


class Files(StrEnum):
    """What is on disk, all from the same BF16 weights."""

    SOURCE = "bf16"
    """The checkpoint itself."""
    FP8 = "fp8"
    """FP8_DYNAMIC, attention and head too."""
    INT4 = "int4"
    """W4A16 in groups of 128, attention too; the head in BF16."""
    INT4_EXPERTS = "int4-experts"
    """W4A16 in groups of 128 of experts alone: attention and head in BF16, as public int4 checkpoints have them."""
    GGUF_BF16 = "BF16"
    GGUF_Q8_0 = "Q8_0"
    GGUF_Q4_0 = "Q4_0"

    @property
    def is_gguf(self) -> bool:
        return self in {Files.GGUF_BF16, Files.GGUF_Q8_0, Files.GGUF_Q4_0}


SCHEMES: dict[Files, tuple[str, tuple[str, ...]]] = {
    Files.FP8: ("FP8_DYNAMIC", ("attention", "lm-head")),
    Files.INT4: ("W4A16", ("attention",)),
    Files.INT4_EXPERTS: ("W4A16", ()),
}
"""Preset, and roles that it quantizes beside experts."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row.

    Attributes:
        arguments: for our `load`.
    """

    name: str
    system: System
    files: Files
    what: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def reads_all_experts(self) -> bool:
        """Every token passes through every expert."""
        return self.system is System.TRANSFORMERS


CONTENDERS = (
    Contender(name="transformers-bf16", system=System.TRANSFORMERS, files=Files.SOURCE, what="BF16, sdpa"),
    Contender(
        name="transformers-int4",
        system=System.TRANSFORMERS,
        files=Files.INT4,
        what="compressed-tensors: inflated to BF16 on first use",
    ),
    Contender(
        name="ours-int4",
        system=System.OURS,
        files=Files.INT4,
        what="W4A16, attention too; head int8",
        arguments={"lm_head": "int8"},
    ),
    Contender(
        name="ours-int4-experts", system=System.OURS, files=Files.INT4_EXPERTS, what="W4A16; attention and head BF16"
    ),
    Contender(name="ours-fp8", system=System.OURS, files=Files.FP8, what="FP8_DYNAMIC, attention and head too"),
    Contender(name="ours-bf16", system=System.OURS, files=Files.SOURCE, what="BF16"),
    Contender(name="llamacpp-q4_0", system=System.LLAMA_CPP, files=Files.GGUF_Q4_0, what="Q4_0, its default mix"),
    Contender(name="llamacpp-q8_0", system=System.LLAMA_CPP, files=Files.GGUF_Q8_0, what="Q8_0"),
    Contender(name="llamacpp-bf16", system=System.LLAMA_CPP, files=Files.GGUF_BF16, what="BF16"),
)


def choose(only: Collection[str], available: Collection[System]) -> list[Contender]:
    """The rows to run.

    Args:
        only: names; none of them: all.
        available: systems that can run here.

    Raises:
        ValueError: a name is unknown, or its system cannot run here.
    """
    by_name = {contender.name: contender for contender in CONTENDERS}
    for name in only:
        if name not in by_name:
            raise ValueError(f"--only {name}: no such row; rows are {', '.join(by_name)}")
        if by_name[name].system not in available:
            raise ValueError(f"--only {name}: no environment given with --peer-python has {by_name[name].system}")
    return [c for c in CONTENDERS if c.system in available and (not only or c.name in only)]


def named(name: str) -> Contender:
    """The row of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)
