"""Finding the source checkpoint, on disk or on the Hub, and the files beside its weights that an output takes over."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from llama4_quant.checkpoint.hub import SIDE_PATTERNS
from llama4_quant.checkpoint.hub_cache import cached_checkpoint, download_checkpoint
from llama4_quant.checkpoint.hub_reader import HubReader
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.meta import MetaReader, is_meta_layout
from llama4_quant.checkpoint.paths import CONFIG_NAME, DOWNLOAD_NAME, INDEX_NAME, is_plain_name, locate
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.errors import CheckpointError, HubError, OtherLayoutError, UsageError

MAX_SIDE_FILE_BYTES = 2**28
"""Llama 4's tokenizer.json has 28 MB."""
_NEVER_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"}
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".json", ".gguf", ".bin", ".pth", ".pt")


def resolve(path_or_id: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repository, downloaded into the Hub's cache.

    Args:
        path_or_id: path of a folder, or a Hub id such as `meta-llama/Llama-4-Scout-17B-16E-Instruct`.
        revision: branch, tag or commit of the Hub repository.

    Returns:
        A path that exists; whether it holds a checkpoint is for `CheckpointReader.open` to say.

    Raises:
        CheckpointError: no such folder or repository, no access to it, or no connection.
        UsageError: a revision of a local folder.
    """
    path = _local(path_or_id, revision)
    return download_checkpoint(path_or_id, revision) if path is None else path


def open_source(path_or_id: str, revision: str | None = None, *, download_to: Path | None = None) -> CheckpointReader:
    """Open a checkpoint; with `download_to`, a Hub repository whose shards come one by one and are deleted after use.

    Args:
        path_or_id: as for `resolve`.
        revision: as for `resolve`.
        download_to: the folder for a few shards at a time, best inside the output; it is made, and belongs to the
            reader (a `HubReader`). None for a local folder or the Hub's cache, where nothing is ever deleted.

    Raises:
        CheckpointError: as for `resolve` and `CheckpointReader.open` (`MetaReader.open` for Meta's layout).
        UsageError: as for `resolve`; or `download_to` with a local folder.
    """
    if download_to is None:
        return _open(resolve(path_or_id, revision))
    path = _local(path_or_id, revision)
    if path is not None:
        raise UsageError(
            f"{path}: --delete-source-shards deletes only shards that it has downloaded itself, never files of a local "
            "folder or of the Hub's cache; drop it, or give a Hub id (organisation/name)"
        )
    return HubReader.connect(path_or_id, revision, folder=download_to)


def is_hub_id(path_or_id: str, revision: str | None = None) -> bool:
    """Whether a repository of the Hub is meant, and not a local folder.

    Raises:
        CheckpointError, UsageError: as for `resolve`, if it can be neither.
    """
    return _local(path_or_id, revision) is None


@contextmanager
def open_headers(path_or_id: str, revision: str | None = None) -> Iterator[CheckpointReader]:
    """Open a checkpoint to look at its headers: of a Hub repository no weights are downloaded.

    Args and errors as of `open_source`.

    Raises:
        OtherLayoutError: a repository without safetensors that is not in the Hub's cache.
    """
    with ExitStack() as stack:
        yield stack.enter_context(_headers_of(path_or_id, revision, stack))


def _headers_of(path_or_id: str, revision: str | None, stack: ExitStack) -> CheckpointReader:
    if _local(path_or_id, revision) is None:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        try:
            return HubReader.connect(path_or_id, revision, folder=scratch / DOWNLOAD_NAME)
        except (HubError, OtherLayoutError):
            cached = cached_checkpoint(path_or_id, revision)
            if cached is None:
                raise
            return _open(cached)
    return open_source(path_or_id, revision)


def _open(folder: Path) -> CheckpointReader:
    return MetaReader.open(folder) if is_meta_layout(folder) else CheckpointReader.open(folder)


def side_files(source: Path) -> tuple[Path, ...]:
    """Files that a converted checkpoint takes over unchanged: tokenizer, processor, chat template, licence; sorted.

    Never weights, config.json, the index, code, hidden files, or README.md, which describes the source.

    Raises:
        CheckpointError: one of them is a link that leaves the checkpoint, no regular file, or too large.
    """
    found = tuple(locate(source, path.name) for path in sorted(source.iterdir()) if _is_side_file(path))
    for path in found:
        if path.stat().st_size > MAX_SIDE_FILE_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_SIDE_FILE_BYTES:,} for such a file; "
                "remove it from the folder"
            )
    return found


def _local(path_or_id: str, revision: str | None) -> Path | None:
    """The local folder that is meant, or None for a Hub id."""
    path = _existing(path_or_id)
    if path is not None and revision is not None:
        raise UsageError(f"{path}: --revision {revision} is for Hub repositories, and this is a local path; drop it")
    if path is None and (not _REPOSITORY_ID.fullmatch(path_or_id) or path_or_id.endswith(_FILE_SUFFIXES)):
        raise CheckpointError(
            f"{shown(path_or_id)}: expected an existing folder or a Hub id (organisation/name), and there is nothing "
            "at this path; check the spelling"
        )
    return path


def _existing(path: str) -> Path | None:
    try:
        expanded = Path(path).expanduser()
        return expanded if path and expanded.exists() else None
    except (OSError, RuntimeError):  # too long, not to be entered, or the home of an unknown user
        return None


def _is_side_file(path: Path) -> bool:
    name = path.name
    if not is_plain_name(name) or name in {CONFIG_NAME, INDEX_NAME} or path.suffix in _NEVER_COPIED or path.is_dir():
        return False
    return any(fnmatchcase(name, pattern) for pattern in SIDE_PATTERNS)
