"""What the compiled kernels refuse, and how they live in a process: addresses, threads, compiling."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.native_variants import CASES, random
from torch import Tensor

from llama4_quant.ops import native

X = torch.zeros(2, 256, dtype=torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    reason = native.probe()
    if reason:
        pytest.skip(reason)


def int4(words: int = 32, groups: int = 2, rows: int = 8) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, words, dtype=torch.int32), torch.ones(rows, groups, dtype=torch.bfloat16)


def fp8(*scale: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(8, 256).to(torch.float8_e4m3fn), torch.ones(scale)


WORDS, ONES = int4()
REFUSALS = [
    (native.why_not_int4, (X.float(), WORDS, ONES), "x is torch.float32, not torch.bfloat16"),
    (native.why_not_int4, (X, WORDS.long(), ONES), "the weight is torch.int64, not torch.int32"),
    (native.why_not_int4, (X, WORDS.T.contiguous().T, ONES), "not [N, K] or [E, N, K] row by row"),
    (native.why_not_int4, (X.to("meta"), WORDS, ONES), "x is on meta, not on the CPU"),
    (native.why_not_int4, (X, WORDS, ONES.to("meta")), "weight_scale is on meta, not on the CPU"),
    (native.why_not_int4, (X, WORDS, ONES.float()), "weight_scale is torch.float32, not torch.bfloat16"),
    (native.why_not_int4, (X, *int4(words=31)), "weight_packed has 31 words a row; 256 inputs take 32"),
    (native.why_not_int4, (X, WORDS, ONES[:7]), "weight_scale has 7 rows, the weight 8"),
    (
        native.why_not_int4,
        (X, *int4(groups=16)),
        "256 inputs in 16 groups; group sizes are 32, 64, multiples of 128, or all inputs",
    ),
    (
        native.why_not_int4,
        (X, *int4(groups=3)),
        "256 inputs in 3 groups; group sizes are 32, 64, multiples of 128, or all inputs",
    ),
    (native.why_not_int4, (X, WORDS, ONES, torch.zeros(9)), "bias is [9] of torch.float32, expected [8] of bfloat16"),
    (native.why_not_int4, (X[:, :0], *int4(words=0)), "x has no inputs"),
    (
        native.why_not_int4,
        (X, WORDS[None], ONES),
        "weight_scale, [8, 2] with strides (2, 1), does not lie beside [1, 8",
    ),
    (native.why_not_fp8, (X, *fp8(8, 2)), "weight_scale is [8, 2]; by row it ends in [8, 1], by block in (1, 2)"),
    (
        native.why_not_fp8,
        (X[:, :250], fp8()[0][:, :250].contiguous(), torch.ones(1, 2)),
        "250 inputs are not a multiple",
    ),
    (native.why_not_fp8, (X, fp8()[0], ONES), "weight_scale is torch.bfloat16, not torch.float32"),
    (native.why_not_int8, (X, torch.zeros(8, 256, dtype=torch.int8), ONES), "weight_scale is [8, 2], expected [8, 1]"),
    (native.why_not_dense, (X, torch.zeros(8, 255, dtype=torch.bfloat16)), "x has 256 inputs, the weight 255"),
]


@pytest.mark.parametrize(("check", "operands", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_refusals_say_what_was_found(check, operands: tuple[Tensor, ...], reason: str) -> None:
    found = check(*operands)
    assert found is not None
    assert reason in found
    operator = getattr(native, check.__name__.replace("why_not", "linear"))
    with pytest.raises(ValueError, match=re.escape(reason)):
        operator(*operands)


@pytest.mark.parametrize("name", CASES)
def test_what_runs_is_not_refused(name: str) -> None:
    case = CASES[name]
    weight = case.weight(8, 768)
    check = getattr(native, f"why_not_{case.operator}")
    x = random(2, 768)
    assert check(x, *weight) is None
    assert check(x, *(part[None] for part in weight)) is None
    assert case.linear(x[None], weight).shape == (1, 2, 8)
    assert case.linear(x[:0], weight).shape == (0, 8)


def test_a_stack_is_not_a_weight() -> None:
    with pytest.raises(ValueError, match="a linear operator takes one weight"):
        native.linear_int4(X, WORDS[None], ONES[None])
    with pytest.raises(ValueError, match="a grouped one a stack"):
        native.grouped_int4(X, torch.tensor([2]), WORDS, ONES)


@pytest.mark.parametrize("counts", [[1, 0], [3, 0], [3, -1]])
def test_rows_of_experts_have_to_be_those_of_x(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="rows_per_expert does not sum to the 2 rows of x, or has a negative number"):
        native.grouped_int4(X, torch.tensor(counts), torch.stack([WORDS, WORDS]), torch.stack([ONES, ONES]))
    with pytest.raises(ValueError, match=r"rows_per_expert \[2\] for 1 experts"):
        native.grouped_int4(X, torch.tensor(counts), WORDS[None], ONES[None])


@pytest.mark.parametrize("name", CASES)
def test_operands_may_lie_anywhere(name: str) -> None:
    """x by columns, counts of another type, experts apart from each other, weights at odd addresses."""
    case = CASES[name]
    stack = [case.weight(24, 768, seed) for seed in range(3)]
    weight = tuple(torch.stack(parts) for parts in zip(*stack, strict=True))
    apart = tuple(torch.cat([part, part[:, :1]], dim=1)[:, :-1] for part in weight)
    odd = tuple(_at_odd_address(part) for part in weight)
    x, counts = random(9, 768), torch.tensor([1, 8, 0])
    expected = case.grouped(x, counts, weight)
    assert torch.equal(case.grouped(x.T.contiguous().T, counts.to(torch.int32), apart), expected)
    assert torch.equal(case.grouped(x, counts, odd), expected)


def _at_odd_address(tensor: Tensor) -> Tensor:
    """As a tensor in a mapped file, which begins where the one before it ends."""
    size = tensor.element_size()
    memory = torch.empty(tensor.numel() + 64 // size, dtype=tensor.dtype)
    moved = memory[3 : 3 + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)


BEHIND_THE_END = """
import ctypes, mmap, sys
import torch
from ops.native_variants import CASES, random
libc = ctypes.CDLL(None, use_errno=True)

def at_the_end(tensor):
    'A copy whose last byte is the last of a page; touching the next page ends the process.'
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes)
    flat.copy_(tensor.contiguous().view(torch.uint8).view(-1))
    return flat.view(tensor.dtype).view(tensor.shape)

for name, case in CASES.items():
    for num_inputs in (20, 96, 200) if not case.group_size else (768,):
        weight = case.weight(21, num_inputs)
        for num_rows in (1, 2, 7, 40):
            x = random(num_rows, num_inputs)
            moved = tuple(at_the_end(part) for part in weight)
            assert torch.equal(case.linear(at_the_end(x), moved), case.linear(x, weight)), name
print("read nothing else")
"""


def test_nothing_behind_a_weight_is_read() -> None:
    """The last tensor of a mapped file may end where the mapping does."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    command = [sys.executable, "-X", "faulthandler", "-c", BEHIND_THE_END]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "read nothing else\n", done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_threads_are_torchs() -> None:
    """The kernels are linked to the OpenMP that torch has loaded, so there is one pool of threads."""
    native.linear_int4(X, WORDS, ONES)
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in lines if "libgomp" in line}) <= 1


def test_the_description_names_instructions_and_compiler() -> None:
    instructions, compiler = native.description().rsplit(", ", 1)
    assert instructions
    assert compiler


def test_without_a_compiler_the_reason_is_given(tmp_path: Path) -> None:
    program = "from llama4_quant.ops import native; print(native.probe()); print(native.description())"
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["no C++ compiler found (looked for no-such-compiler)"] * 2
