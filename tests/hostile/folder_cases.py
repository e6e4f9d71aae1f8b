"""Checkpoints whose index, shards and other files are not what, or not where, they claim to be."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint.checkpoint_files import INDEX
from hostile.cases import SOURCE, Bases, Case
from safetensors.torch import load_file, save_file

SHARD = "model-00001-of-00002.safetensors"
EMBEDDING = "model.embed_tokens.weight"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Read, change in place, write."""
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def _case(
    name: str, change: Callable[[Path], object], message: str, commands: tuple[str, ...] = SOURCE, base: str = "bf16"
) -> Case:
    """`change` gets the folder of a sound checkpoint."""

    def make(root: Path, bases: Bases) -> None:
        change(bases.put(base, root / "model"))

    return Case(name=name, make=make, commands=commands, message=message)


WEIGHT_MAPS: dict[str, object] = {
    "absent": None,
    "a list": [SHARD],
    "empty": {},
    "parent": {EMBEDDING: "../victim.safetensors"},
    "absolute": {EMBEDDING: "/etc/passwd.safetensors"},
    "folder": {EMBEDDING: f"sub/{SHARD}"},
    "backslash": {EMBEDDING: f"..\\{SHARD}"},
    "hidden": {EMBEDDING: f".{SHARD}"},
    "not weights": {EMBEDDING: "config.json"},
    "dots": {EMBEDDING: ".."},
    "nul": {EMBEDDING: "a\0.safetensors"},
    "too long": {EMBEDDING: "a" * 300 + ".safetensors"},
    "terminal escape": {EMBEDDING: "\x1b[2J.safetensors"},
    "a number": {EMBEDDING: 1},
    "an object": {EMBEDDING: {"b": SHARD}},
    "200,000 files": {f"w{n}": f"{n}.safetensors" for n in range(200_000)},
}


def _weight_map(name: str, weight_map: object) -> Case:
    def change(model: Path) -> None:
        (model / "sub").mkdir()
        (model / "sub" / SHARD).write_bytes((model / SHARD).read_bytes())
        (model.parent / "victim.safetensors").write_bytes((model / SHARD).read_bytes())
        edit_json(model / INDEX, lambda index: index.update(weight_map=weight_map))

    return _case(f"weight_map: {name}", change, rf"{INDEX}: .*expected")


def _move_tensor(model: Path) -> None:
    """The index places a tensor in the other shard."""
    edit_json(model / INDEX, lambda index: index["weight_map"].update({EMBEDDING: "model-00002-of-00002.safetensors"}))


def _change_shard(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot. The index follows."""

    def change(model: Path) -> None:
        tensors = load_file(model / SHARD)
        for key, tensor in changes.items():
            name = key.replace("__", ".")
            tensors.pop(name, None)
            tensors |= {} if tensor is None else {name: tensor}
        save_file(tensors, model / SHARD)
        other = load_file(model / "model-00002-of-00002.safetensors")
        places = dict.fromkeys(tensors, SHARD) | dict.fromkeys(other, "model-00002-of-00002.safetensors")
        edit_json(model / INDEX, lambda index: index.update(weight_map=places))

    return change


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of a file; `make` gets its path."""

    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return change


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _huge(path: Path) -> None:
    """A terabyte that takes no space on the disk."""
    path.touch()
    os.truncate(path, 2**40)


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda model: os.truncate(model / name, (model / name).stat().st_size - 1)


def _two_at_once(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / SHARD).read_bytes())


FILES = ("config.json", INDEX, SHARD)
SIDE = ("convert",)
EMBEDDING_KEY = EMBEDDING.replace(".", "__")


def folder_cases() -> list[Case]:
    """All of them."""
    outside = "expected a file inside .*, found a link to"
    cases = [_weight_map(name, value) for name, value in WEIGHT_MAPS.items()]
    for file in FILES:
        cases += [
            _case(f"{file}: link to /etc/hostname", _replaced(file, _link("/etc/hostname")), f"{file}: {outside}"),
            _case(f"{file}: link to the parent", _replaced(file, _link("../victim.bin")), f"{file}: {outside}"),
            _case(f"{file}: link to /dev/zero", _replaced(file, _link("/dev/zero")), f"{file}: {outside}"),
            _case(f"{file}: loop of links", _replaced(file, _link(file)), file.partition("-")[0]),
            _case(f"{file}: dangling link", _replaced(file, _link("nothing")), "missing"),
            _case(f"{file}: folder", _replaced(file, Path.mkdir), f"{file}: expected a regular file"),
            _case(f"{file}: pipe", _replaced(file, os.mkfifo), f"{file}: expected a regular file"),
            _case(f"{file}: a terabyte of zeros", _replaced(file, _huge), file.partition("-")[0]),
        ]
    return [
        *cases,
        _case("index and shard disagree", _move_tensor, rf"{SHARD}: holds tensors that .* does not place in it"),
        _case("index and a single file", _two_at_once, "expected either model.safetensors or"),
        _case("shard cut by a byte", _truncate(SHARD), f"{SHARD}: the file is 1 bytes short"),
        _case("shard missing", lambda model: (model / SHARD).unlink(), "1 of 2 shards .* are missing"),
        _case(
            "tensor missing", _change_shard(**{EMBEDDING_KEY: None}), "embed_tokens.weight is missing from the checkpo"
        ),
        _case(
            "tensor unknown",
            _change_shard(model__extra__weight=torch.ones(1)),
            "extra.weight is in the checkpoint, but",
        ),
        _case("tensor of another shape", _change_shard(**{EMBEDDING_KEY: torch.ones(1)}), r"shape \[1\] in"),
        _case("tensor of integers", _change_shard(**{EMBEDDING_KEY: torch.ones(96, 128).int()}), "dtype I32 in"),
        _case("tensor of NaN", _change_shard(model__norm__weight=torch.full([128], torch.nan)), "holds NaN", SIDE),
        _case("tokenizer.json: link to the parent", _replaced("tokenizer.json", _link("../victim.bin")), outside, SIDE),
        _case("tokenizer.json: pipe", _replaced("tokenizer.json", os.mkfifo), "expected a regular file", SIDE),
        _case("tokenizer.json: link to /dev/zero", _replaced("tokenizer.json", _link("/dev/zero")), outside, SIDE),
        _case(
            "tokenizer.json: a terabyte", _replaced("tokenizer.json", _huge), "tokenizer.json: 1,099,.*at most", SIDE
        ),
        _case("LICENSE: link to /etc/hostname", _replaced("LICENSE", _link("/etc/hostname")), outside, SIDE),
        _case(
            "generation_config.json: link to the parent",
            _replaced("generation_config.json", _link("../victim.bin")),
            outside,
            SIDE,
        ),
    ]
