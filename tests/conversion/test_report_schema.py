"""quantization_report.json: every key and type of it, and that nothing is lost on the way through JSON."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from calibrated_runs import calibrate, tiny_checkpoint, token_data

from llama4_quant.calibration.records import CalibrationRecord, CalibrationReport, LayerRecord
from llama4_quant.checkpoint.manifest import CHECKSUM_KEY, has_self_checksum
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.conversion.report import REPORT_NAME, Report, WeightRecord
from llama4_quant.scheme import preset

SCHEME = preset("W4A16", group_size=32, quantize=["attention"], ignore=["re:.*layers.0.self_attn.q_proj"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("schema") / "bf16")


def check(value: Any, hint: Any, where: str) -> None:
    """Assert that plain JSON data is what a type hint of a dataclass says."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        options = [option for option in arguments if option is not type(None)]
        if value is None:
            assert len(options) < len(arguments), where
            return
        assert len(options) == 1, where
        check(value, options[0], where)
    elif origin is tuple:
        assert isinstance(value, list), where
        assert len(arguments) == 2, where
        assert arguments[1] is Ellipsis, where
        for index, item in enumerate(value):
            check(item, arguments[0], f"{where}[{index}]")
    elif dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        assert value.keys() == hints.keys(), where
        for key, inner in hints.items():
            check(value[key], inner, f"{where}.{key}")
    elif hint is float:
        assert type(value) in {int, float}, where
    else:
        assert type(value) is hint, f"{where}: {value!r} is no {hint}"


def strict(path: Path) -> Any:
    """JSON without NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "best"])
def test_every_key_and_type(source: Path, tmp_path: Path, algorithm: str) -> None:
    if algorithm == "rtn":
        report = convert(source, tmp_path / "out", scheme=SCHEME)
    else:
        data = token_data(tmp_path / "tokens.jsonl")
        report = calibrate(source, tmp_path / "out", [data], algorithm=algorithm, scheme=SCHEME)
    content = strict(tmp_path / "out" / REPORT_NAME)
    assert has_self_checksum(content)
    check({key: value for key, value in content.items() if key != CHECKSUM_KEY}, Report, "report")
    assert Report.from_json(content) == report
    assert json.loads(json.dumps(report.to_json())) == content
    if algorithm == "rtn":
        assert report.calibration is None
        assert all(weight.calibration is None for weight in report.weights)
    else:
        check_calibration(report, algorithm)


def check_calibration(report: Report, algorithm: str) -> None:
    calibration = report.calibration
    assert isinstance(calibration, CalibrationReport)
    assert (calibration.algorithm, calibration.num_samples) == (algorithm, 7)
    assert [layer.layer for layer in calibration.layers] == [0, 1, 2, 3]
    for layer in calibration.layers:
        assert isinstance(layer, LayerRecord)
        assert len(layer.rows_per_expert) == (4 if layer.layer % 2 else 0)
        assert (layer.relative_error is not None) == (layer.sqnr_db is not None) == (algorithm == "best")
        assert (layer.rerouted is not None) == (algorithm == "best" and layer.layer % 2 == 1)
    calibrated = [weight for weight in report.weights if weight.calibration is not None]
    assert {weight.name for weight in calibrated} == {w.name for w in report.weights if w.scheme != "bf16"}
    for weight in calibrated:
        record = weight.calibration
        assert isinstance(weight, WeightRecord)
        assert isinstance(record, CalibrationRecord)
        assert record.method == (algorithm if record.num_rows else "rtn")
        assert weight.relative_error is not None


def test_a_planned_report_has_the_same_keys(source: Path) -> None:
    report = dry_run(source, scheme=SCHEME)
    content = json.loads(json.dumps(report.to_json()))
    check({key: value for key, value in content.items() if key != CHECKSUM_KEY}, Report, "report")
    assert Report.from_json(content) == report
    assert content["output"] is content["seconds"] is content["calibration"] is None
