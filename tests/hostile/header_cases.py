"""safetensors files that lie: about lengths, offsets, shapes, dtypes and names."""

from pathlib import Path

from checkpoint.checkpoint_files import raw_file, record, single_file
from hostile.cases import Bases, Case

from llama4_quant.checkpoint.header import MAX_HEADER_BYTES

GOOD = {"a": record(shape=[4], offsets=[0, 4]), "b": record(dtype="F32", shape=[2, 2], offsets=[4, 20])}
DATA = bytes(20)
BIG = 2**62


def one_tensor(**fields: object) -> bytes:
    return raw_file({"w": {**record(), **fields}}, bytes(4))


def two_tensors(first: list[int], second: list[int], size: int) -> bytes:
    tensors = {name: record(shape=[o[1] - o[0]], offsets=o) for name, o in (("a", first), ("b", second))}
    return raw_file(tensors, bytes(size))


FILES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "found only 0 bytes; download it again"),
    "seven bytes": (b"\x01" * 7, "found only 7 bytes"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "run `git lfs pull`"),
    "header of length 0": (raw_file(b""), "found a length of 0"),
    "header of 2^64 - 1": (b"\xff" * 8 + b"{}", "found a length of 18,446,744,073,709,551,615"),
    "header over the limit": (raw_file(b"{}", length=MAX_HEADER_BYTES + 1), "found a length of 100,000,001"),
    "header longer than the file": (
        raw_file(b"{}", length=1000),
        r"998 bytes short \(expected 1,008, found 10\); download",
    ),
    "header cut inside": (raw_file(GOOD, DATA, length=20), "safetensors header: not valid JSON"),
    "header is a list": (raw_file(b"[]"), "expected a JSON object"),
    "header not UTF-8": (raw_file(b'{"\xff": 1}'), "expected UTF-8"),
    "header nested": (raw_file(b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested more than 64"),
    "tensor twice": (raw_file(b'{"a":1,"a":1}'), "'a' occurs twice"),
    "field twice": (
        raw_file(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"0"),
        "occurs twice",
    ),
    "truncated data": (raw_file(GOOD, DATA)[:-7], "the file is 7 bytes short"),
    "no data": (raw_file(GOOD), "the file is 20 bytes short"),
    "bytes after the data": (raw_file(GOOD, DATA + b"123"), "the file is 3 bytes too long"),
    "no tensors": (raw_file(b"{}"), "its files hold no tensors"),
    "only metadata": (raw_file({"__metadata__": {"format": "pt"}}), "hold no tensors"),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}, **GOOD}, DATA), "__metadata__ to map strings"),
    "metadata a list": (raw_file({"__metadata__": [], **GOOD}, DATA), "__metadata__ to map strings"),
    "overlap": (two_tensors([0, 4], [2, 6], 6), "tensor 'b' overlaps the tensor before it"),
    "same bytes twice": (two_tensors([0, 4], [0, 4], 4), "overlaps"),
    "inside another": (two_tensors([0, 8], [2, 4], 8), "overlaps"),
    "hole": (two_tensors([0, 4], [6, 10], 10), r"tensor 'b' leaves a hole before it \(expected byte"),
    "hole at the start": (two_tensors([2, 4], [4, 6], 6), "tensor 'a' leaves a hole"),
    "offsets beyond the file": (one_tensor(shape=[BIG], data_offsets=[0, BIG]), "bytes short"),
    "offsets far away": (one_tensor(data_offsets=[BIG, BIG + 4]), "leaves a hole"),
    "offsets backwards": (one_tensor(data_offsets=[4, 0]), "data_offsets that span 4 bytes"),
    "offsets negative": (one_tensor(data_offsets=[-4, 0]), r"integers from 0 to 2\^63 - 1"),
    "offsets of 2^64": (one_tensor(data_offsets=[2**64, 2**64 + 4]), "integers from 0"),
    "offsets with one item": (one_tensor(data_offsets=[4]), "data_offsets that span"),
    "offsets with three": (one_tensor(data_offsets=[0, 4, 8]), "data_offsets that span"),
    "offsets a string": (one_tensor(data_offsets="04"), "integers from 0"),
    "offsets floats": (one_tensor(data_offsets=[0.0, 4.0]), "integers from 0"),
    "offsets booleans": (one_tensor(shape=[1], data_offsets=[False, True]), "integers from 0"),
    "offsets null": (one_tensor(data_offsets=None), "integers from 0"),
    "shape negative": (one_tensor(shape=[-2, -2]), "shape: expected a list of integers"),
    "shape of 2^63": (one_tensor(shape=[2**63]), "shape: expected a list of integers"),
    "shape that overflows": (one_tensor(shape=[2**32, 2**32]), r"2\^63 elements"),
    "shape that overflows beside a zero": (one_tensor(shape=[0, 2**32, 2**32], data_offsets=[0, 0]), r"2\^63 elements"),
    "shape that wraps to 4": (one_tensor(shape=[2**62, 4, 1]), r"2\^63 elements"),
    "shape with 9 dimensions": (one_tensor(shape=[1] * 8 + [4]), "at most 8 dimensions"),
    "shape with many dimensions": (one_tensor(shape=[1] * 100_000), "at most 8 dimensions"),
    "shape a number": (one_tensor(shape=4), "shape: expected a list"),
    "shape of strings": (one_tensor(shape=["4"]), "shape: expected a list"),
    "shape nested": (one_tensor(shape=[[4]]), "shape: expected a list"),
    "shape too small": (one_tensor(shape=[3]), r"span 3 bytes \(U8 \[3\]\), found \[0, 4\]"),
    "dtype unknown": (one_tensor(dtype="F3"), "dtype 'F3' is not supported; supported: BOOL"),
    "dtype of half a byte": (one_tensor(dtype="F4", shape=[8]), "dtype 'F4' is not supported"),
    "dtype lower case": (one_tensor(dtype="u8"), "dtype 'u8' is not supported"),
    "dtype a number": (one_tensor(dtype=8), "dtype 8 is not supported"),
    "dtype a list": (one_tensor(dtype=["U8"]), "is not supported"),
    "dtype of another size": (one_tensor(dtype="F32"), "span 16 bytes"),
    "field missing": (raw_file({"w": {"dtype": "U8", "shape": [4]}}, bytes(4)), "expected the fields dtype, shape"),
    "field too many": (one_tensor(extra=1), "expected the fields dtype, shape"),
    "tensor a number": (raw_file({"w": 1}), "expected the fields"),
    "tensor null": (raw_file({"w": None}), "expected the fields"),
    "name empty": (raw_file({"": record()}, bytes(4)), "expected a printable name"),
    "name with an escape": (raw_file({"\x1b[2J": record()}, bytes(4)), "expected a printable name"),
    "name with a surrogate": (
        raw_file(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        "which is no character",
    ),
    "name with a newline": (raw_file({"a\nb": record()}, bytes(4)), "expected a printable name"),
    "name of a million characters": (raw_file({"w" * 10**6: record()}, bytes(4)), "name of at most 512 characters"),
    "numbers of 5000 digits": (raw_file(b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "not valid JSON"),
    "5 million values": (raw_file(b'{"w":[' + b"0," * 5_000_000 + b"0]}"), "JSON tokens"),
}


def _case(name: str, content: bytes, message: str) -> Case:
    def make(root: Path, _bases: Bases) -> None:
        single_file(root / "model", content)

    return Case(name=f"header: {name}", make=make, message=message)


def header_cases() -> list[Case]:
    """One for each file."""
    return [_case(name, content, message) for name, (content, message) in FILES.items()]
