"""What calibration buys in the vision tower: the error of image features, on images it has seen and on others.

    PYTHONPATH=.:tests python tests/benchmarks/vision_features.py

On the sample, whose tower and projector are quantized by each algorithm and scheme, calibrated on captioned images of
its training scenes. Printed is |features - original| / |original| on these images, and on images of its held-out
scenes, in float32.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from llama4_quant import convert, load, preset
from llama4_quant.calibration.corpus import CalibrationSettings, open_corpus
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.sample import SAMPLE_DIR, shapes

LENGTH = 96


def write_pairs(folder: Path, name: str, count: int, *, held_out: bool) -> str:
    """Drawings with a caption as JSON lines; gives the path as --calibration takes it."""
    lines = []
    for index, scene in enumerate(random.Random(0).sample(shapes.scenes(held_out=held_out), count)):
        path = folder / f"{name}-{index}.png"
        shapes.draw(scene, random.Random(index), tiles_high=1, tiles_wide=1).save(path)
        lines.append(json.dumps({"text": "<|image|>This is a drawing.", "images": [path.name]}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / f"{name}.jsonl")


def tiles_of(data: str, count: int) -> Tensor:
    settings = CalibrationSettings(data=(data,), num_samples=count, max_seq_length=LENGTH)
    tiles = [sample.pixel_values for sample in open_corpus(SAMPLE_DIR, settings).samples()]
    return torch.cat([pixels for pixels in tiles if pixels is not None])


def features(model: Path, tiles: Tensor) -> Tensor:
    with torch.inference_mode():
        return load(model, dtype="float32").image_features(tiles)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The error of image features by scheme and algorithm.")
    parser.add_argument("--num-images", type=int, default=160, help="to calibrate on")
    parser.add_argument("--num-held-out", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "FP8_DYNAMIC"])
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "gptq", "best"])
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = []
    with tempfile.TemporaryDirectory(prefix="llama4-quant-vision-") as name:
        folder = Path(name)
        seen = write_pairs(folder, "seen", options.num_images, held_out=False)
        others = write_pairs(folder, "others", options.num_held_out, held_out=True)
        sets = [tiles_of(seen, options.num_images), tiles_of(others, options.num_held_out)]
        exact = [features(SAMPLE_DIR, tiles) for tiles in sets]
        print(f"{'scheme':>12} {'algorithm':>10} {'seen':>8} {'others':>8}", flush=True)
        for scheme in options.schemes:
            group = {"group_size": options.group_size} if scheme == "W4A16" else {}
            chosen = preset(scheme, quantize=["vision", "projector"], **group)
            for algorithm in options.algorithms:
                data = () if algorithm == "rtn" else (seen,)
                settings = {"num_samples": options.num_images, "max_seq_length": LENGTH}
                calibration = make_calibration(algorithm, data=data, **settings)
                out = folder / f"{scheme}-{algorithm}"
                convert(SAMPLE_DIR, out, scheme=chosen, calibration=calibration)
                found = [features(out, tiles) for tiles in sets]
                errors = [float((y - x).norm() / x.norm()) for y, x in zip(found, exact, strict=True)]
                print(f"{scheme:>12} {algorithm:>10} {errors[0]:8.4f} {errors[1]:8.4f}", flush=True)
                rows.append({"scheme": scheme, "algorithm": algorithm, "seen": errors[0], "others": errors[1]})
    if options.output is not None:
        stamp = {"when": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "num_images": options.num_images}
        options.output.write_text(json.dumps({**stamp, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
