"""What an FP8 KV cache costs, by how its scales are chosen: KL divergence from the model in the source.

    PYTHONPATH=. python tests/benchmarks/kv_cache.py                  # the sample
    PYTHONPATH=. python tests/benchmarks/kv_cache.py MODEL --calibration notes.txt --text other.txt --output cache.json

First table, BF16 weights. Keys and values of calibration text are recorded as they are cached; a scale is chosen for
each layer's keys and for its values; then the model reads another text with keys and values rounded to FP8. Scales:

- `1.0`: what vLLM takes where a checkpoint has none;
- `absmax`: the largest magnitude is the largest code;
- `mse`: of 97 factors of the absmax scale in 1/8 .. 8 the one with the least squared error on the calibration text; it
  may clip.

Second table, with --scheme: weights quantized by --algorithm:

- `no cache`: quantized weights, keys and values as they are;
- `blind`: the same weights, which were calibrated without a cache, and then an FP8 cache;
- `calibrated`: `--kv-cache-scheme fp8`, where weights are fitted to what comes out of the FP8 cache.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_quant import convert, load, preset
from llama4_quant.calibration.cache_scales import cache_scale
from llama4_quant.calibration.corpus import CalibrationSettings, open_corpus
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.evaluation.checkpoints import text_windows
from llama4_quant.evaluation.measure import NamedModel, evaluate
from llama4_quant.ops.reference import round_fp8
from llama4_quant.runtime.attention import TextAttention
from llama4_quant.runtime.cache_formats import CacheScales
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR

FACTORS = [2 ** (step / 16) for step in range(-48, 49)]


@dataclass(frozen=True, kw_only=True)
class Recorder(CacheScales):
    """Keeps what goes into the cache, and changes nothing."""

    key: float = 1.0
    value: float = 1.0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(keys.flatten())
        self.values.append(values.flatten())
        return keys, values


def attentions(model: Llama4Model) -> list[TextAttention]:
    return [module for module in model.modules() if isinstance(module, TextAttention)]


def use(model: Llama4Model, scales: Sequence[CacheScales | None]) -> None:
    for attention, own in zip(attentions(model), scales, strict=True):
        attention.cache_scales = own


def scales_in(model: Llama4Model) -> list[CacheScales | None]:
    return [attention.cache_scales for attention in attentions(model)]


def record(model: Llama4Model, samples: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """All keys and values, by layer."""
    recorders = [Recorder() for _ in attentions(model)]
    use(model, recorders)
    with torch.inference_mode():
        for ids in samples:
            model(ids.unsqueeze(0))
    use(model, [None] * len(recorders))
    return [(torch.cat(recorder.keys), torch.cat(recorder.values)) for recorder in recorders]


def absmax(values: Tensor) -> float:
    return cache_scale(float(values.abs().max()))


def mse(values: Tensor) -> float:
    base = absmax(values)
    return min((base * factor for factor in FACTORS), key=lambda scale: squared_error(values, scale))


def squared_error(values: Tensor, scale: float) -> float:
    return float((values - round_fp8(values, scale)).double().square().sum())


METHODS: dict[str, Callable[[Tensor], float]] = {"1.0": lambda _: 1.0, "absmax": absmax, "mse": mse}


def relative_error(cached: list[tuple[Tensor, Tensor]], scales: list[CacheScales], kind: int) -> float:
    """|rounded - x| / |x| over all layers, on the calibration text."""
    pairs = zip(cached, scales, strict=True)
    noise = sum(squared_error(pair[kind], (own.key, own.value)[kind]) for pair, own in pairs)
    return (noise / sum(float(pair[kind].double().square().sum()) for pair in cached)) ** 0.5


class Judge:
    """Compares models with the one in the source, on windows of a text, and prints and keeps what it finds."""

    def __init__(self, options: argparse.Namespace) -> None:
        size = {"seq_length": options.seq_length, "num_windows": options.windows}
        self.windows = text_windows(options.model, options.text, **size)
        self.reference = NamedModel(name="source", logits=load(options.model, dtype="float32"))
        self.rows: list[dict[str, Any]] = []

    def row(self, name: str, model: Llama4Model, errors: Sequence[float] = ()) -> None:
        judged = NamedModel(name=name, logits=model)
        found = evaluate(judged, self.windows, reference=self.reference, batch_size=8).comparison
        assert found is not None
        kl, top1 = found.divergence, found.agreement.value
        shown = "".join(f"{error:13.4f}" for error in errors) or 26 * " "
        print(f"{name:11}{shown} {kl.value:10.6f} {kl.standard_error or 0:9.6f} {top1:7.4f}", flush=True)
        self.rows.append({"row": name, "errors": list(errors), "kl": kl.value, "stderr": kl.standard_error})


def compare_scales(judge: Judge, options: argparse.Namespace, settings: CalibrationSettings) -> None:
    model = load(options.model, dtype="float32")
    cached = record(model, [sample.input_ids for sample in open_corpus(options.model, settings).samples()])
    for name, choose in METHODS.items():
        scales = [CacheScales(key=choose(keys), value=choose(values)) for keys, values in cached]
        use(model, scales)
        judge.row(name, model, [relative_error(cached, scales, kind) for kind in (0, 1)])


def compare_passes(judge: Judge, options: argparse.Namespace, settings: CalibrationSettings) -> None:
    scheme = preset(options.scheme, quantize=["attention"])
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for kv_cache_scheme in (None, "fp8"):
            calibration = make_calibration(
                options.algorithm,
                data=settings.data,
                num_samples=settings.num_samples,
                max_seq_length=settings.max_seq_length,
                kv_cache_scheme=kv_cache_scheme,
            )
            out = Path(folder) / str(kv_cache_scheme)
            convert(options.model, out, scheme=scheme, calibration=calibration)
            models.append(load(out, dtype="float32"))
    blind, calibrated = models
    judge.row("no cache", blind)
    use(blind, scales_in(calibrated))
    judge.row("blind", blind)
    judge.row("calibrated", calibrated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=SAMPLE_DIR)
    parser.add_argument("--calibration", action="append", default=[], help="default: the built-in text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--text", type=Path, default=HELD_OUT_TEXT)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--scheme", help="also quantize weights: W4A16, FP8_DYNAMIC, ...")
    parser.add_argument("--algorithm", default="best")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = CalibrationSettings(
        data=tuple(options.calibration), num_samples=options.samples, max_seq_length=options.seq_length
    )
    judge = Judge(options)
    print(f"{'':11}{'key error':>13}{'value error':>13} {'KL':>10} {'+-':>9} {'top-1':>7}")
    compare_scales(judge, options, settings)
    if options.scheme is not None:
        compare_passes(judge, options, settings)
    if options.output:
        options.output.write_text(json.dumps({"model": options.model.name, "rows": judge.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
