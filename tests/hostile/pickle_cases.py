"""consolidated.NN.pth files that would run code, take any amount of memory, or do not hold what they claim."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from hostile.cases import Bases, Case

from llama4_quant.checkpoint.pickles import MAX_PICKLE_BYTES


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def archive(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, order: bytes = b"little") -> None:
    """A file like torch.save's around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in (("data.pkl", pickled), ("byteorder", order), ("version", b"3\n")):
            file.writestr(f"consolidated/{name}", data)


def rewrite(path: Path, **changes: object) -> None:
    """Replace entries of a shard; None removes one."""
    shard = torch.load(path, weights_only=False) | changes
    torch.save({name: value for name, value in shard.items() if value is not None}, path)


def _global(module: str, name: str, arguments: bytes = b")R") -> Callable[[Path], None]:
    """A pickle that calls `module.name`; `arguments` are the instructions after that."""
    pickled = b"\x80\x02}X\x01\x00\x00\x00xc" + f"{module}\n{name}\n".encode() + arguments + b"s."
    return lambda path: archive(path, pickled)


def _nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def _instructions(pickled: bytes) -> Callable[[Path], None]:
    return lambda path: archive(path, b"\x80\x02" + pickled)


def _with(**changes: object) -> Callable[[Path], None]:
    """`__` in a name stands for a dot."""
    return lambda path: rewrite(path, **{name.replace("__", "."): value for name, value in changes.items()})


def _claims_more(path: Path) -> None:
    torch.save({"norm.weight": torch.ones(200)}, path)
    data = path.read_bytes()
    # The pickle spells small integers in one byte: K and the number. The storage and the shape are the only 200s.
    assert data.count(b"K\xc8") == 2
    path.write_bytes(data.replace(b"K\xc8", b"K\xff"))


def _huge_directory(path: Path) -> None:
    """The archive's end says that its table of contents has 4 GB; the file is as long, and takes no space."""
    path.touch()
    size = 2**32 - 100
    os.truncate(path, size)
    end = b"PK\x05\x06" + bytes(4) + (1).to_bytes(2, "little") * 2 + size.to_bytes(4, "little") + bytes(6)
    with path.open("ab") as file:
        file.write(end)


def _many_records(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for number in range(20_000):
            file.writestr(f"consolidated/data/{number}" + "x" * 200, b"")


def _record_twice(path: Path) -> None:
    shard = torch.load(path, weights_only=False)
    buffer = io.BytesIO()
    torch.save(shard, buffer)
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices
        file.writestr(f"{file.namelist()[0].partition('/')[0]}/data.pkl", pickle.dumps({}))


RUNS_CODE = "holds more than tensors"
NO_ARCHIVE = "expected a file that torch.save wrote"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (_with(extra=Calls(os.system, "echo run > ran")), f"{RUNS_CODE} .*system"),
    "exec": (_with(extra=Calls(exec, "open('ran', 'w')")), f"{RUNS_CODE} .*exec"),
    "eval": (_with(extra=Calls(eval, "open('ran', 'w')")), f"{RUNS_CODE} .*eval"),
    "getattr": (_global("builtins", "getattr"), f"{RUNS_CODE} .*getattr"),
    "16 GB of bytearray": (_global("builtins", "bytearray", b"J\x00\x00\x00\x7f\x85R"), rf"{RUNS_CODE} .*bytearray"),
    "16 GB of tensor": (_global("torch", "zeros", b"J\x00\x00\x00\x7f\x85R"), rf"{RUNS_CODE} .*torch\.zeros"),
    "Counter": (_global("collections", "Counter"), rf"{RUNS_CODE} .*Counter"),
    "torch.load": (_global("torch", "load"), rf"{RUNS_CODE} .*torch\.load"),
    "name with a terminal escape": (_global("\x1b[2J", "x"), RUNS_CODE),
    "name from the stack": (_instructions(b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93."), "STACK_GLOBAL"),
    "extension": (_instructions(b"\x82\x01."), "EXT1"),
    "instance": (_instructions(b"(ios\nsystem\n."), "INST"),
    "memo of 2^32": (
        _instructions(b"}r\xff\xff\xff\xffj\xff\xff\xff\xff."),
        "not part of|vocab|embed|params|dim|weights",
    ),
    "string of 4 GB": (_instructions(b"X\xff\xff\xff\xffabc."), RUNS_CODE),
    "stack that is empty": (_instructions(b"a."), RUNS_CODE),
    "no mark": (_instructions(b"}u."), RUNS_CODE),
    "no end": (_instructions(b"}"), RUNS_CODE),
    "million instructions": (_instructions(b"]" * 10**6 + b"."), "more than 500,000 instructions"),
    "key that is a list": (_instructions(b"}]Ns."), RUNS_CODE),
    "not a zip": (lambda path: path.write_bytes(b"\0" * 100), NO_ARCHIVE),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Calls(os.system, "echo run > ran"))), NO_ARCHIVE),
    "empty": (lambda path: path.write_bytes(b""), NO_ARCHIVE),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 4000), NO_ARCHIVE),
    "no pickle": (lambda path: zipfile.ZipFile(path, "w").close(), "has no data.pkl"),
    "directory of 4 GB": (_huge_directory, NO_ARCHIVE),
    "20,000 records": (_many_records, NO_ARCHIVE),
    "record twice": (_record_twice, "is there twice"),
    "compressed": (
        lambda path: archive(path, b"\0" * 10**6, compression=zipfile.ZIP_DEFLATED),
        "data.pkl' is compressed; torch.save never does that",
    ),
    "huge pickle": (lambda path: archive(path, b"]" * (MAX_PICKLE_BYTES + 1)), "has 4,194,305 bytes, expected at most"),
    "big-endian": (lambda path: archive(path, b"}.", order=b"big"), "expected little-endian tensors"),
    "garbage": (lambda path: archive(path, b"\xff\xfe"), "damaged, or holds more than tensors"),
    "nested": (lambda path: archive(path, _nested(100_000)), "expected a state dict"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "expected a state dict .*'list'"),
    "sparse": (_with(norm__weight=torch.eye(3).to_sparse()), f"{RUNS_CODE} .*_rebuild_sparse_tensor"),
    "complex": (_with(norm__weight=torch.ones(2, dtype=torch.complex64)), f"{RUNS_CODE} .*ComplexFloatStorage"),
    "transposed": (
        _with(output__weight=torch.ones(4, 6).T),
        r"tensor 'output.weight': expected a contiguous tensor, found shape \[6, 4\] with strides \[1, 6\]",
    ),
    "expanded": (
        _with(output__weight=torch.ones(1).expand(2**40)),
        "tensor 'output.weight': expected a contiguous tensor",
    ),
    "more than its record": (_claims_more, "expected 1,020 bytes .* found a record of 800"),
    "unknown tensor": (_with(lora=torch.ones(2)), "tensor 'lora' is not part of a Llama 4"),
    "padded layer": (
        _with(layers__00__ffn_norm__weight=torch.ones(2)),
        "tensor 'layers.00.ffn_norm.weight' is not part of a Llama 4",
    ),
    "no elements": (_with(norm__weight=torch.ones(0)), r"norm.weight: .* shape \[0\]"),
    "scalar": (_with(norm__weight=torch.tensor(1.0)), r"norm.weight: .* shape \[\]"),
    "two spellings": (
        _with(layers__0__attention__wq__weight=torch.ones(128, 128)),
        "layers.0.attention.wqkv.weight and layers.0.attention.wq.weight hold the same weight",
    ),
    "odd fused": (
        _with(layers__0__attention__wqkv__weight=torch.ones(255, 128)),
        "layers.0.attention.wqkv.weight: 255 rows do not fit the number of heads in params.json",
    ),
    "odd experts": (
        _with(layers__1__feed_forward__experts__moe_w_in_eD_F=torch.ones(510, 128)),
        "moe_w_in_eD_F: 510 rows do not fit num_experts in params.json",
    ),
    "no up projection": (
        _with(layers__1__feed_forward__experts__moe_w_in_eD_F=None),
        r"layers.1.feed_forward.experts.gate_up_proj: .* covers [\d,]+ of [\d,]+ weights",
    ),
    "mixed dtypes": (
        _with(layers__1__feed_forward__experts__moe_w_in_eD_F=torch.ones(512, 128)),
        r"layers.1.feed_forward.experts.gate_up_proj: .* another size or dtype",
    ),
    "link": (lambda path: (path.unlink(), path.symlink_to("../victim.bin")), "expected a file inside .*, found a link"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "expected a regular file"),
}


def _case(name: str, damage: Callable[[Path], object], message: str) -> Case:
    def make(root: Path, bases: Bases) -> None:
        damage(bases.put("meta", root / "model") / "consolidated.00.pth")

    return Case(name=f"pickle: {name}", make=make, message=message)


def pickle_cases() -> list[Case]:
    """One for each file."""
    return [_case(name, damage, message) for name, (damage, message) in FILES.items()]
