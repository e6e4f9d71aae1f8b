"""Scales of an FP8 KV cache: what they are, where they are written, and that an interruption does not change them."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cache_conversions import ALL_EXPERTS, calibration, converted, source, token_samples
from calibrated_runs import exact_matmul
from checkpoints import multimodal_config, text_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama4_quant import load, preset
from llama4_quant.calibration import layer as layer_module
from llama4_quant.calibration.cache_scales import CacheCalibration, cache_scale
from llama4_quant.calibration.records import CacheScaleRecord
from llama4_quant.calibration.rows import RowFile
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.calibration.weights import Weights
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.conversion.report import Report
from llama4_quant.errors import CheckpointError, QuantizationError, SchemeError, UsageError
from llama4_quant.ops.reference import round_fp8
from llama4_quant.runtime.cache_formats import CacheFormat, CacheScales
from llama4_quant.verification.verify import verify

FP8_MAX = 448.0
POSITIVE = st.floats(2.0**-100, 2.0**100)


# One scale


@given(POSITIVE)
def test_a_scale_puts_the_largest_magnitude_on_the_largest_code(absmax: float) -> None:
    scale = cache_scale(absmax)
    assert scale == float(torch.tensor(scale).to(torch.bfloat16))
    assert abs(scale / (absmax / FP8_MAX) - 1) <= 2.0**-8  # bf16 has 8 significant bits; float32 rounds before that
    assert float(round_fp8(torch.tensor([absmax]), scale)) == FP8_MAX * scale


def test_nothing_to_scale() -> None:
    assert cache_scale(0.0) == 1.0
    assert 0 < cache_scale(1e-45) < 1e-30


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), POSITIVE)
def test_rounding_is_to_the_nearest_code(fractions: list[float], absmax: float) -> None:
    x = torch.tensor(fractions, dtype=torch.float64) * absmax
    scale = cache_scale(absmax)
    rounded = round_fp8(x, scale)
    # Half a step: 2^-4 of the value, 2^-10 scales among subnormals; and what saturates was off by 2^-8 at most.
    assert bool(((rounded - x).abs() <= torch.maximum(x.abs() * 2.0**-4, torch.tensor(scale * 2.0**-10))).all())


def test_rounding_saturates() -> None:
    assert round_fp8(torch.tensor([-1e9, 449.0, 1e9]), 1.0).tolist() == [-448.0, 448.0, 448.0]


# What is measured: keys and values as transformers caches them, in the quantized model, in float64


@contextmanager
def exact_products() -> Iterator[None]:
    """The pass may round inputs of products on some machines; here its numbers are compared."""

    with pytest.MonkeyPatch.context() as patch:
        exact_matmul(patch)
        yield


def cached_by_transformers(out: Path) -> list[tuple[float, float]]:
    """Largest magnitudes of keys and values by layer, as they are given to the cache, before they are rounded."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = token_samples()
    with torch.no_grad():
        model(input_ids=ids[:1], use_cache=True)  # decompresses
        model.double()
        largest = [[0.0, 0.0] for _ in model.model.layers]

        def look(layer: int) -> Callable[[object, tuple[Tensor, ...]], None]:
            def hook(_module: object, given: tuple[Tensor, ...]) -> None:
                largest[layer] = [
                    max(old, float(new.abs().max())) for old, new in zip(largest[layer], given[:2], strict=True)
                ]

            return hook

        for number, layer in enumerate(model.model.layers):
            layer.self_attn.kv_cache.register_forward_pre_hook(look(number))
        model(input_ids=ids, use_cache=True)
    return [(key, value) for key, value in largest]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("algorithm", ["gptq", "best"])
def test_scales_are_those_of_a_dense_reference(algorithm: str, qk_norm: bool, tmp_path: Path) -> None:
    bf16 = source(tmp_path, text_config(use_qk_norm=qk_norm, **ALL_EXPERTS))
    with exact_products():
        report = converted(bf16, tmp_path / "out", algorithm=algorithm)
    records = cache_records(report)
    expected = cached_by_transformers(tmp_path / "out")
    assert len(records) == len(expected) == 4
    for record, (key, value) in zip(records, expected, strict=True):
        # float32 against float64; a key on the border of two codes may round differently for the layers above.
        assert math.isclose(record.largest_key, key, rel_tol=2e-3)
        assert math.isclose(record.largest_value, value, rel_tol=2e-3)
        assert record.k_scale == cache_scale(record.largest_key)
        assert record.v_scale == cache_scale(record.largest_value)
    assert len({record.largest_key for record in records}) == 4


def cache_records(report: Report) -> list[CacheScaleRecord]:
    assert report.calibration is not None
    records = [layer.cache for layer in report.calibration.layers]
    assert all(record is not None for record in records)
    return [record for record in records if record is not None]


# What is written


def tensors_of(out: Path) -> dict[str, Tensor]:
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    converted(source(folder, multimodal_config()), folder / "out")
    return folder / "out"


def test_two_tensors_a_layer(out: Path) -> None:
    report = Report.from_json(json.loads((out / "quantization_report.json").read_text()))
    records, tensors = cache_records(report), tensors_of(out)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    assert scales.keys() == {
        f"language_model.model.layers.{layer}.self_attn.{kind}_scale" for layer in range(4) for kind in "kv"
    }
    for name, tensor in scales.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == (1,)
        record = records[int(name.split(".")[3])]
        assert float(tensor) == (record.k_scale if name.endswith("k_scale") else record.v_scale)
    assert report.totals.bytes_out == sum(tensor.nbytes for tensor in tensors.values())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert scales.keys() <= index.keys()
    assert verify(out).problems == ()


def test_the_plan_knows_them_before(out: Path) -> None:
    planned = dry_run(out.parent / "bf16", scheme=preset("W4A16", group_size=32), calibration=calibration(out.parent))
    plain = dry_run(out.parent / "bf16", scheme=preset("W4A16", group_size=32))
    assert planned.totals.bytes_out == plain.totals.bytes_out + 4 * 2 * 4
    assert any("KV cache in FP8" in note for note in planned.notes)
    assert not any("KV cache" in note for note in plain.notes)


def test_weights_are_the_same_bytes_in_the_first_layer(out: Path, tmp_path: Path) -> None:
    """What comes before the first cache does not depend on it; what comes after it does."""
    converted(out.parent / "bf16", tmp_path / "plain", kv_cache=None)
    with_cache, plain = tensors_of(out), tensors_of(tmp_path / "plain")
    assert with_cache.keys() - plain.keys() == {name for name in with_cache if name.endswith(("k_scale", "v_scale"))}
    differ = {name for name in plain if not torch.equal(with_cache[name], plain[name])}
    base = "language_model.model.layers."
    assert differ
    assert all(name.startswith(base) for name in differ)
    assert not any(name.startswith(tuple(f"{base}0.self_attn.{kind}_proj" for kind in "qkv")) for name in differ)
    assert any(name.startswith(f"{base}0.self_attn.o_proj") for name in differ)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None


# Loading


def test_loading_rounds_keys_and_values(out: Path) -> None:
    model = load(out, dtype="float32")
    tensors = tensors_of(out)
    for number, layer in enumerate(model.model.layers):
        base = f"language_model.model.layers.{number}.self_attn"
        expected = CacheScales(key=float(tensors[f"{base}.k_scale"]), value=float(tensors[f"{base}.v_scale"]))
        assert layer.self_attn.cache_scales == expected
    ids = token_samples()[:2]
    rounded = model(ids)
    cache = model.new_cache(2)
    pieces = torch.cat([model(part, cache=cache) for part in ids.split(5, dim=1)], dim=1)
    scales = model.model.layers[3].self_attn.cache_scales  # a NoPE layer: its cache holds all tokens
    assert scales is not None
    assert cache.layers[3].format.key == CacheFormat(dtype=torch.float8_e4m3fn, scale=scales.key)
    for layer in model.model.layers:
        layer.self_attn.cache_scales = None
    # A sum of another order (the last bits of float32) may turn a code at the edge between two: one of thousands.
    unrounded = model(ids)
    assert float((pieces - rounded).norm()) < 0.1 * float((unrounded - rounded).norm())
    assert float((unrounded - rounded).abs().max()) > 1e-3 * float(rounded.std())


@pytest.mark.parametrize("damage", [0.0, -1.0, math.nan, math.inf])
def test_a_damaged_scale_is_named(damage: float, out: Path, tmp_path: Path) -> None:
    name = "language_model.model.layers.2.self_attn.v_scale"
    copy = damaged(out, tmp_path, name, torch.tensor([damage]))
    problems = verify(copy).problems
    assert [problem.what for problem in problems if problem.where == name] == [
        f"the scale of a KV cache is {damage}, expected a finite number over 0"
    ]
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.v_scale: the scale of a KV cache is"):
        load(copy)


def test_a_missing_or_misshapen_scale_is_named(out: Path, tmp_path: Path) -> None:
    name = "language_model.model.layers.1.self_attn.k_scale"
    copy = damaged(out, tmp_path, name, torch.ones(2))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_scale: F32 \[2\].*asks for .* \[1\]"):
        load(copy)
    assert load(damaged(out, tmp_path / "scalar", name, torch.tensor(0.5))) is not None
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_scale is missing"):
        load(damaged(out, tmp_path / "missing", name, None))


def damaged(out: Path, folder: Path, name: str, value: Tensor | None) -> Path:
    """A copy in which a tensor has another value, or is missing."""
    copy = folder / "copy"
    copy.mkdir(parents=True)
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        if name in tensors:
            del tensors[name]
            tensors |= {} if value is None else {name: value}
        with safe_open(path, "pt") as file:
            save_file(tensors, copy / path.name, metadata=file.metadata())
    if value is None:
        index = json.loads((copy / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


# Interruptions


class Stop(Exception):  # noqa: N818 - it stands for any surprise
    pass


def interrupt(bf16: Path, out: Path, owner: type, method: str, after: int) -> None:
    """Convert until a method has been called so often; the next call fails."""
    original = getattr(owner, method)
    left = after

    def counted(*arguments: object) -> object:
        nonlocal left
        if left == 0:
            raise Stop
        left -= 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, counted)
        with pytest.raises(Stop):
            converted(bf16, out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "quantization_report.json"}


@pytest.mark.parametrize("power_loss", [False, True])
@pytest.mark.parametrize(
    ("owner", "method", "after"),
    [
        (CacheCalibration, "scales", 0),
        (CacheCalibration, "scales", 2),  # layers 0 and 1 are complete
        (Weights, "quantize", 1),  # layer 0 has its scales, and no o_proj
        (Weights, "quantize", 4),  # q, k and v of layer 1
        (RowFile, "sync", 2),  # between layer 1 and state.json
    ],
)
def test_an_interruption_changes_nothing(
    owner: type, method: str, after: int, power_loss: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = source(tmp_path, text_config())
    reference = converted(bf16, tmp_path / "reference")
    out = tmp_path / "out"
    interrupt(bf16, out, owner, method, after)
    if power_loss:  # what was not synced does not count
        monkeypatch.setattr("llama4_quant.checkpoint.journal.boot_id", lambda: "another boot")
    resumed = converted(bf16, out)
    assert contents(out) == contents(tmp_path / "reference")
    assert resumed.calibration is not None
    assert reference.calibration is not None
    assert cache_records(resumed) == cache_records(reference)
    assert verify(out).problems == ()


def test_finished_scales_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = source(tmp_path, text_config())
    interrupt(bf16, tmp_path / "out", Weights, "quantize", 1)
    measured, original = [], layer_module.LayerPass._cache_ranges

    def counted(self: layer_module.LayerPass, *arguments: object) -> tuple[float, float]:
        measured.append(self._layer)
        return original(self, *arguments)

    monkeypatch.setattr(layer_module.LayerPass, "_cache_ranges", counted)
    converted(bf16, tmp_path / "out")
    assert measured == [1, 2, 3]


# Refusals


def test_no_scales_without_data() -> None:
    with pytest.raises(UsageError, match=r"--kv-cache-scheme fp8: its scales come from calibration data.*gptq or best"):
        make_calibration("rtn", kv_cache_scheme="fp8")
    with pytest.raises(SchemeError, match="unknown KV-cache scheme 'int8'; known schemes: fp8"):
        make_calibration("gptq", kv_cache_scheme="int8")


def test_other_formats_have_no_place_for_them(tmp_path: Path) -> None:
    bf16 = source(tmp_path, text_config())
    with pytest.raises(SchemeError, match="--format bf16 has no place for scales of a KV cache"):
        convert(bf16, tmp_path / "out", format="bf16", calibration=calibration(tmp_path))
    with pytest.raises(SchemeError, match="--format fbgemm-fp8 has no place"):
        dry_run(bf16, format="fbgemm-fp8", calibration=calibration(tmp_path))


def test_a_cache_that_overflows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = source(tmp_path, text_config())
    monkeypatch.setattr(layer_module.LayerPass, "_cache_ranges", lambda *_: (1.0, math.nan))
    with pytest.raises(QuantizationError, match=r"layers.0.self_attn.v_scale: the largest magnitude.* is nan"):
        converted(bf16, tmp_path / "out")


def test_another_cache_is_another_conversion(tmp_path: Path) -> None:
    bf16 = source(tmp_path, text_config())
    interrupt(bf16, tmp_path / "out", CacheCalibration, "scales", 2)
    with pytest.raises(Exception, match="kv_cache_scheme was 'fp8', is None"):
        converted(bf16, tmp_path / "out", kv_cache=None)
