"""The vision tower under calibration: what its weights are fitted to, that it helps, that it goes on where it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_runs import calibrate, collect_moments, exact_matmul, relative
from corpus_files import write_image, write_lines
from resilience.resilience_tools import contents, interrupt, stop_in
from torch import Tensor

from llama4_quant.calibration.corpus import CalibrationSettings, open_corpus
from llama4_quant.calibration.rows import RowFile
from llama4_quant.calibration.streams import StreamFiles
from llama4_quant.calibration.vision import VisionPass
from llama4_quant.calibration.weights import Weights
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.report import Report
from llama4_quant.runtime.linear import WeightStorage
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.sample import SAMPLE_DIR
from llama4_quant.scheme import Scheme, preset

NUM_IMAGES = 12
ROUNDING = 1e-5  # of sums of some hundred float32 products, over two layers
# Quick: what the decoder has is left alone, but for one weight that there has to be.
DECODER = "re:language_model.*(experts|gate_proj|up_proj|shared_expert|layers.2.*down_proj)"
VISION = preset("W4A16", group_size=32, quantize=["vision", "projector"], ignore=[DECODER])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of one tile, and one of two with its overview."""
    folder = tmp_path_factory.mktemp("pairs")
    names = [write_image(folder / f"{index}.png", index) for index in range(NUM_IMAGES)]
    names.append(write_image(folder / "wide.png", 3, canvas=(1, 2)))
    records = [{"text": f"<|image|>What is number {n}?", "images": [name]} for n, name in enumerate(names)]
    return write_lines(folder / "pairs.jsonl", records)


def run(out: Path, data: str, algorithm: str, scheme: Scheme = VISION, **settings: Any) -> Report:
    num_samples = NUM_IMAGES + 1
    settings = {"algorithm": algorithm, "max_seq_length": 96, "num_samples": num_samples} | settings
    return calibrate(SAMPLE_DIR, out, [data], scheme=scheme, **settings)


def tiles_of(data: str) -> Tensor:
    settings = CalibrationSettings(data=(data,), num_samples=NUM_IMAGES + 1, max_seq_length=96)
    samples = open_corpus(SAMPLE_DIR, settings).samples()
    return torch.cat([sample.pixel_values for sample in samples if sample.pixel_values is not None])


class Watched:
    """A model in float32, what its vision weights get, and its residual stream in front of layer 1's MLP."""

    def __init__(self, checkpoint: Path, tiles: Tensor) -> None:
        self.model: Llama4Model = load(checkpoint, dtype="float32")
        self.inputs: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, WeightStorage) and not name.startswith(("model.", "lm_head")):
                module.register_forward_hook(self._note(name))
        norm = self.model.get_submodule("vision_model.model.layers.1.post_attention_layernorm")
        norm.register_forward_hook(self._note("residual"))
        with torch.inference_mode():
            self.features = self.model.image_features(tiles)

    def _note(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            self.inputs[name] = inputs[0].flatten(0, -2)

        return hook


@pytest.mark.parametrize("algorithm", ["gptq", "best"])
def test_sums_are_those_of_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: str, algorithm: str
) -> None:
    """gram = X^T X of what the quantized checkpoint's weights get in our runtime; all tokens of all tiles are rows."""
    seen = collect_moments(monkeypatch)
    report = run(tmp_path / "out", pairs, algorithm)
    tiles = tiles_of(pairs)
    quantized, original = Watched(tmp_path / "out", tiles), Watched(SAMPLE_DIR, tiles)
    names = [name for name in quantized.inputs if name != "residual" and "patch_embedding" not in name]
    assert len(names) == 2 * 6 + 2 + 1
    records = {weight.name: weight.calibration for weight in report.weights}
    for name in names:
        moments, x = seen[name][0], quantized.inputs[name]
        in_adapter = name.startswith(("vision_model.vision_adapter", "multi_modal_projector"))
        assert len(x) == len(tiles) * (4 if in_adapter else 17)
        assert records[name] is not None
        assert (moments.num_rows, records[name].num_rows, records[name].method) == (len(x), len(x), algorithm)
        if name.endswith(("o_proj", "layers.0.mlp.fc2")):
            continue
        weight = 1.0
        if name.endswith("layers.1.mlp.fc2"):
            before = (original if algorithm == "best" else quantized).inputs["residual"]
            weight = 1 / (before.var(dim=-1, keepdim=True, correction=0) + 1e-5)
        assert relative(moments.gram, (weight * x).T @ x) < ROUNDING, name
        if algorithm == "gptq":
            assert moments.input_drift is None
            continue
        # Differences of nearly equal numbers lose digits: the drift is some hundredths of what it is the difference of.
        drift = (original.inputs[name] - x).T @ (weight * x)
        assert relative(moments.input_drift, drift) < 100 * ROUNDING or not drift.any(), name
        if name.endswith("layers.1.mlp.fc2"):
            wanted = original.inputs["residual"] - quantized.inputs["residual"]
            assert relative(moments.output_drift, wanted.T @ (weight * x)) < 100 * ROUNDING
    calibration = report.calibration
    assert calibration is not None
    assert [record.layer for record in calibration.vision_layers] == [0, 1]
    assert all((record.relative_error is not None) == (algorithm == "best") for record in calibration.vision_layers)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_features_are_better_than_rounded_ones(tmp_path: Path, pairs: str, scheme: str) -> None:
    """Of the calibration tiles, whose features the decoder gets; each method does better than the one before."""
    tiles = tiles_of(pairs)
    chosen = preset(scheme, quantize=["vision", "projector"], ignore=[DECODER])
    exact = Watched(SAMPLE_DIR, tiles).features
    convert(SAMPLE_DIR, tmp_path / "rtn", scheme=chosen)
    for algorithm in ("gptq", "best"):
        run(tmp_path / algorithm, pairs, algorithm, chosen)
    errors = [relative(Watched(tmp_path / name, tiles).features, exact) for name in ("rtn", "gptq", "best")]
    assert errors[2] < errors[1] < errors[0]


def test_the_projector_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: str) -> None:
    """The tower runs as it is, and both streams are the same."""
    seen = collect_moments(monkeypatch)
    scheme = preset("W4A16", group_size=32, quantize=["projector"], ignore=[DECODER])
    report = run(tmp_path / "out", pairs, "best", scheme)
    assert report.calibration is not None
    assert [record.relative_error for record in report.calibration.vision_layers] == [0.0, 0.0]
    moments, name = seen["multi_modal_projector.linear_1"][0], "multi_modal_projector.linear_1"
    assert not moments.input_drift.any()
    x = Watched(SAMPLE_DIR, tiles_of(pairs)).inputs[name]
    assert relative(moments.gram, x.T @ x) < ROUNDING


def test_without_images_vision_is_rounded_and_the_report_says_so(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "text.jsonl", [{"text": "One line of text after the other. " * 40}])
    report = run(tmp_path / "out", data, "gptq", num_samples=1)
    convert(SAMPLE_DIR, tmp_path / "rtn", scheme=VISION)
    assert report.calibration is not None
    assert report.calibration.vision_layers == ()
    (note,) = [note for note in report.calibration.notes if "images" in note]
    assert "has no images, so what is quantized of the vision tower and the projector is rounded to nearest" in note
    for weight in report.weights:
        if weight.role in {"vision", "projector"}:
            assert weight.scheme == "int4 g32"
            assert weight.calibration is None
    plain, calibrated = load(tmp_path / "rtn"), load(tmp_path / "out")
    for name, parameter in plain.vision_model.named_parameters():
        assert torch.equal(parameter, calibrated.vision_model.get_parameter(name)), name


def test_images_alone_need_no_note(tmp_path: Path, pairs: str) -> None:
    """Nor is the tower run where nothing of it is quantized."""
    scheme = preset("W4A16", group_size=32, ignore=[DECODER])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionPass, "run", lambda *_: pytest.fail("the tower was run"))
        report = run(tmp_path / "out", pairs, "gptq", scheme)
    assert report.calibration is not None
    assert not any("images" in note for note in report.calibration.notes)


@pytest.fixture(scope="module")
def reference(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Report]:
    out = tmp_path_factory.mktemp("reference") / "out"
    report = run(out, pairs, "best")
    return contents(out), report


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (Weights, "quantize", 1), (Weights, "quantize", 3), (Weights, "quantize", 7), (Weights, "_record", 14),
        (Weights, "quantize", 11), (Weights, "quantize", 13), (RowFile, "sync", 1), (RowFile, "sync", 4),
        (StreamFiles, "advance", 2), (StreamFiles, "advance", 3), (VisionPass, "_drop_rows", 1), (Weights, "sync", 1),
    ],
)  # fmt: skip
def test_interrupted_and_continued(
    tmp_path: Path, pairs: str, reference: tuple[dict[str, bytes], Report], owner: type, name: str, after: int
) -> None:
    """The same bytes and the same report, wherever it was; and no finished weight is solved again."""
    solved: list[str] = []
    solve, out = Weights._solve, tmp_path / "out"

    def watched(self: Weights, weight: str, *arguments: Any) -> Any:
        solved.append(weight)
        return solve(self, weight, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "_solve", watched)
        with pytest.MonkeyPatch.context() as stopping:
            stop_in(stopping, owner, name, after, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(out, pairs, "best")
        again = len(solved)
        report = run(out, pairs, "best", resume="required")
    assert contents(out) == reference[0]
    assert report.calibration == reference[1].calibration
    # A weight that was solved, but not noted when the signal came, is solved twice.
    assert len(solved) - len(set(solved)) <= 3
    assert not set(solved[: max(0, again - 3)]) & set(solved[again:])


def test_lost_rows_begin_the_tower_anew(tmp_path: Path, pairs: str, reference: tuple[dict[str, bytes], Report]) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, Weights, "quantize", 11, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(out, pairs, "best")
    (folder,) = out.rglob("vision")
    for path in folder.glob("*.rows"):
        path.unlink()
    run(out, pairs, "best")
    assert contents(out) == reference[0]


def test_the_towers_rows_are_gone_when_the_decoder_begins(tmp_path: Path, pairs: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        exact_matmul(patch)
        stop_in(patch, Weights, "quantize", 15, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", pairs, "best")
    (folder,) = (tmp_path / "out").rglob("vision")
    assert [path.name for path in folder.iterdir()] == ["state.json"]
    assert list(folder.parent.glob("quantized-0.rows"))
