"""Which shards a checkpoint consists of, and what to say when the folder is not a checkpoint at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from llama4_quant.checkpoint.header import TensorEntry
from llama4_quant.checkpoint.json_files import named, read_json, shown
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME, STAGING_NAME, is_plain_name, locate
from llama4_quant.errors import CheckpointError

MAX_SHARDS = 10_000
EXPECTED = f"expected a folder with {CONFIG_NAME} and .safetensors weights (Hugging Face layout)"


def check_folder(root: Path) -> None:
    """Raise CheckpointError, with what was found and what to do, unless `root` looks like a checkpoint."""
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except FileNotFoundError:
        raise CheckpointError(f"{root}: {EXPECTED}, and there is nothing at this path; check the spelling") from None
    except NotADirectoryError:
        raise CheckpointError(f"{root}: {EXPECTED}, found a file; {_advice_for_file(root)}") from None
    except OSError as problem:
        raise CheckpointError(f"{root}: cannot be listed: {problem.strerror}; check the permissions") from problem
    if CONFIG_NAME not in names and STAGING_NAME in names:
        raise CheckpointError(
            f"{root}: an unfinished output of llama4-quant (it has {STAGING_NAME} and no {CONFIG_NAME}); run the same "
            "conversion again, or delete the folder"
        )
    has_weights = any(name.endswith(".safetensors") for name in names)
    if CONFIG_NAME not in names or not has_weights:
        raise CheckpointError(f"{root}: {EXPECTED}, found {_listed(names)}; {_advice_for_folder(root, names)}")


def shards_of(root: Path) -> dict[str, frozenset[str] | None]:
    """File name of every shard -> the tensors that the index promises in it; None when there is no index.

    Raises:
        CheckpointError: the index is not usable, a name in it leaves the folder, or shards are missing.
    """
    has_index, has_single = ((root / name).exists() for name in (INDEX_NAME, SINGLE_FILE_NAME))
    if has_index and has_single:
        raise CheckpointError(
            f"{root}: expected either {SINGLE_FILE_NAME} or {INDEX_NAME}, found both, and loaders disagree on which "
            "counts; delete the one that is out of date"
        )
    if has_single:
        return {SINGLE_FILE_NAME: None}
    path = locate(root, INDEX_NAME)
    shards = _group(read_json(path, CheckpointError).get("weight_map"), path)
    missing = sorted(name for name in shards if not (root / name).exists())
    if missing:
        raise CheckpointError(
            f"{root}: {len(missing)} of {len(shards)} shards that {INDEX_NAME} names are missing: {_listed(missing)}; "
            "download them"
        )
    return dict(shards)


def check_against_index(path: Path, promised: frozenset[str], entries: Iterable[TensorEntry]) -> None:
    """Raise CheckpointError unless the shard at `path` holds exactly the tensors that the index promises in it."""
    found = frozenset(entry.name for entry in entries)
    remedy = "the index and the shards are of different versions: download both again"
    if promised - found:
        raise CheckpointError(
            f"{path}: {INDEX_NAME} promises tensors that are not in it: {_listed(promised - found)}; {remedy}"
        )
    if found - promised:
        raise CheckpointError(
            f"{path}: holds tensors that {INDEX_NAME} does not place in it: {_listed(found - promised)}; {remedy}"
        )


def _group(weight_map: object, path: Path) -> Mapping[str, frozenset[str]]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected weight_map to map tensors to files, found {shown(weight_map)}")
    groups: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {shown(tensor)}: expected the name of a .safetensors file in the same folder, found "
                f"{shown(file)}; do not trust this checkpoint: download it from its publisher"
            )
        groups.setdefault(file, set()).add(tensor)
    if len(groups) > MAX_SHARDS:
        raise CheckpointError(
            f"{path}: names {len(groups):,} files, expected at most {MAX_SHARDS:,}; not a model's index"
        )
    return {file: frozenset(groups[file]) for file in sorted(groups)}


def _listed(names: Iterable[str], limit: int = 4) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(map(named, ordered[:limit])) or "an empty folder") + more


def _advice_for_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF files are quantized already and cannot be read; start from the BF16 checkpoint on the Hub"
    if path.suffix in {".safetensors", ".json"}:
        return f"give the folder that holds it: {path.parent}"
    return "give the folder of the checkpoint"


def _advice_for_folder(root: Path, names: list[str]) -> str:
    suffixes = {Path(name).suffix for name in names}
    if ".safetensors" in suffixes:
        return f"{CONFIG_NAME} is missing: download it into this folder"
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names) or "params.json" in names:
        return (
            "in Meta's original layout, params.json and consolidated.00.pth, consolidated.01.pth, ... stand side by "
            "side: download them into this folder"
        )
    if ".gguf" in suffixes:
        return "GGUF files are quantized already and cannot be read; start from the BF16 checkpoint on the Hub"
    if suffixes & {".bin", ".pt", ".pth"}:
        return "pickled weights are not read, because loading them can run code; convert them to safetensors"
    if {"snapshots", "blobs"} <= set(names):
        snapshots = sorted(str(folder) for folder in (root / "snapshots").iterdir())
        return f"this is a repository of the Hub's cache; give one of its snapshots: {_listed(snapshots)}"
    return "download the checkpoint into this folder" if names else "is the download finished?"
