"""What mixed precision's survey predicts against what is measured: each unit of the sample alone in one scheme.

    python tests/benchmarks/mixed_sensitivity.py [--samples 6]

Each line is one unit in one scheme: its weights are replaced by what GPTQ stores (for FP8 inputs are rounded too), and
the KL from the original model is taken over samples that the survey has not seen: predicted, measured. Last come the
correlation of the logarithms, the mean ratio, and the spread of ratios (a factor), over all and by scheme. A token that
is sent to another expert costs much at once, so with few tokens the smallest KLs are noisy.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from llama4_quant import load, preset
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.mixed import Unit, units_of
from llama4_quant.calibration.run import prepare
from llama4_quant.calibration.settings import SolverSettings, make_calibration
from llama4_quant.calibration.solve import Solver
from llama4_quant.checkpoint.source import open_source
from llama4_quant.config import Llama4Config
from llama4_quant.ops.reference import round_activations_fp8
from llama4_quant.planning.make import make_plan
from llama4_quant.quantizers.quantize import dequantize_weight
from llama4_quant.runtime.linear import WeightStorage
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.sample import SAMPLE_DIR
from llama4_quant.scheme import WeightScheme, WeightType

SCHEMES = ("int4 g128", "int4 g32", "fp8 channel")
SURVEY_SAMPLES = 16


class Bench:
    """The sample in float32, the inputs of its weights, and its own logits on held-back samples."""

    def __init__(self, fit: Tensor, held_back: Tensor) -> None:
        self.model: Llama4Model = load(SAMPLE_DIR, dtype="float32")
        self._held_back = held_back
        self._inputs: dict[str, list[tuple[Tensor, ...]]] = {}
        hooks = [module.register_forward_hook(self._remember(name)) for name, module in self._modules().items()]
        for ids in fit.split(2):
            self.model(ids)
        for hook in hooks:
            hook.remove()
        self._reference = self._log_probabilities()

    def measure(self, unit: Unit, scheme: WeightScheme) -> float:
        """KL in nats per token with one unit stored in a scheme."""
        with self._stored(unit, scheme):
            return float((self._reference.exp() * (self._reference - self._log_probabilities())).sum(-1).mean())

    @contextmanager
    def _stored(self, unit: Unit, scheme: WeightScheme) -> Iterator[None]:
        kept, hooks = [], []
        for module_name in dict.fromkeys(self._module_of(member.name) for member in unit.members):
            module = self._modules()[module_name]
            (weight,) = module.stored().values()
            kept.append((weight, weight.clone()))
            stack = weight.unsqueeze(0) if weight.dim() == 2 else weight
            for expert, matrix in enumerate(stack):
                rows = self._rows(module_name, expert if weight.dim() == 3 else None)
                if len(rows):
                    moments = Moments(matrix.shape[1], device=matrix.device).add(rows)
                    solved = Solver.of(moments, SolverSettings()).solve(matrix, scheme)
                    matrix.copy_(dequantize_weight(solved.packed.unpack(), torch.float32))
            if scheme.type is WeightType.FP8:
                hooks.append(module.register_forward_pre_hook(_round_inputs))
        yield
        for weight, original in kept:
            weight.copy_(original)
        for hook in hooks:
            hook.remove()

    def _rows(self, name: str, expert: int | None) -> Tensor:
        if expert is None:
            return torch.cat([inputs[0].flatten(0, -2) for inputs in self._inputs[name]])
        return torch.cat([inputs[0].split(inputs[1].tolist())[expert] for inputs in self._inputs[name]])

    def _remember(self, name: str) -> Any:
        return lambda _module, inputs, _output: self._inputs.setdefault(name, []).append(inputs)

    def _modules(self) -> dict[str, WeightStorage]:
        named = self.model.named_modules()
        return {
            name: module for name, module in named if isinstance(module, WeightStorage) and ".layers." in f".{name}"
        }

    def _module_of(self, weight: str) -> str:
        name = weight.removeprefix(self.model.config.prefix)
        before, experts, after = name.partition(".experts.")
        return f"{before}{experts}{after.partition('.')[2]}" if experts else name

    def _log_probabilities(self) -> Tensor:
        return torch.cat([self.model(ids).log_softmax(-1) for ids in self._held_back.split(2)])


def _round_inputs(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    return (round_activations_fp8(x.flatten(0, -2)).view_as(x), *inputs[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6, help="of 512 tokens, to measure on (default: %(default)s)")
    options = parser.parse_args()
    calibration = make_calibration("gptq", num_samples=SURVEY_SAMPLES, max_seq_length=512, target_bits=8)
    assert calibration is not None
    with open_source(str(SAMPLE_DIR)) as reader, tempfile.TemporaryDirectory() as folder:
        config = Llama4Config.from_dict(reader.config)
        plan = make_plan(config, preset("W4A16", quantize=["attention"]), reader.tensors)
        prepared = prepare(calibration, reader)
        record = prepared.choose_schemes(plan, reader, Path(folder), None)
        drawn = iter(prepared.corpus)
        ids = torch.stack([next(drawn).input_ids for _ in range(SURVEY_SAMPLES + options.samples)])
    assert record is not None
    pairs: dict[str, list[tuple[float, float]]] = {scheme: [] for scheme in SCHEMES}
    with torch.inference_mode():
        bench = Bench(ids[:SURVEY_SAMPLES], ids[SURVEY_SAMPLES:])
        for unit, found in zip(units_of(plan), record.units, strict=True):
            predicted = {candidate.scheme: candidate.predicted_kl for candidate in found.candidates}
            for scheme in (scheme for scheme in unit.candidates if scheme.label in SCHEMES):
                pair = (predicted[scheme.label], bench.measure(unit, scheme))
                pairs[scheme.label].append(pair)
                print(
                    f"{unit.name.partition('.layers.')[2]:42} {scheme.label:12} {pair[0]:.2e} {pair[1]:.2e}", flush=True
                )
    report("all", [pair for found in pairs.values() for pair in found])
    for scheme, found in pairs.items():
        report(scheme, found)


def report(name: str, pairs: list[tuple[float, float]]) -> None:
    """One line about predictions and measurements."""
    logs = [(math.log(predicted), math.log(measured)) for predicted, measured in pairs]
    ratios = [measured - predicted for predicted, measured in logs]
    print(
        f"{name:12} {len(pairs):3} pairs: correlation of logarithms {correlation(*zip(*logs, strict=True)):.3f}, "
        f"measured/predicted x{math.exp(fmean(ratios)):.2f}, spread x{math.exp(stdev(ratios)):.2f}"
    )


if __name__ == "__main__":
    main()
