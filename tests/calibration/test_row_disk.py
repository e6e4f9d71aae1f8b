"""Disk for hidden states: predicted to the byte, and asked for before anything is written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from calibrated_runs import LENGTHS, calibrate, tiny_checkpoint, token_data
from corpus_files import write_image, write_lines
from resilience.resilience_tools import STAGING, contents, interrupt, num_finished, stop_in

from llama4_quant.calibration import expert_survey, rows, run
from llama4_quant.calibration.disk import RowCounts, row_bytes
from llama4_quant.calibration.sequential import SequentialPass
from llama4_quant.calibration.vision import VisionPass
from llama4_quant.calibration.weights import Weights
from llama4_quant.checkpoint.layout import layout_shards, parse_size
from llama4_quant.config import Llama4Config
from llama4_quant.conversion.convert import convert
from llama4_quant.errors import OutputError
from llama4_quant.planning.make import make_plan
from llama4_quant.sample import SAMPLE_DIR
from llama4_quant.scheme import preset

SCHEME = preset("W4A16", group_size=32)
NUM_TOKENS = sum(LENGTHS)


@pytest.fixture(autouse=True)
def _rows_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few they are."""
    monkeypatch.setattr(rows, "MEMORY_BYTES", 0)


def sizes_when_done(owner: type, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Sizes of all files of rows when a method of `owner` ends: `run`, or in the tower what drops them."""
    seen: dict[str, int] = {}
    name = "_drop_rows" if owner is VisionPass else "run"
    method = getattr(owner, name)

    def watched(self: Any, *arguments: Any) -> Any:
        result = None if owner is VisionPass else method(self, *arguments)
        seen.update({path.name: path.stat().st_size for path in self._folder.glob("*.rows")})
        return method(self, *arguments) if owner is VisionPass else result

    patch.setattr(owner, name, watched)
    return seen


@pytest.mark.parametrize("algorithm", ["gptq", "best"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"moe_layers": [], "num_local_experts": 1},
        {"interleave_moe_layer_step": 1, "intermediate_size": 96, "head_dim": 64},
    ],
    ids=["both", "dense", "experts"],
)
def test_tokens_take_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, config: dict[str, Any]
) -> None:
    source = tiny_checkpoint(tmp_path / "source", **config)
    seen = sizes_when_done(SequentialPass, monkeypatch)
    calibrate(source, tmp_path / "out", [token_data(tmp_path / "t.jsonl")], algorithm=algorithm, scheme=SCHEME)
    model = Llama4Config.from_file(source / "config.json")
    counts = RowCounts(num_tokens=NUM_TOKENS, num_tiles=7)
    assert sum(seen.values()) == row_bytes(model.text, None, counts, with_original=algorithm == "best")


@pytest.mark.parametrize("algorithm", ["gptq", "best"])
def test_tiles_take_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """The tower's files go before the decoder's come, so the larger of both is what is needed."""
    names = [write_image(tmp_path / "a.png", 3), write_image(tmp_path / "b.png", 4, canvas=(1, 2))]
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"text": "<|image|>This.", "images": [name]} for name in names])
    seen = sizes_when_done(VisionPass, monkeypatch)
    scheme = preset("FP8_DYNAMIC", quantize=["projector"], ignore=["re:language_model.*(experts|gate|up|layers.2)"])
    calibrate(SAMPLE_DIR, tmp_path / "out", [pairs], algorithm=algorithm, scheme=scheme, num_samples=2)
    model = Llama4Config.from_file(SAMPLE_DIR / "config.json")
    tiles, few = RowCounts(num_tokens=1, num_tiles=4), RowCounts(num_tokens=10**6, num_tiles=4)
    with_original = algorithm == "best"
    assert sum(seen.values()) == row_bytes(model.text, model.vision, tiles, with_original=with_original)
    alone = row_bytes(model.text, None, few, with_original=with_original)
    assert row_bytes(model.text, model.vision, few, with_original=with_original) == alone


def output_bytes(source: Path) -> int:
    config = Llama4Config.from_file(source / "config.json")
    return layout_shards(make_plan(config, SCHEME).outputs, parse_size("5GB")).nbytes


def leave_free(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": num_bytes}))


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte less than output and hidden states take is refused; exactly that much is enough."""
    source, data = tiny_checkpoint(tmp_path / "source"), token_data(tmp_path / "t.jsonl")
    model = Llama4Config.from_file(source / "config.json")
    wanted = row_bytes(model.text, None, RowCounts(num_tokens=NUM_TOKENS), with_original=True)
    needed, out = output_bytes(source) + wanted, tmp_path / "deep" / "out"
    leave_free(monkeypatch, needed - 1)
    with pytest.raises(OutputError) as refused:
        calibrate(source, out, [data], scheme=SCHEME)
    message = str(refused.value)
    assert (
        f"{out}: hidden states of {NUM_TOKENS:,} tokens take {wanted:,} bytes until the output is complete" in message
    )
    assert f"{needed:,} bytes needed, {needed - 1:,} free" in message
    assert "fewer --num-calibration-samples or a shorter --max-seq-length need less" in message
    assert not out.parent.exists()
    convert(source, tmp_path / "rounded", scheme=SCHEME)  # which has no hidden states
    leave_free(monkeypatch, needed)
    calibrate(source, out, [data], scheme=SCHEME)
    assert (out / "config.json").exists()


def test_what_is_on_the_disk_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run has reserved the output, and most rows; the next one goes on with hardly anything free."""
    source, data = tiny_checkpoint(tmp_path / "source"), token_data(tmp_path / "t.jsonl", [60] * 400)
    settings = {"scheme": SCHEME, "algorithm": "gptq", "num_samples": 400}
    calibrate(source, tmp_path / "reference", [data], **settings)
    with monkeypatch.context() as patch:
        stop_in(patch, Weights, "sync", 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path / "out", [data], **settings)
    assert num_finished(tmp_path / "out") > 0
    free = row_bytes(
        Llama4Config.from_file(source / "config.json").text, None, RowCounts(num_tokens=24000), with_original=False
    )
    leave_free(monkeypatch, free // 100)  # file systems may count a little more or less than was written
    calibrate(source, tmp_path / "out", [data], **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_further_samples_are_asked_for_once_they_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --min-tokens-per-expert nobody knows before; what is finished is kept."""
    source, data = tiny_checkpoint(tmp_path / "source"), token_data(tmp_path / "t.jsonl", [40] * 60)
    asked: list[tuple[int, int]] = []
    require = run.require_disk

    def watched(folder: Path, **settings: Any) -> None:
        asked.append((settings["counts"].num_tokens, settings["output_bytes"]))
        require(folder, **settings)

    monkeypatch.setattr(run, "require_disk", watched)
    survey = tmp_path / "survey"
    count = expert_survey.Survey._count

    def counted(self: expert_survey.Survey, *arguments: Any) -> Any:
        result = count(self, *arguments)
        left = sorted(path.name for path in (tmp_path / "out" / STAGING).rglob("survey-*/*.rows"))
        assert left
        assert all(name.startswith("counts-") for name in left)  # hidden states are gone
        survey.touch()
        return result

    monkeypatch.setattr(expert_survey.Survey, "_count", counted)
    report = calibrate(
        source, tmp_path / "out", [data], scheme=SCHEME, num_samples=15, min_tokens_per_expert=10**6
    ).calibration
    assert survey.exists()
    assert report is not None
    assert report.num_tokens > 600
    assert [num_tokens for num_tokens, _ in asked] == [600, report.num_tokens]
    assert asked[0][1] == output_bytes(source)
    assert asked[1][1] == 0
