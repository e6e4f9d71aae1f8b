"""The runtime benchmark itself: its arithmetic, and the whole command on a tiny model."""

import json
import os
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.runtime_kit.contenders import CONTENDERS, SCHEMES, Files, System, choose, named
from benchmarks.runtime_kit.loop import measure
from benchmarks.runtime_kit.results import Row, Speed, apart
from benchmarks.runtime_kit.shapes import TINY, scout
from benchmarks.runtime_kit.table import bars, header, lines
from benchmarks.runtime_kit.traffic import Traffic, expected_hits, of_gguf, planned

from llama4_quant import preset
from llama4_quant.architecture import Llama4Config

ROOT = Path(__file__).parents[2]


def test_scout_at_full_width_is_scout() -> None:
    shape = scout(kv_heads=8, layers=48, experts=16, vocabulary=202048)
    sizes = (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads * shape.head_dim)
    assert sizes == (5120, 8192, 40, 1024)
    config = Llama4Config.from_dict(shape.config())
    assert config.text.rope_layers[:8] == (True, True, True, False) * 2
    # Weights of a token of Scout: BF16 32.3 GB, public int4 checkpoints 14.35, with int4 attention and int8 head 8.83.
    assert planned(config, None).per_step(1) == pytest.approx(32.3e9, rel=0.01)
    assert planned(config, preset("W4A16")).per_step(1) == pytest.approx(14.35e9, rel=0.01)
    everything = preset("W4A16", quantize=["attention"])
    assert planned(config, everything, int8_head=True).per_step(1) == pytest.approx(8.83e9, rel=0.01)


def test_traffic_of_a_tiny_model_by_hand() -> None:
    traffic = planned(Llama4Config.from_dict(TINY.config()), None)
    expert = 2 * TINY.layers * 3 * TINY.hidden * TINY.intermediate  # BF16; gate, up and down
    attention = 2 * TINY.layers * TINY.hidden * TINY.head_dim * 2 * (TINY.heads + TINY.kv_heads)
    router, norms = 2 * TINY.layers * TINY.hidden * TINY.experts, 2 * (2 * TINY.layers + 1) * TINY.hidden
    head = 2 * TINY.hidden * TINY.vocabulary
    assert (traffic.expert, traffic.head) == (expert, head)
    assert traffic.always == attention + expert + router + norms + head  # the shared expert is as large as a routed one
    assert traffic.per_step(2.5) == traffic.always + 2.5 * expert


def test_traffic_of_a_gguf_file() -> None:
    tensors = {
        "token_embd.weight": 1000,
        "output.weight": 900,
        "blk.0.attn_q.weight": 30,
        "blk.0.ffn_up_shexp.weight": 7,
        "blk.0.ffn_up_exps.weight": 160,
        "blk.1.ffn_up_exps.weight": 320,
    }
    assert of_gguf(tensors, 16) == Traffic(always=937, head=900, expert=30, num_experts=16)


def test_expected_hits() -> None:
    assert expected_hits(16, 1) == pytest.approx(1)
    assert expected_hits(2, 2) == pytest.approx(1.5)  # 1, 2, 2, 1 of the four equally likely pairs


def test_rows_are_chosen_by_name_and_by_what_runs_here() -> None:
    assert [c.name for c in choose(["ours-bf16", "ours-fp8"], [System.OURS])] == ["ours-fp8", "ours-bf16"]
    assert {c.system for c in choose([], [System.OURS])} == {System.OURS}
    with pytest.raises(ValueError, match="no such row"):
        choose(["ours-int5"], [System.OURS])
    with pytest.raises(ValueError, match=r"--peer-python has llama\.cpp"):
        choose(["llamacpp-q4_0"], [System.OURS])


def test_every_file_has_its_way_of_being_made() -> None:
    made = {files for files in Files if files.is_gguf} | set(SCHEMES) | {Files.SOURCE}
    assert {contender.files for contender in CONTENDERS} == made == set(Files)


class Recorder:
    """An engine that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self.calls.append([len(row) for row in rows])

    def step(self, tokens: Sequence[int]) -> None:
        self.calls.append(tuple(tokens))

    def logits(self) -> list[list[float]]:
        return [[1.0, 2.0]]


def test_all_tokens_of_a_job_are_computed_once_in_order(tmp_path: Path) -> None:
    engine = Recorder()
    job = {"prompt": [5, 6, 7], "batch": [[1], [2]], "decode": [[10, 11, 12, 13], [20, 21, 22, 23]], "steps": 2}
    job |= {"rounds": 2, "seconds": 60, "logits": str(tmp_path / "logits")}
    found = measure(engine, job)
    one = [[3], (13,), (10,), (11,), (12,), (13,)]
    two = [[1, 1], (13, 23), (10, 20), (11, 21), (12, 22), (13, 23)]
    assert engine.calls == [[3], [3], [3], *one, *two]
    assert [len(found["prefill"]), len(found["decode"]["1"]), len(found["decode"]["2"])] == [2, 2, 2]
    assert (tmp_path / "logits").read_bytes() == array("f", [1, 2] * 3).tobytes()


def test_rounds_stop_when_time_is_up_but_not_before_the_second(tmp_path: Path) -> None:
    job = {"prompt": [5], "batch": [[1]], "decode": [[10] * 7], "steps": 1, "rounds": 7, "seconds": 0.0}
    found = measure(Recorder(), job | {"logits": str(tmp_path / "logits")})
    assert len(found["prefill"]) == len(found["decode"]["1"]) == 2


def test_best_variant_counts() -> None:
    speed = Speed.of({"a": [2.0, 4.0], "b": [1.0, 5.0, 2.0]}, 10)
    assert (speed.best, speed.median, speed.variant) == (10.0, 5.0, "b")


def test_distance_of_logits(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(array("f", [3, 4, 0, 2]).tobytes())
    (tmp_path / "b").write_bytes(array("f", [3, 4.5, 2, 2]).tobytes())
    assert apart(tmp_path / "b", tmp_path / "a", 2) == pytest.approx([0.5 / 5, 2 / 2])


def row(name: str, decode: float, prefill: float = 100.0) -> Row:
    """1 MB always, 1 MB an expert, 4 experts."""
    speeds = [Speed(best=value, median=value, variant="", rounds=(value,)) for value in (prefill, decode, 4 * decode)]
    traffic = Traffic(always=1_000_000, head=0, expert=1_000_000, num_experts=4)
    return Row(contender=named(name), traffic=traffic, prefill=speeds[0], decode={1: speeds[1], 8: speeds[2]})


def test_bars() -> None:
    rows = [row("ours-int4", 80), row("ours-bf16", 20), row("transformers-bf16", 10, 60), row("llamacpp-q4_0", 90)]
    found = {bar.what: (round(bar.value, 3), bar.bar, bar.is_met) for bar in bars(rows, bandwidth=2e8, num_experts=4)}
    assert found == {
        # 80 tokens a second, each 1 + 1 MB, of 200 MB a second
        "ours-int4: bytes that decoding reads per second / measured bandwidth": (0.8, 0.7, True),
        "ours-int4 / llamacpp-q4_0: decode, 1 row": (0.889, 1.0, False),
        "ours-int4 / ours-bf16: decode, 1 row": (4.0, 3.0, True),
        "ours-int4 / transformers-bf16: decode, 1 row": (8.0, 8.0, True),
        "ours-int4 / transformers-bf16: prefill; the bar is E/2": (1.667, 2.0, False),
        "ours-bf16 / transformers-bf16: prefill; the bar is E/2": (1.667, 2.0, False),
    }


def test_failed_rows_are_in_the_table_and_in_no_bar() -> None:
    rows = [row("ours-int4", 80), Row(contender=named("ours-bf16"), problem="worker_ours: exit code 1: gone")]
    shown = lines(rows, batch_size=8, bandwidth=2e8, vocabulary=4)
    assert "worker_ours: exit code 1: gone" in shown[1]
    assert shown[0].split()[-6:-2] == ["0.00", "2", "0.16", "80%"]
    assert len(bars(rows, bandwidth=2e8, num_experts=4)) == 1
    assert len(header(512, 8).splitlines()) == 2


def test_transformers_reads_every_expert() -> None:
    measured = row("transformers-bf16", 10)
    assert measured.bytes_per_step(1, {1: 1.0}) == 5_000_000
    assert row("ours-bf16", 10).bytes_per_step(8, {8: 2.5}) == 3_500_000


def run(command: Sequence[str | Path]) -> "subprocess.CompletedProcess[str]":
    """With this repository's package, whatever is installed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_on_a_tiny_model(tmp_path: Path) -> None:
    output = tmp_path / "runtime.json"
    command = [sys.executable, "tests/benchmarks/runtime.py", "--tiny", "--only", "ours-int4-experts"]
    command += ["--output", output]
    command += ["--prompt", "32", "--batch", "4", "--steps", "2", "--rounds", "2", "--work", tmp_path / "work"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "work").exists()
    report = json.loads(output.read_text(encoding="utf-8"))
    (found,) = report["rows"]
    assert found["contender"]["name"] == "ours-int4-experts"
    assert found["problem"] is None
    assert len(found["prefill"]["rounds"]) == len(found["decode"]["4"]["rounds"]) == 2
    assert found["hits"]["1"] == 1
    assert 1 <= found["hits"]["4"] <= 4
    assert "\nours-int4-experts " in done.stdout
    (read,) = report["reads"]
    assert len(read) == 2


@pytest.mark.slow
def test_offload_on_a_tiny_model(tmp_path: Path) -> None:
    """Its exit code says that all logits are bit-equal."""
    output = tmp_path / "offload.json"
    command = [sys.executable, "tests/benchmarks/offload.py", "--tiny", "--kernel", "reference", "--shares", "0.25"]
    command += ["--prompt", "16", "--batch", "2", "--steps", "1", "--rounds", "2", "--work", tmp_path / "work"]
    done = run([*command, "--output", output])
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    # 4 layers of 4 experts with three [256, 256] weights: 4 bits, a 16-bit scale for each 128, and the shape as int64
    assert report["expert_bytes"] == 16 * 3 * (256 * 256 // 2 + 256 * 2 * 2 + 2 * 8)
    assert [row["is_equal"] for row in report["rows"]] == [True] * 5
    assert [row["evicted"] for row in report["rows"]] == [False, False, True, False, True]
