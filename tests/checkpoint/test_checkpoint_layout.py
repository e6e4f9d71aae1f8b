import json
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_quant.checkpoint.header import DTYPES
from llama4_quant.checkpoint.layout import OutputTensor, index_json, layout_shards, parse_size
from llama4_quant.errors import OutputError, UsageError

TENSORS = st.lists(
    st.builds(
        OutputTensor,
        name=st.text(string.ascii_letters + ".é", min_size=1, max_size=30),
        dtype=st.sampled_from(list(DTYPES.values())),
        shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda tensor: tensor.name,
)


@given(tensors=TENSORS, max_shard_size=st.integers(1, 60_000))
@settings(max_examples=200, deadline=None)
def test_every_layout_tiles_its_files(tensors: list[OutputTensor], max_shard_size: int) -> None:
    layout = layout_shards(tensors, max_shard_size)
    assert {name: placement.tensor for name, placement in layout.placements.items()} == {t.name: t for t in tensors}
    assert layout.total_size == sum(tensor.nbytes for tensor in tensors)
    assert layout.nbytes == layout.total_size + sum(len(shard.header) for shard in layout.shards)
    for number, shard in enumerate(layout.shards):
        inside = [placement for placement in layout.placements.values() if placement.shard == number]
        assert shard.filename == f"model-{number + 1:05d}-of-{len(layout.shards):05d}.safetensors"
        assert shard.nbytes <= max_shard_size or len(inside) == 1
        end = len(shard.header)
        assert end % 8 == 0
        records = json.loads(shard.header[8:])
        assert records.pop("__metadata__") == {"format": "pt"}
        for placement in inside:
            tensor = placement.tensor
            assert placement.start == end
            assert placement.start % tensor.dtype.itemsize == 0
            offsets = [end - len(shard.header), end - len(shard.header) + tensor.nbytes]
            assert records.pop(tensor.name)["data_offsets"] == offsets
            end += tensor.nbytes
        assert not records
        assert shard.nbytes == end


@given(tensors=TENSORS, max_shard_size=st.integers(1, 60_000))
@settings(max_examples=50, deadline=None)
def test_shards_take_tensors_in_order_and_are_filled(tensors: list[OutputTensor], max_shard_size: int) -> None:
    layout = layout_shards(tensors, max_shard_size)
    numbers = [layout.placements[tensor.name].shard for tensor in tensors]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(layout.shards)))


def test_one_large_tensor_gets_a_shard_of_its_own() -> None:
    tensors = [
        OutputTensor(name=name, dtype=torch.uint8, shape=(size,)) for name, size in (("a", 10), ("b", 5000), ("c", 10))
    ]
    layout = layout_shards(tensors, 1000)
    assert [(name, placement.shard) for name, placement in layout.placements.items()] == [("a", 0), ("b", 1), ("c", 2)]


def test_golden_layout() -> None:
    tensors = [
        OutputTensor(name="n.weight", dtype=torch.bfloat16, shape=(3,)),
        OutputTensor(name="q.weight_shape", dtype=torch.int64, shape=(2,)),
        OutputTensor(name="q.weight_packed", dtype=torch.int32, shape=(2, 1)),
    ]
    layout = layout_shards(tensors, 10**9)
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"q.weight_shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        b'"q.weight_packed":{"dtype":"I32","shape":[2,1],"data_offsets":[16,24]},'
        b'"n.weight":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    (shard,) = layout.shards
    assert shard.header == len(padded).to_bytes(8, "little") + padded
    assert shard.nbytes == 8 + len(padded) + 30
    assert index_json(layout) == {
        "metadata": {"total_size": 30},
        "weight_map": dict.fromkeys(
            ("n.weight", "q.weight_packed", "q.weight_shape"), "model-00001-of-00001.safetensors"
        ),
    }
    assert list(index_json(layout)["weight_map"]) == ["n.weight", "q.weight_packed", "q.weight_shape"]


def test_layouts_that_cannot_be() -> None:
    tensor = OutputTensor(name="a", dtype=torch.uint8, shape=(1,))
    with pytest.raises(OutputError, match="a: two output tensors have this name"):
        layout_shards([tensor, tensor], 100)
    with pytest.raises(OutputError, match="no tensors"):
        layout_shards([], 100)
    with pytest.raises(OutputError, match=r"b: torch.complex64 cannot be stored"):
        layout_shards([OutputTensor(name="b", dtype=torch.complex64, shape=())], 100)
    for name in ("", "__metadata__", "a\nb"):
        with pytest.raises(OutputError, match="cannot be the name of a tensor"):
            layout_shards([OutputTensor(name=name, dtype=torch.uint8, shape=())], 100)
    for size in (0, -1):
        with pytest.raises(UsageError, match="must be positive"):
            layout_shards([tensor], size)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("2GiB", 2 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("0.1GB", 10**8),
        ("64kib", 65536),
        ("3K", 3000),
        ("1t", 10**12),
        ("17", 17),
        ("17B", 17),
        (123, 123),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-5GB", "5 gigabytes", "5GBB", "1e9", "0", "0.4", "0GB", "nan", "٣GB", "9" * 30, -1]
)
def test_texts_that_are_not_sizes(text: str | int) -> None:
    with pytest.raises(UsageError):
        parse_size(text)
