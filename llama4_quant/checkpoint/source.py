"""Finding the source checkpoint, on disk or on the Hub, and the files beside its weights that an output takes over."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, is_plain_name, locate
from llama4_quant.errors import CheckpointError, UsageError

_SIDE_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*processor_config.json",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
    "*.tiktoken",
    "*.model",
)
_NEVER_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"}
_DOWNLOADED = ("*.safetensors", "*.json", *_SIDE_PATTERNS)
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
    path = _existing(path_or_id)
    if path is not None:
        if revision is not None:
            raise UsageError(
                f"{path}: --revision {revision} is for Hub repositories, and this is a local path; drop it"
            )
        return path
    if not _REPOSITORY_ID.fullmatch(path_or_id) or path_or_id.endswith(_FILE_SUFFIXES):
        raise CheckpointError(
            f"{shown(path_or_id)}: expected an existing folder or a Hub id (organisation/name), and there is nothing "
            "at this path; check the spelling"
        )
    return _download(path_or_id, revision)


def side_files(source: Path) -> tuple[Path, ...]:
    """Files that a converted checkpoint takes over unchanged: tokenizer, processor, chat template, licence; sorted.

    Never weights, config.json, the index, code, hidden files, or README.md, which describes the source.

    Raises:
        CheckpointError: one of them is a link that leaves the checkpoint.
    """
    return tuple(locate(source, path.name) for path in sorted(source.iterdir()) if _is_side_file(path))


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
    return any(fnmatchcase(name, pattern) for pattern in _SIDE_PATTERNS)


def _download(repository: str, revision: str | None) -> Path:
    at = f"{repository} at revision {revision}" if revision else repository
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(_DOWNLOADED), ignore_patterns=["*/*", "*.py"]
        )
    except hub.GatedRepoError as problem:
        raise CheckpointError(
            f"{at}: access is restricted; accept the licence at https://huggingface.co/{repository} and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from problem
    except hub.RevisionNotFoundError as problem:
        raise CheckpointError(f"{at}: the repository has no such revision; give a branch, tag or commit") from problem
    except hub.RepositoryNotFoundError as problem:
        raise CheckpointError(
            f"{at}: neither a local folder nor a repository that you can see on the Hub; check the spelling, and log "
            "in with `hf auth login` if it is private"
        ) from problem
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as problem:
        raise CheckpointError(
            f"{at}: not complete in the local cache, and the Hub cannot be reached (no connection, or HF_HUB_OFFLINE "
            f"is set); connect, or give the path of a local folder. The Hub client says: {_first_line(problem)}"
        ) from problem
    except hub.HfHubHTTPError as problem:
        raise CheckpointError(
            f"{at}: the Hub refused: {_first_line(problem)}; for 401 or 403 check HF_TOKEN or log in again with "
            "`hf auth login`, otherwise run the command again later: it resumes"
        ) from problem
    except Exception as problem:  # the client's transport, and so its errors, differ by version
        raise CheckpointError(
            f"{at}: the download failed: {_first_line(problem)}; run the command again, it resumes"
        ) from problem
    return Path(folder)


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
