"""safetensors files that lie: each is refused with one message that names the file and what is wrong."""

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import raw_file, record, single_file
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_quant.checkpoint.header import MAX_HEADER_BYTES, encode_header
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.errors import CheckpointError

GOOD = {"a": record(shape=[4], offsets=[0, 4]), "b": record(dtype="F32", shape=[2, 2], offsets=[4, 20])}
DATA = bytes(20)
BIG = 2**62


def _one(**fields: object) -> bytes:
    return raw_file({"w": {**record(), **fields}}, bytes(4))


def _pair(first: list[int], second: list[int], size: int) -> bytes:
    tensors = {name: record(shape=[o[1] - o[0]], offsets=o) for name, o in (("a", first), ("b", second))}
    return raw_file(tensors, bytes(size))


FILES = {
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
    "overlap": (_pair([0, 4], [2, 6], 6), "tensor 'b' overlaps the tensor before it"),
    "same bytes twice": (_pair([0, 4], [0, 4], 4), "overlaps"),
    "inside another": (_pair([0, 8], [2, 4], 8), "overlaps"),
    "hole": (_pair([0, 4], [6, 10], 10), r"tensor 'b' leaves a hole before it \(expected byte"),
    "hole at the start": (_pair([2, 4], [4, 6], 6), "tensor 'a' leaves a hole"),
    "offsets beyond the file": (_one(shape=[BIG], data_offsets=[0, BIG]), "bytes short"),
    "offsets far away": (_one(data_offsets=[BIG, BIG + 4]), "leaves a hole"),
    "offsets backwards": (_one(data_offsets=[4, 0]), "data_offsets that span 4 bytes"),
    "offsets negative": (_one(data_offsets=[-4, 0]), r"integers from 0 to 2\^63 - 1"),
    "offsets of 2^64": (_one(data_offsets=[2**64, 2**64 + 4]), "integers from 0"),
    "offsets with one item": (_one(data_offsets=[4]), "data_offsets that span"),
    "offsets with three": (_one(data_offsets=[0, 4, 8]), "data_offsets that span"),
    "offsets a string": (_one(data_offsets="04"), "integers from 0"),
    "offsets floats": (_one(data_offsets=[0.0, 4.0]), "integers from 0"),
    "offsets booleans": (_one(shape=[1], data_offsets=[False, True]), "integers from 0"),
    "offsets null": (_one(data_offsets=None), "integers from 0"),
    "shape negative": (_one(shape=[-2, -2]), "shape: expected a list of integers"),
    "shape of 2^63": (_one(shape=[2**63]), "shape: expected a list of integers"),
    "shape that overflows": (_one(shape=[2**32, 2**32]), r"2\^63 elements"),
    "shape that overflows beside a zero": (_one(shape=[0, 2**32, 2**32], data_offsets=[0, 0]), r"2\^63 elements"),
    "shape that wraps to 4": (_one(shape=[2**62, 4, 1]), r"2\^63 elements"),
    "shape with 9 dimensions": (_one(shape=[1] * 8 + [4]), "at most 8 dimensions"),
    "shape with many dimensions": (_one(shape=[1] * 100_000), "at most 8 dimensions"),
    "shape a number": (_one(shape=4), "shape: expected a list"),
    "shape of strings": (_one(shape=["4"]), "shape: expected a list"),
    "shape nested": (_one(shape=[[4]]), "shape: expected a list"),
    "shape too small": (_one(shape=[3]), r"span 3 bytes \(U8 \[3\]\), found \[0, 4\]"),
    "dtype unknown": (_one(dtype="F3"), "dtype 'F3' is not supported; supported: BOOL"),
    "dtype of half a byte": (_one(dtype="F4", shape=[8]), "dtype 'F4' is not supported"),
    "dtype lower case": (_one(dtype="u8"), "dtype 'u8' is not supported"),
    "dtype a number": (_one(dtype=8), "dtype 8 is not supported"),
    "dtype a list": (_one(dtype=["U8"]), "is not supported"),
    "dtype of another size": (_one(dtype="F32"), "span 16 bytes"),
    "field missing": (raw_file({"w": {"dtype": "U8", "shape": [4]}}, bytes(4)), "expected the fields dtype, shape"),
    "field too many": (_one(extra=1), "expected the fields dtype, shape"),
    "tensor a number": (raw_file({"w": 1}), "expected the fields"),
    "tensor null": (raw_file({"w": None}), "expected the fields"),
    "name empty": (raw_file({"": record()}, bytes(4)), "expected a printable name"),
    "name with an escape": (raw_file({"\x1b[2J": record()}, bytes(4)), "expected a printable name"),
    "name with a surrogate": (
        raw_file(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        "printable",
    ),
    "name with a newline": (raw_file({"a\nb": record()}, bytes(4)), "expected a printable name"),
    "numbers of 5000 digits": (raw_file(b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "not valid JSON"),
    "5 million values": (raw_file(b'{"w":[' + b"0," * 5_000_000 + b"0]}"), "JSON tokens"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_hostile_file(tmp_path: Path, content: bytes, message: str) -> None:
    folder = single_file(tmp_path / "model", content)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader.open(folder)
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert text.isprintable()
    assert len(text) < 700
    assert time.monotonic() - started < 5


def test_the_table_starts_from_a_sound_file(tmp_path: Path) -> None:
    """Otherwise every row could be refused for a reason of its own."""
    for content in (
        raw_file(GOOD, DATA),
        _pair([0, 4], [4, 6], 6),
        _one(),
        raw_file(json.dumps(GOOD).encode() + b"  ", DATA),
    ):
        CheckpointReader.open(single_file(tmp_path / "model", content)).close()


def test_empty_tensors_are_allowed(tmp_path: Path) -> None:
    header = {"e": record(shape=[0, 5], offsets=[0, 0]), "w": record(), "z": record(shape=[3, 0], offsets=[4, 4])}
    with CheckpointReader.open(single_file(tmp_path / "model", raw_file(header, b"abcd"))) as reader:
        assert tuple(reader.read("e").shape) == (0, 5)
        assert tuple(reader.read("z").shape) == (3, 0)
        assert bytes(reader.read("w").tolist()) == b"abcd"


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_headers_open_or_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(raw_file(GOOD, DATA))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not content:
            break
    folder = single_file(tmp_path_factory.mktemp("model"), bytes(content))
    try:
        with CheckpointReader.open(folder) as reader:
            for name in reader.tensors:
                reader.read(name)
    except CheckpointError:
        pass


def test_golden_header() -> None:
    header = encode_header([("é", torch.bfloat16, (2, 3), 12), ("b", torch.int32, (), 4)])
    text = (
        '{"__metadata__":{"format":"pt"},"é":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"b":{"dtype":"I32","shape":[],"data_offsets":[12,16]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert header == struct.pack("<Q", len(padded)) + padded
    assert len(header) % 8 == 0
