"""Give a small Llama 4 the outlier channels of a large one, without changing what it computes.

    python tests/benchmarks/harder_model.py SRC OUT --seed 0

Large models have channels whose activations are tens of times larger than the others'; small ones hardly do, and a
method that only works without them looks good on a small model. Here scales are moved between weights that follow each
other: what a channel gains on one side it loses on the other.

- input_layernorm to q, k, v; post_attention_layernorm to router, shared expert, routed experts or dense MLP. Some
  channels of the residual stream are outliers in all layers.
- up rows to down columns, for every expert by itself.
- v rows to o columns: one scale for all query heads that share a key-value head.

All scales are powers of two, which BF16 multiplies exactly, so the new model's logits are the old one's, bit for bit
(in a dtype that neither overflows nor underflows). Scales are log-normal, with a few strong outliers.

Shape letters: E experts, H hidden, I intermediate, D channels of all query heads, V of all key-value heads.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_quant.architecture import Llama4Config

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How scales are drawn.

    Attributes:
        seed: of all random numbers.
        spread: standard deviation of log2 of the scales, before they are rounded to powers of two.
        fraction: share of channels that are outliers; at least one of each kind of channel is.
        strength: log2 of how much larger outliers are.
    """

    seed: int = 0
    spread: float = 0.8
    fraction: float = 0.01
    strength: int = 5


class Scales:
    """Draws scales in a fixed order."""

    def __init__(self, outliers: Outliers, hidden_size: int) -> None:
        self.outliers = outliers
        self._generator = torch.Generator().manual_seed(outliers.seed)
        self._hidden_outliers = self._choose(hidden_size)

    def hidden(self, size: int) -> Tensor:
        """For channels of the residual stream: the same ones are outliers every time."""
        return self._scales(size, self._hidden_outliers)

    def inner(self, size: int) -> Tensor:
        """For channels inside a block."""
        return self._scales(size, self._choose(size))

    def _choose(self, size: int) -> Tensor:
        count = max(1, round(size * self.outliers.fraction))
        return torch.randperm(size, generator=self._generator)[:count]

    def _scales(self, size: int, outliers: Tensor) -> Tensor:
        exponents = torch.randn(size, generator=self._generator).mul(self.outliers.spread).round()
        exponents[outliers] += self.outliers.strength
        return torch.exp2(exponents)


def transform(tensors: Tensors, config: Llama4Config, outliers: Outliers) -> Tensors:
    """The same function with outlier channels.

    Args:
        tensors: a BF16 checkpoint in Hugging Face layout, by name.
        config: its configuration.
        outliers: how scales are drawn.

    Returns:
        The new checkpoint: the same names, shapes and dtypes. Tensors that do not change are shared with `tensors`.

    Raises:
        ValueError: a weight left its dtype's range.
    """
    text = config.text
    scales = Scales(outliers, text.hidden_size)
    new = dict(tensors)
    for layer in range(text.num_hidden_layers):
        base = f"{config.prefix}model.layers.{layer}"
        _scale_values(new, f"{base}.self_attn", scales, config)
        hidden_H = scales.hidden(text.hidden_size)
        _scale(new, f"{base}.input_layernorm.weight", hidden_H)
        for projection in ("q_proj", "k_proj", "v_proj"):
            _scale(new, f"{base}.self_attn.{projection}.weight", 1 / hidden_H)
        hidden_H = scales.hidden(text.hidden_size)
        _scale(new, f"{base}.post_attention_layernorm.weight", hidden_H)
        if layer in text.moe_layers:
            _scale_moe(new, f"{base}.feed_forward", scales, hidden_H)
        else:
            _scale_mlp(new, f"{base}.feed_forward", scales, hidden_H)
    for name, tensor in new.items():
        _check_exact(name, tensor, tensors[name])
    return new


def _scale(tensors: Tensors, name: str, factors: Tensor) -> None:
    """Multiply; `factors` broadcasts against the tensor."""
    tensors[name] = tensors[name] * factors.to(tensors[name].dtype)


def _scale_values(tensors: Tensors, base: str, scales: Scales, config: Llama4Config) -> None:
    """v rows against o columns; query head h reads key-value head h // (query heads per key-value head)."""
    text = config.text
    values_V = scales.inner(text.num_key_value_heads * text.head_dim)
    repeats = text.num_attention_heads // text.num_key_value_heads
    queries_D = values_V.view(text.num_key_value_heads, text.head_dim).repeat_interleave(repeats, dim=0).flatten()
    _scale(tensors, f"{base}.v_proj.weight", values_V[:, None])
    if text.attention_bias:
        _scale(tensors, f"{base}.v_proj.bias", values_V)
    _scale(tensors, f"{base}.o_proj.weight", 1 / queries_D)


def _scale_mlp(tensors: Tensors, base: str, scales: Scales, hidden_H: Tensor) -> None:
    """gate, up and down of a dense MLP or a shared expert, [out, in]."""
    inner_I = scales.inner(tensors[f"{base}.up_proj.weight"].shape[0])
    _scale(tensors, f"{base}.gate_proj.weight", 1 / hidden_H)
    _scale(tensors, f"{base}.up_proj.weight", inner_I[:, None] / hidden_H)
    _scale(tensors, f"{base}.down_proj.weight", 1 / inner_I)


def _scale_moe(tensors: Tensors, base: str, scales: Scales, hidden_H: Tensor) -> None:
    """Router, shared expert and routed experts; these are fused: gate_up [E, H, 2I] with gate first, down [E, I, H]."""
    _scale(tensors, f"{base}.router.weight", 1 / hidden_H)
    _scale_mlp(tensors, f"{base}.shared_expert", scales, hidden_H)
    num_experts, inner_size, _ = tensors[f"{base}.experts.down_proj"].shape
    inner_EI = torch.stack([scales.inner(inner_size) for _ in range(num_experts)])
    gate_and_up = torch.cat([torch.ones_like(inner_EI), inner_EI], dim=1)
    _scale(tensors, f"{base}.experts.gate_up_proj", gate_and_up[:, None, :] / hidden_H[:, None])
    _scale(tensors, f"{base}.experts.down_proj", 1 / inner_EI[:, :, None])


def _check_exact(name: str, new: Tensor, old: Tensor) -> None:
    """Mantissas are untouched, so nothing has overflowed or lost bits to underflow."""
    if not torch.equal(torch.frexp(new.double()).mantissa, torch.frexp(old.double()).mantissa):
        raise ValueError(
            f"{name}: a scaled weight left the range of {old.dtype}; take a smaller --strength or --spread"
        )


def make_harder(source: Path, out: Path, outliers: Outliers) -> None:
    """Transform the checkpoint in folder `source`; files, shards and everything that is not a weight stay as they are.

    Raises:
        ValueError: `out` exists, or a weight left its dtype's range.
    """
    if out.exists():
        raise ValueError(f"{out} exists; expected a folder to make; remove it or name another")
    shards = {path.name: load_file(path) for path in sorted(source.glob("*.safetensors"))}
    config = Llama4Config.from_file(source / "config.json")
    new = transform({name: tensor for shard in shards.values() for name, tensor in shard.items()}, config, outliers)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.lock"))
    for filename, shard in shards.items():
        save_file({name: new[name].contiguous() for name in shard}, out / filename, metadata={"format": "pt"})


def main() -> None:
    defaults = Outliers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a BF16 checkpoint in Hugging Face layout")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--spread", type=float, default=defaults.spread, help="of log2 of the scales")
    parser.add_argument("--fraction", type=float, default=defaults.fraction, help="of channels that are outliers")
    parser.add_argument("--strength", type=int, default=defaults.strength, help="outliers are 2**STRENGTH times larger")
    options = vars(parser.parse_args())
    make_harder(options.pop("source"), options.pop("out"), Outliers(**options))


if __name__ == "__main__":
    main()
