"""Conversions with --target-bits: size, what shares a scheme, the report, resume, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from mixed_runs import ALL_TEXT, convert_mixed, tiny_model, token_lines

from llama4_quant import Scheme, load, preset
from llama4_quant.calibration.mixed import unit_name
from llama4_quant.calibration.run import PreparedCalibration
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.conversion.report import Report
from llama4_quant.errors import OutputError, UsageError
from llama4_quant.planning.make import make_plan
from llama4_quant.stored import quantized_weights
from llama4_quant.verification.verify import verify

STAGING = ".llama4-quant-partial"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixed")
    tiny_model(made / "bf16")
    token_lines(made / "tokens.jsonl")
    return made


def run(folder: Path, out: Path, bits: float | None, scheme: Scheme | None = ALL_TEXT, **settings: object) -> Report:
    return convert_mixed(folder / "bf16", out, str(folder / "tokens.jsonl"), bits=bits, scheme=scheme, **settings)


@pytest.fixture(scope="module")
def converted(folder: Path) -> tuple[Path, Report]:
    return folder / "out", run(folder, folder / "out", 5.0)


def stored_bits(out: Path) -> float:
    """Bits of codes and scales per weight of the decoder, counted in the files."""
    from llama4_quant.checkpoint.source import open_source  # noqa: PLC0415
    from llama4_quant.config import Llama4Config  # noqa: PLC0415

    with open_source(str(out)) as reader:
        weights = [
            weight
            for weight in quantized_weights(Llama4Config.from_dict(reader.config), reader.tensors)
            if weight.linear is not None and ".layers." in weight.name and not weight.name.endswith("router")
        ]
        num_bytes = sum(
            reader.tensors[name].nbytes for w in weights for name in w.tensors if not name.endswith("weight_shape")
        )
        return 8 * num_bytes / sum(weight.num_weights for weight in weights)


@pytest.mark.parametrize("bits", [4.125, 4.5, 9.0])
def test_the_target_is_an_upper_bound(bits: float, folder: Path, tmp_path: Path) -> None:
    report = run(folder, tmp_path / "out", bits)
    assert report.calibration is not None
    record = report.calibration.mixed_precision
    assert record is not None
    assert stored_bits(tmp_path / "out") == pytest.approx(record.bits, rel=1e-9)
    # What is left over is less than the smallest step up takes.
    assert bits - 0.25 < record.bits <= bits


def test_more_bits_are_predicted_to_lose_less(folder: Path, converted: tuple[Path, Report], tmp_path: Path) -> None:
    def predicted(report: Report) -> float:
        assert report.calibration is not None
        assert report.calibration.mixed_precision is not None
        return report.calibration.mixed_precision.predicted_kl

    assert predicted(converted[1]) < predicted(run(folder, tmp_path / "out", 4.2))


def test_what_loaders_fuse_shares_a_scheme(converted: tuple[Path, Report]) -> None:
    _, report = converted
    assert report.calibration is not None
    record = report.calibration.mixed_precision
    assert record is not None
    chosen = {unit.unit: unit.chosen for unit in record.units}
    seen: dict[str, set[str]] = {}
    for weight in report.weights:
        if ".layers." not in weight.name or "norm" in weight.name or weight.name.endswith("router"):
            continue
        unit = weight.name.partition(".experts.")[0] + ".experts" if ".experts." in weight.name else weight.name
        unit = re.sub(r"\b(gate|up)_proj", "gate_up_proj", re.sub(r"\b[qkv]_proj", "qkv_proj", unit))
        seen.setdefault(unit, set()).add(weight.scheme)
        assert weight.reason.startswith("target 5 bits: predicted KL ")
    assert seen == {unit: {scheme} for unit, scheme in chosen.items()}
    assert len(set(chosen.values())) > 1


def test_candidates_are_in_order_and_losses_fall(converted: tuple[Path, Report]) -> None:
    assert converted[1].calibration is not None
    record = converted[1].calibration.mixed_precision
    assert record is not None
    for unit in record.units:
        assert [c.bits for c in unit.candidates] == sorted(c.bits for c in unit.candidates)
        int4 = [c.predicted_kl for c in unit.candidates if c.scheme.startswith("int4")]
        assert int4 == sorted(int4, reverse=True)
        assert all(loss > 0 for loss in int4)
        assert (unit.candidates[-1].scheme, unit.candidates[-1].predicted_kl) == ("bf16", 0.0)


def test_the_report_survives_json(converted: tuple[Path, Report]) -> None:
    out, report = converted
    assert Report.from_json(json.loads((out / "quantization_report.json").read_text())) == report


def test_it_loads_and_verifies(folder: Path, converted: tuple[Path, Report]) -> None:
    out, _ = converted
    logits = load(out, dtype="float32")(torch.tensor([[5, 6, 7]]))
    exact = load(folder / "bf16", dtype="float32")(torch.tensor([[5, 6, 7]]))
    assert bool(torch.isfinite(logits).all())
    assert float((logits - exact).norm()) < 0.5 * float(exact.norm())
    assert not verify(out, source=folder / "bf16").problems


def test_the_same_again(folder: Path, converted: tuple[Path, Report], tmp_path: Path) -> None:
    run(folder, tmp_path / "again", 5.0)
    for path in converted[0].glob("*"):
        if path.name != "quantization_report.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert {p.name for p in tmp_path.iterdir()} == {"again"}, "the survey left files"


class Stop(Exception):  # noqa: N818 - it stands for any surprise
    pass


def interrupt(folder: Path, out: Path, bits: float | None) -> None:
    """Stop in the middle of the calibration."""
    count = 0

    def progress(what: str, num_bytes: int) -> None:
        nonlocal count
        count += "self_attn" in what and num_bytes > 0
        if count == 3:
            raise Stop

    with pytest.raises(Stop):
        run(folder, out, bits, progress=progress)
    assert (out / STAGING / "fingerprint.json").exists()


def test_resume_goes_on_with_what_was_chosen(
    folder: Path, converted: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(folder, tmp_path / "out", 5.0)

    def never(*_arguments: object) -> None:
        raise AssertionError("surveyed again")

    monkeypatch.setattr(PreparedCalibration, "choose_schemes", never)
    report = run(folder, tmp_path / "out", 5.0)
    assert report.calibration is not None
    assert converted[1].calibration is not None
    assert report.calibration.mixed_precision == converted[1].calibration.mixed_precision
    for path in converted[0].glob("*"):
        if path.name != "quantization_report.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("begun", "goes_on", "message"),
    [
        (5.0, 4.5, "target_bits was 5.0, is 4.5"),
        (5.0, None, "cannot be resumed"),
        (None, 5.0, "begun without --target-bits"),
    ],
)
def test_another_target_is_another_conversion(
    begun: float | None, goes_on: float | None, message: str, folder: Path, tmp_path: Path
) -> None:
    interrupt(folder, tmp_path / "out", begun)
    with pytest.raises(OutputError, match=message):
        run(folder, tmp_path / "out", goes_on)
    run(folder, tmp_path / "out", goes_on, resume="never")


@pytest.mark.parametrize("damage", [None, 3, [], {}, {"target_bits": 5.0, "units": [{}]}, {"units": 4}, "experts"])
def test_a_damaged_choice_is_refused(damage: object, folder: Path, tmp_path: Path) -> None:
    interrupt(folder, tmp_path / "out", 5.0)
    path = tmp_path / "out" / STAGING / "fingerprint.json"
    content = json.loads(path.read_text())
    if damage == "experts":
        content["mixed_precision"]["units"][0]["unit"] = "model.layers.0.experts"
    else:
        content["mixed_precision"] = damage
    path.write_text(json.dumps(content))
    with pytest.raises(OutputError, match="--resume never"):
        run(folder, tmp_path / "out", 5.0)


def test_too_few_bits(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--target-bits 4.01 is too little.*give --target-bits 4\.\d\d or more"):
        run(folder, tmp_path / "out", 4.01)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [3.9, 16, float("nan"), -1])
def test_targets_that_make_no_sense(bits: float) -> None:
    with pytest.raises(UsageError, match="expected at least 4"):
        make_calibration("best", target_bits=bits)


def test_rounding_to_nearest_measures_nothing() -> None:
    with pytest.raises(UsageError, match="choose --algorithm gptq or best"):
        make_calibration("rtn", target_bits=4.5)


def test_int4_is_where_it_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drop --scheme, or give W4A16"):
        run(folder, tmp_path / "out", 5.0, preset("FP8_DYNAMIC"))


def test_only_what_the_scheme_applies_to(folder: Path, tmp_path: Path) -> None:
    scheme = preset("W4A16", group_size=64, quantize=["lm-head"], ignore=[r"re:.*layers\.1\.feed_forward\.experts"])
    report = run(folder, tmp_path / "out", 4.5, scheme)
    stored = {weight.name: weight.scheme for weight in report.weights}
    assert {scheme for name, scheme in stored.items() if "self_attn" in name} == {"bf16"}
    assert {scheme for name, scheme in stored.items() if ".1.feed_forward.experts" in name} == {"bf16"}
    assert stored["lm_head"] == "int4 g64"
    assert report.calibration is not None
    assert report.calibration.mixed_precision is not None
    assert not any("self_attn" in unit.unit for unit in report.calibration.mixed_precision.units)
    load(tmp_path / "out")


def test_units_are_what_vllm_fuses(folder: Path) -> None:
    from llama4_quant.config import Llama4Config  # noqa: PLC0415

    plan = make_plan(Llama4Config.from_file(folder / "bf16" / "config.json"), ALL_TEXT)
    units = {unit_name(decision) for decision in plan.decisions if decision.scheme is not None}
    assert {name.removeprefix("model.layers.1.") for name in units if ".layers.1." in name} == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "feed_forward.experts",
        "feed_forward.shared_expert.gate_up_proj",
        "feed_forward.shared_expert.down_proj",
    }
