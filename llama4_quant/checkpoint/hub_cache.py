"""Whole repositories in the Hub's own cache: downloaded with the Hub's client, once it is known that there is room."""

from contextlib import suppress
from glob import escape
from pathlib import Path
from shutil import disk_usage
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import DryRunError

from llama4_quant.checkpoint.files import existing_parent, no_space
from llama4_quant.checkpoint.hub import NEVER_PATTERNS, SMALL_PATTERNS, described, shards_in_index
from llama4_quant.checkpoint.hub_errors import hub_errors
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, PARAMS_NAME, SINGLE_FILE_NAME
from llama4_quant.errors import HubError, OutputError

_META_PATTERN = "consolidated.*.pth"


def download_checkpoint(repository: str, revision: str | None) -> Path:
    """Download what a conversion needs into the Hub's cache, or find it there.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection, or an index that is not usable.
        OutputError: the disk of the cache has no room for the weights that are not in it; none is downloaded then.
    """
    with hub_errors(described(repository, revision), repository):
        folder = _small_files(repository, revision)
        require_room({cache_folder(): _missing_bytes(repository, folder)})
        _weights(repository, folder)
    return folder


def bytes_to_download(repository: str, revision: str | None) -> int:
    """How many bytes of weights `download_checkpoint` would transfer; 0 without a connection.

    Raises:
        CheckpointError: as for `download_checkpoint`.
    """
    with hub_errors(described(repository, revision), repository):
        return _missing_bytes(repository, _small_files(repository, revision))


def cached_checkpoint(repository: str, revision: str | None) -> Path | None:
    """The folder in the Hub's cache that holds everything that a conversion needs, if there is one.

    Raises:
        CheckpointError: the cached index is not usable.
    """
    with suppress(HubError), hub_errors(described(repository, revision), repository):
        folder = _small_files(repository, revision, local_files_only=True)
        _weights(repository, folder, local_files_only=True)
        return folder
    return None


def cache_folder() -> Path:
    """Where the Hub's client keeps what it downloads (HF_HUB_CACHE)."""
    return Path(constants.HF_HUB_CACHE)


def require_room(needs: dict[Path, int]) -> None:
    """Raise OutputError unless every disk has room for all that is to be written to folders on it.

    Args:
        needs: bytes by folder; the folders need not exist.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(existing_parent(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed, free = sum(needs[folder] for folder in folders), disk_usage(existing_parent(folders[0])).free
        if needed > free:
            parts = ", ".join(f"{needs[folder]:,} for {folder}" for folder in folders)
            raise OutputError(
                f"{parts}: {no_space(needed, free)}. For a Hub id --delete-source-shards keeps only a few shards of "
                "the source at a time, and HF_HUB_CACHE moves the Hub's cache to another disk"
            )


def _small_files(repository: str, revision: str | None, **options: Any) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=SMALL_PATTERNS, ignore_patterns=NEVER_PATTERNS, **options
        )
    )


def _weights(repository: str, folder: Path, **options: Any) -> Any:
    """The weight files of the commit that `folder` is named after."""
    patterns = _weight_patterns(folder)
    return huggingface_hub.snapshot_download(
        repository, revision=folder.name, allow_patterns=patterns, ignore_patterns=["*/*"], **options
    )


def _missing_bytes(repository: str, folder: Path) -> int:
    with suppress(DryRunError):  # no connection: what is cached has to do
        return sum(file.file_size for file in _weights(repository, folder, dry_run=True) if file.will_download)
    return 0


def _weight_patterns(folder: Path) -> list[str]:
    if (folder / INDEX_NAME).exists():
        return [escape(name) for name in sorted(shards_in_index(folder))]
    if (folder / PARAMS_NAME).exists() and not (folder / CONFIG_NAME).exists():
        return [_META_PATTERN]
    return [SINGLE_FILE_NAME]
