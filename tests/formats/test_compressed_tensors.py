import pytest
import torch

from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.errors import CheckpointError, SchemeError
from llama4_quant.formats.compressed_tensors import decode, encode, encode_rows, output_tensors
from llama4_quant.quantizers.quantize import QuantizedWeight, quantize_weight
from llama4_quant.scheme import WeightScheme, preset

NAME = "language_model.model.layers.1.feed_forward.experts.7.gate_proj"
SCHEMES = {
    f"{name} {group_size}": preset(name, group_size=group_size, observer="absmax").weights
    for name, group_size in (
        ("W4A16", 32),
        ("W4A16", 64),
        ("W4A16", 128),
        ("W4A16", -1),
        ("FP8_DYNAMIC", None),
        ("FP8_BLOCK", None),
    )
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def quantized(scheme: WeightScheme, shape: tuple[int, int] = (300, 384)) -> QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return quantize_weight(weight, scheme)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@every_scheme
def test_encode_gives_the_planned_tensors(scheme: WeightScheme) -> None:
    tensors = encode(NAME, quantized(scheme))
    found = tuple(OutputTensor(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items())
    assert found == output_tensors(NAME, (300, 384), scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_planned_tensors_are_those_of_the_format() -> None:
    def planned(name: str, shape: tuple[int, int]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(t.name, t.dtype, t.shape) for t in output_tensors("m", shape, SCHEMES[name])]

    assert planned("W4A16 64", (10, 192)) == [
        ("m.weight_packed", torch.int32, (10, 24)),
        ("m.weight_scale", torch.bfloat16, (10, 3)),
        ("m.weight_shape", torch.int64, (2,)),
    ]
    assert planned("W4A16 -1", (10, 100))[:2] == [
        ("m.weight_packed", torch.int32, (10, 13)),
        ("m.weight_scale", torch.bfloat16, (10, 1)),
    ]
    assert planned("FP8_DYNAMIC None", (10, 100)) == [
        ("m.weight", torch.float8_e4m3fn, (10, 100)),
        ("m.weight_scale", torch.float32, (10, 1)),
    ]
    assert planned("FP8_BLOCK None", (300, 256)) == [
        ("m.weight", torch.float8_e4m3fn, (300, 256)),
        ("m.weight_scale", torch.float32, (3, 2)),
    ]


def test_weight_shape_holds_out_and_in() -> None:
    assert encode("m", quantized(SCHEMES["W4A16 -1"], (3, 50)))["m.weight_shape"].tolist() == [3, 50]


@every_scheme
def test_decode_is_the_inverse_of_encode(scheme: WeightScheme) -> None:
    original = quantized(scheme)
    decoded = decode(NAME, encode(NAME, original), scheme)
    assert decoded.scheme == scheme
    assert decoded.codes.dtype is original.codes.dtype
    assert torch.equal(bits(decoded.codes), bits(original.codes))
    assert decoded.scale.dtype is original.scale.dtype
    assert torch.equal(decoded.scale, original.scale)


@every_scheme
def test_chunks_of_rows_fill_the_tensors_of_the_whole(scheme: WeightScheme) -> None:
    whole = quantized(scheme)
    expected = encode(NAME, whole)
    filled = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    written = dict.fromkeys(expected, 0)
    for start in (256, 0, 128):  # any order
        rows = slice(start, min(start + 128, 300))
        scale_rows = slice(start // 128, start // 128 + 1) if scheme.strategy == "block" else rows
        part = QuantizedWeight(codes=whole.codes[rows], scale=whole.scale[scale_rows], scheme=scheme)
        for piece in encode_rows(NAME, part, row_start=start, out_features=300):
            filled[piece.name][piece.row_start : piece.row_start + len(piece.values)] = piece.values
            written[piece.name] += len(piece.values)
    assert written == {name: len(tensor) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(bits(filled[name]), bits(tensor)), name


def test_foreign_scale_dtypes_keep_their_values() -> None:
    tensors = encode("m", quantized(SCHEMES["FP8_DYNAMIC None"]))
    bf16 = tensors | {"m.weight_scale": tensors["m.weight_scale"].to(torch.bfloat16)}
    decoded = decode("m", bf16, SCHEMES["FP8_DYNAMIC None"])
    assert decoded.scale.dtype is torch.float32
    assert torch.equal(decoded.scale, tensors["m.weight_scale"])
    tensors = encode("m", quantized(SCHEMES["W4A16 64"]))
    exact = tensors["m.weight_scale"].float() * (1 + 2.0**-20)  # no bf16 number
    assert torch.equal(decode("m", tensors | {"m.weight_scale": exact}, SCHEMES["W4A16 64"]).scale, exact)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("W4A16 64", {"m.weight_scale": None}, "m.weight_scale is missing"),
        ("W4A16 64", {"m.weight_shape": None}, "m.weight_shape is missing"),
        ("W4A16 64", {"m.weight_packed": torch.zeros(300, 48)}, "m.weight_packed: expected int32, found float32"),
        ("W4A16 64", {"m.weight_shape": torch.tensor([300, 385])}, r"m.weight_packed: expected shape \[300, 49\]"),
        ("W4A16 64", {"m.weight_shape": torch.tensor([300])}, r"m.weight_shape: expected shape \[2\], found \[1\]"),
        ("W4A16 64", {"m.weight_scale": torch.ones(300, 3)}, r"expected shape \[300, 6\], found \[300, 3\]"),
        ("FP8_DYNAMIC None", {"m.weight": torch.ones(300, 384)}, "m.weight: expected float8_e4m3fn, found float32"),
        ("FP8_DYNAMIC None", {"m.weight_scale": torch.ones(300)}, r"expected shape \[300, 1\], found \[300\]"),
        ("FP8_BLOCK None", {"m.weight_scale": torch.ones(2, 3)}, r"expected shape \[3, 3\], found \[2, 3\]"),
        (
            "FP8_DYNAMIC None",
            {"m.weight": torch.zeros(2, 300, 384, dtype=torch.float8_e4m3fn)},
            r"m.weight: expected shape \[2, 384\], found \[2, 300, 384\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = encode("m", quantized(SCHEMES[name])) | change
    with pytest.raises(CheckpointError, match=message):
        decode("m", {key: value for key, value in tensors.items() if value is not None}, SCHEMES[name])


def test_a_width_that_the_scheme_cannot_store_is_refused_by_name() -> None:
    with pytest.raises(SchemeError, match=r"^m: in_features 100 is not divisible by group size 64"):
        output_tensors("m", (10, 100), SCHEMES["W4A16 64"])
