"""safetensors headers that are sound; those that are not are in tests/hostile/header_cases.py."""

import json
import struct
from pathlib import Path

import torch
from checkpoint.checkpoint_files import raw_file, record, single_file
from hostile.header_cases import DATA, GOOD, one_tensor, two_tensors

from llama4_quant.checkpoint.header import encode_header
from llama4_quant.checkpoint.reader import CheckpointReader


def test_the_table_starts_from_a_sound_file(tmp_path: Path) -> None:
    """Otherwise every row could be refused for a reason of its own."""
    for content in (
        raw_file(GOOD, DATA),
        two_tensors([0, 4], [4, 6], 6),
        one_tensor(),
        raw_file(json.dumps(GOOD).encode() + b"  ", DATA),
    ):
        CheckpointReader.open(single_file(tmp_path / "model", content)).close()


def test_empty_tensors_are_allowed(tmp_path: Path) -> None:
    header = {"e": record(shape=[0, 5], offsets=[0, 0]), "w": record(), "z": record(shape=[3, 0], offsets=[4, 4])}
    with CheckpointReader.open(single_file(tmp_path / "model", raw_file(header, b"abcd"))) as reader:
        assert tuple(reader.read("e").shape) == (0, 5)
        assert tuple(reader.read("z").shape) == (3, 0)
        assert bytes(reader.read("w").tolist()) == b"abcd"


def test_golden_header() -> None:
    header = encode_header([("é", torch.bfloat16, (2, 3), 12), ("b", torch.int32, (), 4)])
    text = (
        '{"__metadata__":{"format":"pt"},"é":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"b":{"dtype":"I32","shape":[],"data_offsets":[12,16]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert header == struct.pack("<Q", len(padded)) + padded
    assert len(header) % 8 == 0
