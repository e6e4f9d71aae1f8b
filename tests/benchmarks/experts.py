"""Milliseconds of one mixture-of-experts layer as the number of experts grows, ours beside transformers'.

    python tests/benchmarks/experts.py [--output FILE.json] [--kernel auto] [--experts 4 16 64 128]

Random weights of `--hidden` x `--intermediate`, the same ones in transformers' `Llama4TextMoe` and in ours, whose
outputs are compared first; T random tokens with one expert each, other tokens in every repeat. Best of the repeats,
after one that does not count. T tokens always make T rows of expert work with us. What still grows with E is weights
to read: T tokens touch no more than T experts, and a column says how many. transformers makes E x T rows.

The last lines say by how much the time at the most experts exceeds that at the fewest.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from synthetic import cpu_name, layer_config
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from llama4_quant.config import Llama4Config
from llama4_quant.ops import Kernel
from llama4_quant.quantizers.backend import choose_backend
from llama4_quant.runtime.experts import MixtureOfExperts
from llama4_quant.runtime.linear import Builder, WeightStorage
from llama4_quant.scheme import WeightScheme, preset

TOKENS = (1, 8, 128, 512)
SCHEMES = {"bf16": None, "fp8": preset("FP8_DYNAMIC", observer="absmax"), "int4": preset("W4A16", observer="absmax")}
TRANSFORMERS = "transformers bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Seconds of one forward pass by implementation."""

    experts: int
    tokens: int
    touched: float
    seconds: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--kernel", default="auto", choices=list(Kernel), help="what runs our weights")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7, help="of which the best counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{cpu_name()}, {options.threads} threads, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; "
        f"hidden {options.hidden}, intermediate {options.intermediate}, bfloat16"
    )
    results = []
    for experts in options.experts:
        layers = _layers(experts, options.hidden, options.intermediate, Kernel(options.kernel))
        if experts == options.experts[0]:
            _print_kernels(layers)
        results += [_result(layers, experts, tokens, options.hidden, options.repeats) for tokens in TOKENS]
    _print(results)
    if options.output:
        facts = {"cpu": cpu_name(), "threads": options.threads, "load": os.getloadavg(), "torch": torch.__version__}
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        figures = [asdict(result) for result in results]
        options.output.write_text(json.dumps({**facts, "settings": settings, "results": figures}, indent=1))


def _layers(experts: int, hidden: int, intermediate: int, kernel: Kernel) -> dict[str, nn.Module]:
    """The same layer in every implementation."""
    config = layer_config(experts, hidden, intermediate)
    generator = torch.Generator().manual_seed(0)
    dense = _ours(config, None, kernel)
    for weight in dense.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    layers: dict[str, nn.Module] = {TRANSFORMERS: _theirs(config, dense), "bf16": dense}
    for name in ("fp8", "int4"):
        scheme = SCHEMES[name]
        assert scheme is not None
        layers[name] = _quantized(dense, _ours(config, scheme.weights, kernel), scheme.weights)
    return layers


def _ours(config: dict[str, object], scheme: WeightScheme | None, kernel: Kernel) -> MixtureOfExperts:
    builder = Builder(
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        scheme_of=lambda name: None if name.endswith("router") else scheme,
        kernel=kernel,
    )
    return MixtureOfExperts(Llama4Config.from_dict(config).text, builder)


def _theirs(config: dict[str, object], dense: MixtureOfExperts) -> Llama4TextMoe:
    known = {key: value for key, value in config.items() if key not in {"architectures", "model_type"}}
    with torch.device("meta"):
        theirs = Llama4TextMoe(Llama4TextConfig(**known)).to(torch.bfloat16)
    theirs = theirs.to_empty(device="cpu").eval()
    weights = dense.state_dict()
    gate_up = torch.cat([weights["experts.gate_proj.weight"], weights["experts.up_proj.weight"]], dim=1)
    theirs.experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
    theirs.experts.down_proj.copy_(weights["experts.down_proj.weight"].transpose(1, 2))
    theirs.load_state_dict({name: w for name, w in weights.items() if not name.startswith("experts")}, strict=False)
    return theirs


def _quantized(dense: MixtureOfExperts, ours: MixtureOfExperts, scheme: WeightScheme) -> MixtureOfExperts:
    backend = choose_backend()
    for name, module in ours.named_modules():
        if not isinstance(module, WeightStorage):
            continue
        source = dense.get_submodule(name).get_parameter("weight")
        if name == "router":
            module.stored()["weight"].copy_(source)
            continue
        for expert in range(source.shape[0]) if source.dim() == 3 else (None,):
            packed = backend.quantize(source if expert is None else source[expert], scheme)
            for target, values in zip(module.stored(expert).values(), (packed.codes, packed.scale), strict=True):
                target.copy_(values)
        module.repack()
    return ours


def _result(layers: dict[str, nn.Module], experts: int, tokens: int, hidden: int, repeats: int) -> Result:
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16) for _ in range(repeats + 1)]
    dense = layers["bf16"]
    assert isinstance(dense, MixtureOfExperts)
    _compare(layers[TRANSFORMERS](inputs[0])[0], dense(inputs[0]))
    touched = [len(dense.router(x).argmax(dim=-1).unique()) for x in inputs[1:]]
    seconds = {name: min(_timed(layer, inputs)[1:]) for name, layer in layers.items()}
    return Result(experts=experts, tokens=tokens, touched=sum(touched) / len(touched), seconds=seconds)


def _compare(theirs: Tensor, ours: Tensor) -> None:
    """The same function: a token that goes to another expert, or scored outputs, would be off by the whole value.

    Not exact: sums in another order, and a rounding to bfloat16 after every step in both.
    """
    error = float((theirs.double() - ours.double()).norm() / theirs.double().norm())
    assert error < 0.02, f"outputs differ by {error:.3f} of their norm"


def _timed(layer: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> list[float]:
    seconds = []
    for x in inputs:
        start = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def _print_kernels(layers: dict[str, nn.Module]) -> None:
    for name in SCHEMES:
        weights = [module for module in layers[name].modules() if isinstance(module, WeightStorage)]
        kernels = sorted({f"{w.choice.use.operator} {w.choice.kernel}" for w in weights})
        print(f"  {name}: {', '.join(kernels)}")


def _print(results: Sequence[Result]) -> None:
    names = [TRANSFORMERS, *SCHEMES]
    print("\n" + "".join(f"{title:>10}" for title in ("experts", "tokens", "touched")), end="")
    print("".join(f"{name + ' ms':>22}" for name in names), f"{'transformers / ours bf16':>26}")
    for result in results:
        print(f"{result.experts:>10}{result.tokens:>10}{result.touched:>10.1f}", end="")
        print("".join(f"{1e3 * result.seconds[name]:>22.2f}" for name in names), end="")
        print(f"{result.seconds[TRANSFORMERS] / result.seconds['bf16']:>27.1f}")
    fewest, most = min(result.experts for result in results), max(result.experts for result in results)
    for tokens in TOKENS:
        few, many = (
            next(r.seconds for r in results if (r.experts, r.tokens) == (experts, tokens)) for experts in (fewest, most)
        )
        growth = ", ".join(f"{name} {many[name] / few[name]:.1f}" for name in names)
        print(f"{most} experts instead of {fewest}, {tokens} tokens, times: {growth}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
