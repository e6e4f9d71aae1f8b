"""Experts that stay in the file: what is read is what is stored, whatever the budget and the order."""

import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, text_config

from llama4_quant import convert
from llama4_quant.architecture import Llama4Config, Role, linear_specs
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.tensor_files import TensorFiles
from llama4_quant.errors import CheckpointError, UsageError
from llama4_quant.runtime.expert_cache import READ_AHEAD, CachedExperts
from llama4_quant.runtime.expert_store import MappedExperts
from llama4_quant.runtime.expert_tensors import Expert, ExpertPart, fused_parts, num_bytes, stored_parts
from llama4_quant.runtime.popularity import HALF_LIFE, Popularity
from llama4_quant.stored import quantized_weights

Parts = dict[Expert, tuple[ExpertPart, ...]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("offload") / "source", text_config())


@pytest.fixture(scope="module")
def int4(source: Path) -> Path:
    convert(source, source.parent / "int4", scheme="W4A16")
    return source.parent / "int4"


def opened(folder: Path) -> tuple[Parts, TensorFiles]:
    with CheckpointReader.open(folder) as reader:
        config = Llama4Config.from_dict(reader.config)
        if config.quantization:
            parts = stored_parts(quantized_weights(config, reader.tensors), reader.tensors, torch.bfloat16)
        else:
            parts = fused_parts(linear_specs(config), reader.tensors, torch.bfloat16)
        names = {entry.name for entry in reader.tensors.values() if ".experts." in entry.name}
        return parts, TensorFiles.of(reader, names)


def expected(folder: Path) -> dict[Expert, dict[tuple[str, str], torch.Tensor]]:
    """Straight from the reader."""
    found: dict[Expert, dict[tuple[str, str], torch.Tensor]] = {}
    with CheckpointReader.open(folder) as reader:
        config = Llama4Config.from_dict(reader.config)
        for linear in (linear for linear in linear_specs(config) if linear.role is Role.ROUTED_EXPERT):
            of = found.setdefault((linear.layer, linear.expert), {})
            projection = linear.name.rpartition(".")[2]
            if config.quantization:
                for suffix in ("weight_packed", "weight_scale"):
                    of[projection, suffix] = reader.read(f"{linear.name}.{suffix}")
            else:
                columns = slice(linear.out_start, linear.out_start + linear.out_features)
                of[projection, "weight"] = reader.read(linear.source)[linear.expert][:, columns].T
    return found


def check(weights: object, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    flat = {(p, s): tensor for p, tensors in weights.items() for s, tensor in tensors.items()}  # type: ignore[attr-defined]
    assert flat.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(flat[key], tensor)
        assert flat[key].is_contiguous()


def test_mapped_experts_are_the_stored_ones(int4: Path) -> None:
    parts, files = opened(int4)
    store = MappedExperts(parts, files)
    store.prefetch(list(parts))
    for expert, wanted in expected(int4).items():
        check(store.get(expert), wanted)
    first = next(iter(parts))
    kept = store.get(first)
    store.close()
    check(kept, expected(int4)[first])


@pytest.mark.parametrize("kind", ["source", "int4"])
@pytest.mark.parametrize("num_slots", [1, 2, 5, 1000])
def test_cached_experts_are_the_stored_ones_in_any_order(
    kind: str, num_slots: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    parts, files = opened(folder)
    wanted, experts = expected(folder), list(parts)
    assert wanted.keys() == parts.keys()
    store = CachedExperts(parts, files, num_slots * max(map(num_bytes, parts.values())))
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        number, *coming = torch.randint(0, len(experts), (4,), generator=generator).tolist()
        weights = store.get(experts[number])
        store.prefetch([experts[other] for other in coming])
        store.prefetch([experts[coming[-1]]])
        check(weights, wanted[experts[number]])  # not overwritten by what is read ahead
        assert len(store._slots) <= min(num_slots, len(parts))
    assert store.counts.num_used == 100
    if num_slots >= len(parts):
        assert store.counts.num_bytes_copied <= sum(part.num_bytes for of in parts.values() for part in of)
    store.close()


def in_memory(store: CachedExperts) -> int:
    return sum(slot.memory.nbytes for slot in store._slots.values())


def run_pass(
    store: CachedExperts, rows: dict[int, list[int]], wanted: dict[Expert, dict[tuple[str, str], torch.Tensor]]
) -> int:
    """As a model does; gives the hits."""
    before = store.counts.num_hits
    for layer, counts in rows.items():
        coming = store.begin(layer, counts)
        assert sorted(coming) == [(layer, expert) for expert, count in enumerate(counts) if count]
        for number, expert in enumerate(coming, start=1):
            weights = store.get(expert)
            store.prefetch(coming[number:])
            check(weights, wanted[expert])
            assert in_memory(store) <= store.num_slots * store._slot_bytes
    return store.counts.num_hits - before


@pytest.mark.parametrize("kind", ["source", "int4"])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 7])
def test_a_pass_of_all_experts_finds_as_many_as_there_is_room_for(
    kind: str, num_slots: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    parts, files = opened(folder)
    wanted = expected(folder)
    budget = (num_slots + 1) * max(map(num_bytes, parts.values())) - 1
    store = CachedExperts(parts, files, budget)
    assert store.num_slots == num_slots < len(parts)
    layers = {layer: 1 + max(expert for of, expert in parts if of == layer) for layer, _ in parts}
    everything = {layer: [3] * count for layer, count in layers.items()}
    run_pass(store, everything, wanted)
    # BF16 experts pass through the cache, which takes the places of the one at work and of those that are read ahead.
    passing = 0 if kind == "int4" else 1 + READ_AHEAD
    for _ in range(3):
        copied = store.counts.num_bytes_copied
        assert num_slots - passing <= run_pass(store, everything, wanted) <= num_slots
        assert kind == "source" or store.counts.num_bytes_copied == copied
    assert in_memory(store) <= budget
    store.close()


def test_favourites_outlive_a_prompt_and_give_way_to_others(int4: Path) -> None:
    parts, files = opened(int4)
    wanted = expected(int4)
    (layer, _), *_ = parts
    count = sum(of == layer for of, _ in parts)
    store = CachedExperts(parts, files, 2 * max(map(num_bytes, parts.values())))

    def step(expert: int) -> int:
        return run_pass(store, {layer: [int(number == expert) for number in range(count)]}, wanted)

    for expert in (2, 3, 2, 3, 2, 3):
        step(expert)
    run_pass(store, {layer: [1] * count}, wanted)
    assert [step(expert) for expert in (2, 3)] == [1, 1]
    assert step(0) == 0  # once does not make it one
    assert step(2) == 1
    for expert in (0, 1) * 8:
        step(expert)
    assert [step(expert) for expert in (0, 1)] == [1, 1]
    store.close()


def test_what_is_here_comes_first_and_stays_until_it_was_used(int4: Path) -> None:
    parts, files = opened(int4)
    (layer, _), *_ = parts
    count = sum(of == layer for of, _ in parts)
    store = CachedExperts(parts, files, 2 * max(map(num_bytes, parts.values())))
    for expert in (count - 2, count - 1):
        store.begin(layer, [int(number == expert) for number in range(count)])
        store.get((layer, expert))
    order = store.begin(layer, [100] * (count - 2) + [1, 1])  # the others are more popular now
    assert {expert for _, expert in order[:2]} == {count - 2, count - 1}
    store.prefetch(order)
    assert set(order[:2]) == set(store._slots)
    for expert in order:
        store.get(expert)
    assert store.counts.num_hits == 2
    store.close()


def test_shares_are_of_a_layer_and_fade() -> None:
    popularity = Popularity()
    popularity.count(0, [1, 3])
    popularity.count(1, [20, 20])
    assert [popularity.share((0, 1)), popularity.share((1, 0)), popularity.share((2, 0))] == [0.75, 0.5, 0]
    popularity.count(0, [HALF_LIFE, 0])  # the old rows count half now
    assert popularity.share((0, 1)) == 1.5 / (HALF_LIFE + 2)
    assert popularity.is_ahead((0, 0), (1, 0))
    popularity.count(2, [2, 1, 1])
    assert popularity.is_ahead((2, 0), (2, 3))
    assert not popularity.is_ahead((2, 0), (2, 1))  # by one row only


def test_the_next_expert_is_read_while_another_is_used(int4: Path) -> None:
    parts, files = opened(int4)
    first, second = list(parts)[:2]
    store = CachedExperts(parts, files, 2 * max(map(num_bytes, parts.values())))
    store.get(first)
    names: list[str] = []
    read, gone_on = files.read, threading.Event()

    def slow(entry: object, out: torch.Tensor, offset: int = 0) -> torch.Tensor:
        gone_on.wait(5)
        names.append(threading.current_thread().name)
        return read(entry, out, offset)  # type: ignore[arg-type]

    files.read = slow  # type: ignore[method-assign,assignment]
    store.prefetch([second])
    gone_on.set()  # reached although the read waits for it
    check(store.get(second), expected(int4)[second])
    assert names
    assert all(name.startswith("experts") for name in names)
    assert (store.counts.num_used, store.counts.num_hits) == (2, 0)
    check(store.get(second), expected(int4)[second])
    assert store.counts.num_hits == 1
    store.close()


def test_too_small_a_budget_says_what_an_expert_takes(int4: Path) -> None:
    parts, files = opened(int4)
    needed = max(map(num_bytes, parts.values()))
    with pytest.raises(UsageError, match=rf"an expert takes {needed:,} bytes.*{needed - 1:,}.*--expert-cache"):
        CachedExperts(parts, files, needed - 1)
    files.close()


def test_a_file_that_became_shorter_is_an_error_each_time(int4: Path, tmp_path: Path) -> None:
    parts, files = opened(int4)
    end, expert = max((part.entry.start + part.entry.nbytes, of) for of in parts for part in parts[of])
    path = next(part.entry.path for part in parts[expert] if part.entry.start + part.entry.nbytes == end)
    cut = tmp_path / path.name
    cut.write_bytes(path.read_bytes()[: end - 1])
    files._descriptors[path] = os.open(cut, os.O_RDONLY)
    cached = CachedExperts(parts, files, 10**9)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="became shorter"):
            cached.get(expert)
    with pytest.raises(CheckpointError, match="became shorter"):
        MappedExperts(parts, files).get(expert)
    cached.close()


def test_unaligned_tensors_are_read_instead_of_mapped(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}} '  # 56 bytes: the data starts at 64
    header += b" "  # and now at 65
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little")
        + header
        + torch.tensor([1.5, -2.0]).bfloat16().view(torch.uint8).numpy().tobytes()
    )
    (tmp_path / "config.json").write_text("{}")
    with CheckpointReader.open(tmp_path) as reader:
        files = TensorFiles.of(reader, ["a"])
        entry = reader.tensors["a"]
    assert entry.start % 2 == 1
    assert files.view(entry).tolist() == [1.5, -2.0]
    files.close()
