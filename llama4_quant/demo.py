"""The main job, end to end, on the sample model: convert, load, generate, evaluate, report."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llama4_quant.conversion.convert import convert
from llama4_quant.demo_report import DemoResult, DemoRun, write_report
from llama4_quant.evaluation import measure
from llama4_quant.evaluation.checkpoints import text_windows
from llama4_quant.evaluation.report import EvaluationResult
from llama4_quant.inspect import Inspection, inspect
from llama4_quant.runtime.pipeline import Pipeline, user_message
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR
from llama4_quant.sample.shapes import QUESTIONS, draw, scenes

SCHEMES = {"W4A16": "w4a16", "FP8_DYNAMIC": "fp8-dynamic"}
"""Schemes shown, with the folder that each conversion gets."""
PROMPT = "Return a new string object with"
NUM_NEW_TOKENS = 64
SEQ_LENGTH = 512
NUM_WINDOWS = 32
SCENE = 3
"""Which of the held-out scenes is drawn."""


def run_demo(output: Path, *, overwrite: bool = False, say: Callable[[str], None] = lambda _line: None) -> DemoResult:
    """Convert the sample to W4A16 and FP8_DYNAMIC in `output`, run all three, and write report.html.

    Args:
        output: folder for the checkpoints, the image and the report; made if missing.
        overwrite: replace the checkpoints of an earlier demo.
        say: called with a line about each step.

    Raises:
        OutputError: `output` holds checkpoints already and `overwrite` is false, or cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    conversions = {}
    for scheme, folder in SCHEMES.items():
        say(f"converting the sample to {scheme} in {output / folder}")
        conversions[scheme] = convert(SAMPLE_DIR, output / folder, scheme=scheme, overwrite=overwrite)
    scene = scenes(held_out=True)[SCENE]
    image = output / "image.png"
    draw(scene, random.Random(0)).save(image)  # noqa: S311 - a picture, not a secret
    windows_WL = text_windows(SAMPLE_DIR, HELD_OUT_TEXT, seq_length=SEQ_LENGTH, num_windows=NUM_WINDOWS)
    runs = _run_all({"BF16": SAMPLE_DIR} | {s: output / f for s, f in SCHEMES.items()}, image, windows_WL, say)
    result = DemoResult(
        prompt=PROMPT,
        image=str(image),
        truth=scene.caption,
        num_tokens=windows_WL[:, 1:].numel(),
        runs=tuple(runs),
        conversions=conversions,
        report=str(output / "report.html"),
    )
    write_report(result, output / "report.html")
    return result


def _run_all(folders: dict[str, Path], image: Path, windows_WL: Tensor, say: Callable[[str], None]) -> list[DemoRun]:
    """The first folder is the reference of the others."""
    runs: list[DemoRun] = []
    reference: measure.NamedModel | None = None
    for name, folder in folders.items():
        say(f"running {name}: {NUM_NEW_TOKENS} tokens of text, a caption, {len(windows_WL)} windows of held-out text")
        pipeline = Pipeline.from_pretrained(folder)
        model = measure.NamedModel(name=name, logits=pipeline.model)
        runs.append(
            _run(name, pipeline, inspect(folder), image, measure.evaluate(model, windows_WL, reference=reference))
        )
        reference = reference or model
    return runs


def _run(name: str, pipeline: Pipeline, content: Inspection, image: Path, measured: EvaluationResult) -> DemoRun:
    settings = replace(pipeline.settings, temperature=0.0, max_new_tokens=NUM_NEW_TOKENS)
    text = pipeline.complete(PROMPT, settings=settings)
    continuation = " ".join("".join(text).split())
    caption = "".join(pipeline.chat([user_message(QUESTIONS[0], num_images=1)], [image], settings))
    comparison = measured.comparison
    return DemoRun(
        name=name,
        num_bytes=content.num_bytes,
        bits_per_weight=8 * content.num_bytes / content.num_weights,
        text=continuation,
        caption=caption,
        tokens_per_second=text.timing.decode_tokens_per_second or 0.0,
        perplexity=measured.perplexity,
        divergence=None if comparison is None else comparison.divergence,
        agreement=None if comparison is None else comparison.agreement,
    )
