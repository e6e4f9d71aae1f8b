"""The accuracy benchmark itself: what it feeds, checks, measures and caches."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.accuracy_kit import conversions, tokens, worker_llmcompressor
from benchmarks.accuracy_kit.ablation import ablation_contenders
from benchmarks.accuracy_kit.activation_limit import activation_limit
from benchmarks.accuracy_kit.checkpoint_facts import ROLES, Facts, WrongCheckpointError, inspect, targets
from benchmarks.accuracy_kit.child_process import ChildFailedError, run
from benchmarks.accuracy_kit.contenders import TEXT_LINEARS, Contender, System, choose, contenders
from benchmarks.accuracy_kit.judge import Judge
from benchmarks.accuracy_kit.mixed import mixed_contenders
from benchmarks.accuracy_kit.rows import Row, Wanted, make_row
from benchmarks.accuracy_kit.verdicts import mixed_verdict, verdicts
from checkpoints import make_checkpoint, multimodal_config

from llama4_quant import convert, preset
from llama4_quant.architecture import Llama4Config, linear_specs
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR

ALL = ROLES["all-text-linears"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts, parts of one file that lie apart."""
    folder, content = tmp_path_factory.mktemp("texts"), HELD_OUT_TEXT.read_text(encoding="utf-8")
    (folder / "a.txt").write_text(content[:10_000], encoding="utf-8")
    (folder / "b.txt").write_text(content[-5_000:], encoding="utf-8")
    return folder / "a.txt", folder / "b.txt"


def prepared(calibration: Path, held_out: Path, seed: int = 0) -> tokens.Tokens:
    settings = {"num_samples": 8, "seq_length": 64, "num_windows": 4, "seed": seed}
    return tokens.prepare(SAMPLE_DIR, calibration=[calibration], held_out=[held_out], **settings)


def test_samples_start_with_bos_and_do_not_repeat(texts: tuple[Path, Path]) -> None:
    found = prepared(*texts)
    assert found.calibration_SL.shape == (8, 64)
    assert found.held_out_WL.shape == (4, 64)
    assert set(found.calibration_SL[:, 0].tolist()) == {2028}
    assert len({tuple(row) for row in found.calibration_SL.tolist()}) == 8
    assert found.overlap < tokens.MAX_OVERLAP


def test_seed_decides_the_samples_alone(texts: tuple[Path, Path]) -> None:
    first, again, other = prepared(*texts), prepared(*texts), prepared(*texts, seed=1)
    assert first.calibration_digest == again.calibration_digest != other.calibration_digest
    assert first.held_out_digest == other.held_out_digest


@pytest.mark.slow
def test_without_files_the_samples_own_texts_are_taken() -> None:
    found = tokens.prepare(
        SAMPLE_DIR, calibration=[], held_out=[], num_samples=64, seq_length=512, num_windows=None, seed=0
    )
    assert found.calibration_SL.shape == (64, 512)
    assert len(found.held_out_WL) > 80
    assert found.overlap < 0.01


def test_tokens_as_jsonl(texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = prepared(*texts)
    lines = found.write_calibration(tmp_path / "tokens.jsonl").read_text().splitlines()
    assert [json.loads(line)["input_ids"] for line in lines] == found.calibration_SL.tolist()


def test_held_out_text_is_no_calibration_text(texts: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="also in the calibration samples"):
        prepared(texts[1], texts[1])


def test_too_little_text(texts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text. " * 40)
    with pytest.raises(ValueError, match=r"gives \d+ samples of 64 tokens, expected 8"):
        prepared(tmp_path / "short.txt", texts[1])


def test_shared_runs() -> None:
    known, new = torch.arange(40).view(1, 40), torch.arange(20, 60).view(1, 40)
    assert tokens.shared_runs(known, new, length=16) == 5 / 25  # runs that start at 20 to 24, of 25
    assert tokens.shared_runs(known, known + 100, length=16) == 0


@pytest.mark.parametrize(("scheme", "group_size"), [("W4A16", 64), ("W4A16", -1), ("FP8_DYNAMIC", None)])
def test_facts_of_our_checkpoints(source: Path, tmp_path: Path, scheme: str, group_size: int | None) -> None:
    out = tmp_path / "out"
    convert(source, out, scheme=preset(scheme, group_size=group_size, quantize=["attention"]))
    facts = inspect(out, source, roles=ALL, scheme=scheme, group_size=group_size)
    wanted = targets(Llama4Config.from_file(source / "config.json"), ALL)
    weights = sum(linear.num_weights for linear in wanted.values())
    scales = {64: weights // 64 * 2, -1: sum(w.out_features for w in wanted.values()) * 2}
    fp8_scales = sum(w.out_features for w in wanted.values()) * 4
    shapes = 16 * len(wanted)
    assert facts.num_weights == weights
    expected = weights + fp8_scales if group_size is None else weights // 2 + scales[group_size] + shapes
    assert facts.quantized_bytes == expected
    assert facts.total_bytes > facts.quantized_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": []}, "self_attn.*: not W4A16"),
        ({"quantize": ["attention", "lm-head"]}, "lm_head.weight: not as in the source"),
        ({"quantize": ["attention", "projector"]}, "linear_1.weight: not as in the source"),
        ({"quantize": ["attention"], "group_size": 32}, "more: not W4A16"),
        ({"quantize": ["attention"], "ignore": [r"re:.*layers\.1\.feed_forward\.experts"]}, "not W4A16"),
    ],
)
def test_other_weights_than_asked_are_refused(
    source: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    convert(source, tmp_path / "out", scheme=preset("W4A16", **({"group_size": 64} | settings)))  # type: ignore[arg-type]
    with pytest.raises(WrongCheckpointError, match=message):
        inspect(tmp_path / "out", source, roles=ALL, scheme="W4A16", group_size=64)


def test_mixed_precision_may_leave_weights_alone(source: Path, tmp_path: Path) -> None:
    scheme = preset("W4A16", group_size=64, quantize=["attention"], ignore=[r"re:.*layers\.1\.feed_forward\.experts"])
    convert(source, tmp_path / "out", scheme=scheme)
    convert(source, tmp_path / "all", scheme=preset("W4A16", group_size=64, quantize=["attention"]))
    mixed = inspect(tmp_path / "out", source, roles=ALL, scheme="W4A16", group_size=None, mixed=True)
    uniform = inspect(tmp_path / "all", source, roles=ALL, scheme="W4A16", group_size=64)
    assert mixed.num_weights == uniform.num_weights
    assert mixed.bits_per_weight > uniform.bits_per_weight


@pytest.mark.slow
def test_judge_finds_no_loss_in_the_reference_and_more_with_fewer_bits(source: Path, tmp_path: Path) -> None:
    windows = torch.randint(1, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    judge = Judge(source, windows, batch_size=2)
    found = {"bf16": judge.score(source)}
    for name, group_size in (("W4A16", 32), ("W4A16", -1), ("FP8_DYNAMIC", None)):
        out = tmp_path / f"{name}{group_size}"
        convert(source, out, scheme=preset(name, group_size=group_size, quantize=["attention"]))
        found[out.name] = judge.score(out)
    divergence = {name: score["comparison"]["divergence"]["value"] for name, score in found.items()}
    assert divergence["bf16"] == 0
    assert 0 < divergence["FP8_DYNAMICNone"] < divergence["W4A1632"] < divergence["W4A16-1"]
    assert found["bf16"]["comparison"]["agreement"]["value"] == 1


def setting(source: Path, folder: Path) -> conversions.Setting:
    path = folder / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    return conversions.Setting(
        model=source,
        model_digest=conversions.checkpoint_digest(source),
        tokens=path,
        tokens_digest="0",
        seed=0,
        cache=folder,
        pythons={},
    )


@pytest.mark.slow
def test_a_row_is_made_once(source: Path, tmp_path: Path) -> None:
    windows = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    judge, wanted = Judge(source, windows), Wanted(roles=ALL, scheme="W4A16", group_size=64)
    (contender,) = choose(["ours-rtn-absmax"], contenders("W4A16", 64, "all-text-linears"))
    shared = setting(source, tmp_path)
    first = make_row(contender, shared, wanted, judge, "w")
    assert first.problem is None
    assert first.divergence is not None
    assert first.divergence > 0
    assert first.conversion is not None
    assert first.conversion["peak_bytes"] > 50e6  # torch alone takes more
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert make_row(contender, shared, wanted, judge, "w") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == files
    again = make_row(contender, dataclasses.replace(shared, fresh=True), wanted, judge, "w")
    assert again.facts == first.facts
    assert again.conversion != first.conversion
    assert again.divergence == first.divergence
    peer = make_row(choose(["llmc-gptq"], contenders("W4A16", 64, "all-text-linears"))[0], shared, wanted, judge, "w")
    assert peer.problem == "UnavailableError: no environment of llm-compressor was named"


@pytest.mark.slow
def test_a_failing_contender_gives_a_row_that_says_how(source: Path, tmp_path: Path) -> None:
    windows = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    wrong = Contender(
        name="ours-wrong",
        system=System.OURS,
        settings={"arguments": ["--scheme", "W4A16", "--group-size", "48", "--algorithm", "rtn"]},
    )
    wanted = Wanted(roles=ALL, scheme="W4A16", group_size=48)
    row = make_row(wrong, setting(source, tmp_path), wanted, Judge(source, windows), "w")
    assert row.problem is not None
    assert "group size 48 is not supported" in row.problem


def test_child_process_measures_time_and_memory(tmp_path: Path) -> None:
    code = "import time; x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096]); time.sleep(0.3)"
    started = time.perf_counter()
    finished = run([sys.executable, "-c", code], log=tmp_path / "log.txt")
    assert 0.3 <= finished.seconds <= time.perf_counter() - started
    assert 300e6 <= finished.peak_bytes < 400e6  # the array and a bare interpreter, not this process
    assert 0 < finished.cpu_seconds < 10


def test_child_process_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError, match=r"status 3.*\n.*out of luck"):
        run([sys.executable, "-c", "print('out of luck'); raise SystemExit(3)"], log=tmp_path / "log.txt")


def test_only() -> None:
    known = contenders("W4A16", 64, "all-text-linears")
    assert [c.name for c in choose(["llmc-gptq"], known)] == ["llmc-gptq"]
    assert {c.system for c in choose(["ours"], known)} == {System.OURS}
    assert choose([], known) == known
    assert len({c.name for c in known}) == len(known)
    with pytest.raises(ValueError, match="--only nothing: no such row; known: ours-rtn-absmax"):
        choose(["nothing"], known)


def row(name: str, divergence: float, *, seconds: float = 1.0, total_bytes: int = 100) -> Row:
    system = System.OURS if name.startswith(("ours", "mixed", "uniform")) else System.LLM_COMPRESSOR
    return Row(
        name=name,
        system=system,
        settings={},
        facts=Facts(quantized_bytes=50, total_bytes=total_bytes, num_weights=100),
        conversion={"seconds": seconds, "steps": {"convert": seconds}},
        score={"comparison": {"divergence": {"value": divergence}}},
    )


def test_verdicts() -> None:
    rows = [row("ours-gptq", 0.2, seconds=8), row("ours-best", 0.1, seconds=90)]
    rows += [row("llmc-gptq", 0.5, seconds=100), row("llmc-gptq-mse", 0.13, seconds=100)]
    lines = [verdict.line for verdict in verdicts("W4A16", rows)]
    assert lines == [
        "PASS  0.400 <= 0.5   KL of ours-gptq / KL of llmc-gptq",
        "PASS  0.200 <= 0.2   KL of ours-best / KL of llmc-gptq",
        "FAIL  0.769 <= 0.7   KL of ours-best / KL of llmc-gptq-mse",
        "PASS  0.080 <= 0.1   seconds of ours-gptq / seconds of llmc-gptq",
        "PASS  0.900 <= 1.0   seconds of ours-best / seconds of llmc-gptq",
        "PASS  0.080 <= 0.1   seconds inside of ours-gptq / seconds inside of llmc-gptq",
        "PASS  0.900 <= 1.0   seconds inside of ours-best / seconds inside of llmc-gptq",
    ]
    assert verdicts("W4A16", rows[:2]) == []


def test_mixed_verdict_compares_at_no_more_bytes() -> None:
    rows = [row("uniform-g128", 0.4), row("mixed-4.125", 0.3, total_bytes=99), row("mixed-6", 0.1, total_bytes=150)]
    verdict = mixed_verdict(rows, "uniform-g128")
    assert verdict is not None
    assert verdict.line == "PASS  0.750 <= 0.85   KL of mixed-4.125 / KL of uniform-g128, at no more bytes"
    assert mixed_verdict([rows[0], rows[2]], "uniform-g128") is None


def test_mixed_contenders_name_their_bits() -> None:
    found = {c.name: c for c in mixed_contenders([4.25, 6], "all-text-linears")}
    assert list(found) == ["uniform-g128", "uniform-g64", "uniform-g32", "mixed-4.25", "mixed-6"]
    assert found["uniform-g64"].group_size == 64
    assert "--target-bits=4.25" in found["mixed-4.25"].settings["arguments"]


@pytest.mark.parametrize("roles", ROLES)
def test_peers_are_given_the_same_weights(roles: str) -> None:
    """Modules as llm-compressor names them once experts are linears: our linear weights, and all other modules."""
    config = Llama4Config.from_dict(multimodal_config())
    target = re.compile(f".*language_model.*{TEXT_LINEARS[roles]}")
    names = {linear.name for linear in linear_specs(config)}
    names |= {name.rpartition(".")[0] for name in names} | {"language_model.model.norm", "language_model.lm_head"}
    assert {name for name in names if target.match(name)} == targets(config, ROLES[roles]).keys()


def test_mappings_of_the_peer_are_exact_and_include_the_router() -> None:
    config = Llama4Config.from_dict(multimodal_config())
    names = [linear.name for linear in linear_specs(config)]
    names += [n for layer in range(4) for n in [f"language_model.model.layers.{layer}"]]

    class Model:
        def named_modules(self) -> list[tuple[str, None]]:
            return [(name, None) for name in names]

    found = dict(worker_llmcompressor.per_layer(Model()))
    base = "language_model.model.layers.1"
    mlp = found[f"{base}.post_attention_layernorm"]
    assert f"{base}.feed_forward.router" in mlp
    assert len(mlp) == 1 + 2 * 5  # router; gate and up of shared expert and four experts
    assert found[f"{base}.feed_forward.experts.3.up_proj"] == [f"{base}.feed_forward.experts.3.down_proj"]
    assert found[f"{base}.self_attn.v_proj"] == [f"{base}.self_attn.o_proj"]
    dense = found["language_model.model.layers.0.post_attention_layernorm"]
    assert dense == [f"language_model.model.layers.0.feed_forward.{p}_proj" for p in ("gate", "up")]
    assert len(found) == 4 * 3 + 2 + 2 * 5  # two norms and v a layer; up of dense MLPs, shared and routed experts


def test_tokens_are_named_and_missing_options_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens.jsonl"
    tokens_file.write_text('{"input_ids": [1]}\n' * 3)
    rtn, best = (["--scheme", "W4A16", "--algorithm", name] for name in ("rtn", "best"))
    calibration = ["--calibration", str(tokens_file), "--num-calibration-samples", "3"]
    assert conversions.our_arguments(best, tokens_file) == best + calibration
    monkeypatch.setattr(conversions, "convert_help", lambda: "--scheme --observer")
    assert conversions.our_arguments(rtn, tokens_file) == ["--scheme", "W4A16"]
    with pytest.raises(conversions.UnavailableError, match="has no --algorithm, --calibration"):
        conversions.our_arguments(best, tokens_file)


def test_config_of_the_fixture_has_what_the_roles_name(source: Path) -> None:
    wanted = targets(Llama4Config.from_dict(multimodal_config()), ALL)
    assert len(wanted) == 4 * 4 + 2 * 3 + 2 * (3 + 4 * 3)  # attention; dense MLP; shared and routed experts
    assert len(targets(Llama4Config.from_dict(multimodal_config()), ROLES["feed-forward"])) == len(wanted) - 16


def test_the_ablation_converts_with_the_settings_that_it_names(tmp_path: Path) -> None:
    known = ablation_contenders("W4A16", 64, "all-text-linears")
    assert len({contender.name for contender in known}) == len(known)
    assert len({json.dumps(contender.settings) for contender in known}) == len(known)
    (without,) = choose(["ours-best-no-correction"], known)
    ids = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = tmp_path / "tokens.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    setting = conversions.Setting(
        model=SAMPLE_DIR, model_digest="m", tokens=rows, tokens_digest="t", seed=0, cache=tmp_path / "cache", pythons={}
    )
    made = conversions.convert(without, setting)
    report = json.loads((made.checkpoint / "quantization_report.json").read_text(encoding="utf-8"))
    assert report["calibration"]["algorithm"] == "best"
    assert all(layer["relative_error"] is None for layer in report["calibration"]["layers"])  # one model runs


def test_rounded_activations_alone_cost_something_that_grows_with_the_roles() -> None:
    windows_WL = torch.randint(3, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    all_linears, feed_forward = (activation_limit(SAMPLE_DIR, windows_WL, roles) for roles in ROLES)
    assert 0 < feed_forward < all_linears < 0.1
