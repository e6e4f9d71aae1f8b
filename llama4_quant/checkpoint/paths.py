"""Which files belong to a checkpoint: names that an index gives are data, and must not lead out of its folder.

A file may be a link if its target lies in the same folder, or in a blob folder of the huggingface_hub cache:

    models--org--name/snapshots/<commit>/config.json -> ../../blobs/<hash>
    models--org--name/blobs/<hash> -> ../../blobs/<two digits>/<hash>       (the store that repositories share)
"""

from pathlib import Path

from llama4_quant.checkpoint.json_files import shown
from llama4_quant.errors import CheckpointError

STAGING_NAME = ".llama4-quant-partial"
"""Folder inside an output that holds what is not finished; without config.json beside it the output is unfinished."""
DOWNLOAD_NAME = "source"
"""Folder in the staging folder for shards that are deleted after use; publishing removes it."""
SCRATCH_NAME = "calibration"
"""Folder in the staging folder for activations; publishing removes it."""
CONFIG_NAME = "config.json"
PARAMS_NAME = "params.json"
"""Meta's config.json."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"


def is_plain_name(name: str) -> bool:
    """Whether `name` is the visible name of a file in the folder itself: no separators, `..` or control characters."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= 255
        and name.isprintable()
        and not set("/\\") & set(name)
        and name[0] != "."
    )


def locate(root: Path, name: str) -> Path:
    """`root / name`, once it is known to be a regular file that belongs to the checkpoint in `root`.

    Raises:
        CheckpointError: the name is not plain, the file is missing or not regular, or a link leaves the checkpoint.
    """
    if not is_plain_name(name):
        raise CheckpointError(
            f"{root}: expected the name of a file in this folder, found {shown(name)}; do not use this checkpoint "
            "unless you know why it points elsewhere"
        )
    path = root / name
    try:
        home, target = root.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        dangling = f" (it links to {path.readlink()}, which does not exist)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: this file is missing{dangling}; download it again") from None
    except (OSError, RuntimeError) as problem:  # RuntimeError: a loop of links, up to Python 3.12
        raise CheckpointError(f"{path}: cannot be read: {problem}; download it again") from None
    if not any(target.is_relative_to(folder) for folder in (home, *_blob_folders(home))):
        raise CheckpointError(
            f"{path}: expected a file inside {home}, found a link to {target}; copy the file into the folder if it "
            "belongs to this checkpoint"
        )
    if not target.is_file():
        raise CheckpointError(f"{path}: expected a regular file, found a folder or device; download it again")
    return path


def _blob_folders(home: Path) -> tuple[Path, ...]:
    """Where the links of a huggingface_hub snapshot may lead; nowhere for any other folder."""
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return ()
    return repository / "blobs", repository.parent / "blobs"
