"""The demo: the whole main job on the sample, and its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama4_quant.conversion.report import WeightRecord
from llama4_quant.demo import run_demo
from llama4_quant.demo_report import DemoResult, role_errors, write_report
from llama4_quant.errors import OutputError
from llama4_quant.inspect import inspect


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo"))


def test_runs_are_comparable(demo: DemoResult) -> None:
    bf16, w4a16, fp8 = demo.runs
    assert [run.name for run in demo.runs] == ["BF16", "W4A16", "FP8_DYNAMIC"]
    assert bf16.divergence is None
    assert w4a16.num_bytes < fp8.num_bytes < bf16.num_bytes
    assert bf16.bits_per_weight == 16
    # int4 has 16 steps per group, e4m3 rounds each weight to 1 part in 16: it is the closer one.
    assert 0 < fp8.divergence.value < w4a16.divergence.value
    assert all(run.text and run.caption and run.tokens_per_second > 0 for run in demo.runs)


def test_sizes_are_those_on_disk(demo: DemoResult) -> None:
    for run in demo.runs[1:]:
        assert run.num_bytes == inspect(demo.conversions[run.name].output).num_bytes


def test_page_is_self_contained(demo: DemoResult) -> None:
    page = Path(demo.report).read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "https://" not in page
    for run in demo.runs:
        assert run.caption in page
        assert run.perplexity.text(3) in page
    assert "routed-expert" in page


def test_page_escapes_what_models_say(demo: DemoResult, tmp_path: Path) -> None:
    hostile = replace(demo, runs=(replace(demo.runs[0], text="<script>alert(1)</script>"),))
    write_report(hostile, tmp_path / "page.html")
    assert "<script>" not in (tmp_path / "page.html").read_text()


def test_json_is_plain(demo: DemoResult) -> None:
    data = json.loads(json.dumps(demo.to_json(), allow_nan=False))
    assert [run["name"] for run in data["runs"]] == ["BF16", "W4A16", "FP8_DYNAMIC"]


def test_earlier_output_is_kept(demo: DemoResult) -> None:
    with pytest.raises(OutputError, match="overwrite"):
        run_demo(Path(demo.report).parent)


def test_role_errors() -> None:
    def record(role: str, sqnr: float | None) -> WeightRecord:
        return WeightRecord(
            name="w",
            role=role,
            layer=0,
            shape=(1, 1),
            scheme="int4 g32",
            reason="",
            bytes_in=2,
            bytes_out=1,
            sqnr_db=sqnr,
        )

    (only,) = role_errors((record("attention", 10.0), record("attention", 20.0), record("norm", None)))
    assert (only.role, only.count, only.lowest_sqnr, only.mean_sqnr) == ("attention", 2, 10.0, 15.0)
