"""The folder that shards are downloaded into: made by this program, used by one process, and emptied by nobody else.

A file in it says whose downloads it holds, and is locked while they are in use. A folder without that file is refused,
so that nothing is ever deleted that was not downloaded here.
"""

import fcntl
import os
import shutil
from pathlib import Path

from llama4_quant.checkpoint.files import os_errors
from llama4_quant.checkpoint.locks import try_lock
from llama4_quant.errors import OutputError

MARK_NAME = ".llama4-quant-download"
SCRATCH_PREFIX = ".headers-"
_PARTIAL_PATTERN = ".cache/huggingface/download/*.incomplete"
_MAX_MARK_BYTES = 1000


def claim(folder: Path, content: str) -> int:
    """Take a folder for the downloads of `content` (repository and commit), as an earlier process has left it.

    Downloads of other content are removed, and what a killed process has left unfinished.

    Returns:
        A descriptor; closing it releases the folder.

    Raises:
        OutputError: the folder was not made by this program, cannot be written, or another process uses it.
    """
    with os_errors(f"{folder}: cannot be used for downloads"):
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / MARK_NAME
        if folder.is_symlink() or (not mark.exists() and any(folder.iterdir())):
            raise OutputError(
                f"{folder}: expected a folder made by llama4-quant for downloads, found something else; remove it"
            )
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _take(folder, descriptor, content.encode())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _take(folder: Path, descriptor: int, content: bytes) -> None:
    if not try_lock(descriptor, fcntl.LOCK_EX):
        raise OutputError(f"{folder}: another process downloads into this folder; wait for it, or stop it")
    if os.pread(descriptor, _MAX_MARK_BYTES, 0) != content:
        for entry in list(folder.iterdir()):
            if entry.name != MARK_NAME:
                _remove(entry)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
    for entry in (*folder.glob(_PARTIAL_PATTERN), *folder.glob(f"{SCRATCH_PREFIX}*")):
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
