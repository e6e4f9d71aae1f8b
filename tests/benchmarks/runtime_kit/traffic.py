"""Bytes of weights that a decode step reads, computed from the plan (ours, transformers) or the file (GGUF).

A step reads attention, norms, routers, shared experts and the head once, however many rows it has, and each routed
expert that a row chose. Embeddings (one row of the table per token) and the cache are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llama4_quant.architecture import Llama4Config, Role
from llama4_quant.planning.make import make_plan
from llama4_quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a step reads.

    Attributes:
        always: bytes that every step reads.
        head: those of them that are the head's.
        expert: bytes of one routed expert of every layer.
        num_experts: routed experts of a layer.
    """

    always: int
    head: int
    expert: int
    num_experts: int

    def per_step(self, experts_hit: float) -> float:
        """Bytes, if so many distinct experts of each layer are hit."""
        return self.always + self.expert * experts_hit


def planned(config: Llama4Config, scheme: Scheme | None, *, int8_head: bool = False) -> Traffic:
    """Of a checkpoint with this scheme; with `int8_head`, its head has a byte a weight and a BF16 scale a row."""
    sums = dict.fromkeys(Role, 0)
    for decision in make_plan(config, scheme).decisions:
        sums[decision.role] += decision.bytes_out
    if int8_head:
        text = config.text
        sums[Role.LM_HEAD] = text.vocab_size * (text.hidden_size + 2)
    experts = sums.pop(Role.ROUTED_EXPERT)
    del sums[Role.EMBEDDING]
    num_experts = config.text.num_local_experts
    return Traffic(
        always=sum(sums.values()), head=sums[Role.LM_HEAD], expert=experts // num_experts, num_experts=num_experts
    )


def of_gguf(tensors: Mapping[str, int], num_experts: int) -> Traffic:
    """Of a GGUF file, from its tensors' bytes by name."""
    experts = sum(size for name, size in tensors.items() if "_exps." in name)
    rest = sum(size for name, size in tensors.items() if "_exps." not in name and name != "token_embd.weight")
    return Traffic(always=rest, head=tensors["output.weight"], expert=experts // num_experts, num_experts=num_experts)


def expected_hits(num_experts: int, num_rows: int) -> float:
    """Distinct experts that rows choose, one each, if all choices are equally likely."""
    return num_experts * (1 - (1 - 1 / num_experts) ** num_rows)
