"""A plan cut into work items, and how much memory it takes to do them.

An item is one expert of a fused tensor, or a chunk of rows of any other tensor. Items follow from the plan alone and
not from memory, workers or processes: that is why any of these gives the same bytes, and why a journal of finished
items stays valid when they change.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama4_quant.checkpoint.buffers import PAGE_BYTES
from llama4_quant.checkpoint.layout import parse_size
from llama4_quant.checkpoint.meta_names import Split
from llama4_quant.errors import UsageError
from llama4_quant.planning.plan import Decision, Plan, TensorPlan
from llama4_quant.planning.source import SOURCE_DTYPES
from llama4_quant.quantizers.backend import Backend
from llama4_quant.quantizers.compiled import compiled_scratch
from llama4_quant.quantizers.lanes import CHUNK_ELEMENTS, rows_per_scale
from llama4_quant.quantizers.packed import code_bytes
from llama4_quant.scheme import FP8_BLOCK_SIZE, WeightType

CHUNK_BYTES = 128 * 2**20
"""Source bytes of an item that is a chunk of rows, at most (one block of 128 rows may be more)."""

BASE_BYTES = 80 * 2**20
"""What a conversion holds besides its workers: modules that only it imports, threads, and slack of the allocator."""
BYTES_PER_DECISION = 6 * 2**10
"""Plan, layout, journal, report and manifest, per weight; measured on the plan of Maverick."""
BYTES_PER_RANK_PART = 2 * 2**10
"""The same for each part of a weight in Meta's layout, codes and scales of each rank counted apart; also Maverick."""
SCRATCH_BYTES_PER_ELEMENT = 44
"""The plain quantizers work on chunks of rows: five float32 and three float64 values per element at most."""
WORKER_SLACK_BYTES = 24 * 2**20
"""Freed blocks that the allocator of a thread keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """One unit of work.

    Attributes:
        id: its number, counted over the whole plan.
        tensor: index in `plan.tensors`.
        expert: of a fused tensor, else None.
        start, stop: rows of dimension 0, for other tensors; all rows of the slice [in, out] for an expert.
        num_bytes: of the source.
    """

    id: int
    tensor: int
    expert: int | None
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """How a conversion uses memory, in bytes over what the interpreter with torch holds anyway.

    Attributes:
        limit: what it may use.
        predicted: the most that it will use.
        smallest: the smallest limit that works.
        per_worker: the most that one worker holds.
        num_workers: how many work at the same time.
    """

    limit: int
    predicted: int
    smallest: int
    per_worker: int
    num_workers: int


def work_items(plan: Plan) -> tuple[WorkItem, ...]:
    """All items of a plan, in the order of its tensors."""
    items: list[WorkItem] = []
    for index, tensor in enumerate(plan.tensors):
        items += tensor_items(tensor, index, first_id=len(items))
    return tuple(items)


def tensor_items(
    tensor: TensorPlan, index: int = 0, first_id: int = 0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[WorkItem, ...]:
    """The items of one tensor, in the order of its bytes."""
    shape, element = tensor.spec.shape, SOURCE_DTYPES[tensor.dtype]
    cuts: list[tuple[int | None, int, int]]
    if len(shape) == 3:
        cuts = [(expert, 0, shape[1]) for expert in range(shape[0])]
        row_bytes = element * shape[2]
    else:
        row_bytes = element * max(1, tensor.spec.num_weights // shape[0])
        # A multiple of 128 rows, so that chunks never cut an FP8 block.
        step = max(1, chunk_bytes // (row_bytes * FP8_BLOCK_SIZE)) * FP8_BLOCK_SIZE
        spread = tensor.decisions[0].spread
        if spread is not None and spread.split is Split.TRANSPOSED:
            step = shape[0]  # a router: rows become columns, which do not lie together
        cuts = [(None, start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    return tuple(
        WorkItem(
            id=first_id + number,
            tensor=index,
            expert=expert,
            start=start,
            stop=stop,
            num_bytes=(stop - start) * row_bytes,
        )
        for number, (expert, start, stop) in enumerate(cuts)
    )


def cache_items(plan: Plan, items: Sequence[WorkItem]) -> range:
    """Numbers, in the journal, of the scales of each layer's KV cache: they follow those of the plan's items."""
    return range(len(items), len(items) + len(plan.cache_scales))


def item_decisions(tensor: TensorPlan, item: WorkItem) -> tuple[Decision, ...]:
    """The decisions that an item carries out, or a part of."""
    if item.expert is None:
        return tensor.decisions
    parts = len(tensor.decisions) // tensor.spec.shape[0]
    return tensor.decisions[item.expert * parts : (item.expert + 1) * parts]


def buffer_sizes(plan: Plan, items: Sequence[WorkItem], backend: Backend) -> tuple[int, int]:
    """Bytes of the buffers that a worker reuses: for source bytes, and for codes and a page to move them in.

    The plain backend makes its own memory for codes.
    """
    source_bytes = max(item.num_bytes for item in items)
    codes_bytes = max(_codes_bytes(plan.tensors[item.tensor], item) for item in items)
    return source_bytes, PAGE_BYTES + (0 if backend.library is None else codes_bytes)


def plan_memory(
    plan: Plan,
    items: Sequence[WorkItem],
    backend: Backend,
    max_memory: int | str | None = None,
    workers: int | None = None,
) -> MemoryUse:
    """Choose the number of workers so that memory suffices.

    Args:
        plan: what is to be done.
        items: its items.
        backend: what quantizes.
        max_memory: bytes, or a size such as "2GiB"; default: a quarter of what this machine gives to the process.
        workers: at most so many; default: one for each core.

    Raises:
        UsageError: not a size or number, or not even one worker fits; the message names the smallest size that does.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: expected at least 1")
    limit = machine_memory() // 4 if max_memory is None else parse_size(max_memory)
    num_rank_parts = sum(len(decision.outputs) for decision in plan.decisions if decision.spread is not None)
    base = BASE_BYTES + BYTES_PER_DECISION * len(plan.decisions) + BYTES_PER_RANK_PART * num_rank_parts
    results = max(_results_memory(plan.tensors[item.tensor], item, backend) for item in items)
    per_worker = sum(buffer_sizes(plan, items, backend)) + results + WORKER_SLACK_BYTES
    wanted = min(len(items), workers or len(os.sched_getaffinity(0)))
    smallest = base + per_worker
    if smallest > limit:
        raise UsageError(
            f"--max-memory {limit:,} bytes is too little: the largest piece of work needs {smallest:,}; "
            f"give --max-memory {-(-smallest // 2**20)}MiB or more"
        )
    num_workers = min(wanted, (limit - base) // per_worker)
    return MemoryUse(
        limit=limit,
        predicted=base + num_workers * per_worker,
        smallest=-(-smallest // 2**20) * 2**20,
        per_worker=per_worker,
        num_workers=num_workers,
    )


def machine_memory() -> int:
    """Bytes of memory that this process may use: of the machine, or of its control group if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(limits)


def _codes_bytes(tensor: TensorPlan, item: WorkItem) -> int:
    """The largest codes of one weight in an item."""
    return max(
        code_bytes((_num_rows(item, decision), decision.shape[1]), decision.scheme) if decision.scheme else 0
        for decision in item_decisions(tensor, item)
    )


def _num_rows(item: WorkItem, decision: Decision) -> int:
    """Rows [out] of a weight that an item has: all of an expert's, else a chunk."""
    return decision.shape[0] if item.expert is not None else item.stop - item.start


def _results_memory(tensor: TensorPlan, item: WorkItem, backend: Backend) -> int:
    """What is held beside the buffers: the results of one decision at a time, and scratch."""
    return max(_result_memory(tensor, item, decision, backend) for decision in item_decisions(tensor, item))


def _result_memory(tensor: TensorPlan, item: WorkItem, decision: Decision, backend: Backend) -> int:
    if decision.scheme is None:
        elements = item.num_bytes // SOURCE_DTYPES[tensor.dtype] // len(item_decisions(tensor, item))
        is_view = tensor.dtype == "BF16" and len(tensor.spec.shape) != 3 and decision.spread is None
        return (0 if is_view else 2 * elements) + SCRATCH_BYTES_PER_ELEMENT * min(elements, CHUNK_ELEMENTS)
    num_rows, in_features = _num_rows(item, decision), decision.shape[1]
    elements = num_rows * in_features
    is_transposed = decision.fused or decision.spread is not None
    transposed = elements if is_transposed else 0  # codes of a byte each, as they are stored
    scales = 12 * math.prod(decision.scheme.scale_shape(num_rows, in_features))  # in float32, and as they are stored
    if backend.library is not None:
        return transposed + scales + compiled_scratch(num_rows, in_features, decision.scheme)
    packed = code_bytes((num_rows, in_features), decision.scheme) if decision.scheme.type is WeightType.INT4 else 0
    rows_in_hand = max(CHUNK_ELEMENTS, rows_per_scale(decision.scheme) * in_features)
    return elements + packed + transposed + scales + SCRATCH_BYTES_PER_ELEMENT * rows_in_hand
