"""The Hugging Face Hub, through its own client: the files of a repository, parts of them, and whole ones.

Only what a conversion needs is ever asked for: configuration, tokenizer and licence, and the weight files that the
index names. The client takes the token from HF_TOKEN or `hf auth login`, retries, resumes a file whose connection
drops, and uses hf_xet if it is installed (HF_HUB_DISABLE_XET=1 switches that off). Whole repositories in the Hub's
cache: hub_cache.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Self

import huggingface_hub

from llama4_quant.checkpoint.hub_errors import hub_errors, with_retries
from llama4_quant.checkpoint.hub_transfer import read_part, silent_bar
from llama4_quant.checkpoint.json_files import read_json, shown
from llama4_quant.checkpoint.paths import INDEX_NAME, is_plain_name
from llama4_quant.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

SIDE_PATTERNS = (
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
"""Files beside the weights that belong to a checkpoint."""

SMALL_PATTERNS = ["*.json", *SIDE_PATTERNS]
NEVER_PATTERNS = ["*/*", "*.py", "*.safetensors", "*.pth", "*.pt", "*.bin", "*.gguf"]


def shards_in_index(folder: Path) -> frozenset[str]:
    """Names that the index in `folder` gives to shards, but for those that lead elsewhere, which the reader refuses.

    Raises:
        CheckpointError: the index is not JSON, or there is no such name in it.
    """
    path = folder / INDEX_NAME
    weight_map = read_json(path, CheckpointError).get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    shards = frozenset(
        value for value in values if isinstance(value, str) and is_plain_name(value) and value.endswith(".safetensors")
    )
    if not shards:
        raise CheckpointError(f"{path}: expected weight_map to map tensors to files, found {shown(weight_map)}")
    return shards


def described(repository: str, revision: str | None) -> str:
    """A repository as the user named it, for messages."""
    return f"{repository} at revision {revision}" if revision else repository


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: its name; it lies in the repository's top folder.
        size: in bytes.
        sha256: of the content, for files in large file storage.
        blob_id: git's name of the content (or, in large file storage, of a pointer to it).
    """

    name: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def digest(self) -> str:
        """What identifies the content: SHA-256, or git's SHA-1 for small files."""
        return self.sha256 or self.blob_id

    def digest_of(self, path: Path) -> str:
        """The same of a local file."""
        with path.open("rb") as content:
            if self.sha256:
                return hashlib.file_digest(content, "sha256").hexdigest()
            blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            return hashlib.file_digest(content, lambda: blob).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """One commit of a model repository.

    Attributes:
        name: such as `meta-llama/Llama-4-Scout-17B-16E-Instruct`.
        commit: its hash.
        files: the files of its top folder, by name.
    """

    name: str
    commit: str
    files: Mapping[str, RemoteFile]

    @classmethod
    def find(cls, name: str, revision: str | None = None) -> Self:
        """Ask the Hub which commit a branch or tag is, and for its files.

        Raises:
            CheckpointError: no such repository or revision, no access, or no connection.
        """
        with hub_errors(described(name, revision), name):
            from huggingface_hub.hf_api import HfApi, RepoFile  # noqa: PLC0415 - slow to import, only for the Hub

            api = HfApi()
            commit = with_retries(lambda: api.model_info(name, revision=revision)).sha
            if commit is None:
                raise CheckpointError(f"{name}: the Hub names no commit of this repository; check HF_ENDPOINT")
            listed = with_retries(lambda: list(api.list_repo_tree(name, revision=commit)))
        files = [_remote(file) for file in listed if isinstance(file, RepoFile) and is_plain_name(file.path)]
        return cls(name=name, commit=commit, files={file.name: file for file in files})

    def at(self, file: str | None = None) -> str:
        """Where something is, for messages."""
        place = f"{self.name} at commit {self.commit[:12]}"
        return f"{place}: {file}" if file else place

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file, or up to its end; nothing else is transferred or held.

        Raises:
            CheckpointError: no connection, or the server does not serve parts of files.
        """
        num_bytes = min(stop, file.size) - start
        if num_bytes <= 0:
            return b""
        url = huggingface_hub.hf_hub_url(self.name, file.name, revision=self.commit)
        with hub_errors(self.at(file.name), self.name):
            return with_retries(lambda: read_part(url, start, num_bytes))

    def cached(self, file: RemoteFile) -> Path | None:
        """Where the Hub's cache has this very file, if it has."""
        path = huggingface_hub.try_to_load_from_cache(self.name, file.name, revision=self.commit)
        found = Path(path) if isinstance(path, str) else None
        return found if found is not None and found.stat().st_size == file.size else None

    def download_small(self, folder: Path) -> None:
        """Download everything but weights into `folder`."""
        with hub_errors(self.at(), self.name):
            huggingface_hub.snapshot_download(
                self.name,
                revision=self.commit,
                local_dir=folder,
                allow_patterns=SMALL_PATTERNS,
                ignore_patterns=NEVER_PATTERNS,
            )

    def download(self, file: RemoteFile, folder: Path, stop: Event) -> Path:
        """Download one file into `folder`, unless it is there already, and compare its digest.

        Args:
            file: the file.
            folder: where to; a damaged file in it is replaced.
            stop: gives up soon after this is set.

        Raises:
            CheckpointError: no connection, no space, or what arrives is not the file that the Hub describes.
        """
        found = []
        for _ in range(2):
            with hub_errors(self.at(file.name), self.name):
                path = Path(with_retries(lambda: self._download(file, folder, stop)))
            found.append(file.digest_of(path))
            if found[-1] == file.digest:
                return path
            path.unlink()
        raise CheckpointError(
            f"{self.at(file.name)}: expected content with the digest {file.digest}, found {' and '.join(found)}: it is "
            "damaged on the way or at the Hub, and was deleted; run the command again later, it resumes"
        )

    def _download(self, file: RemoteFile, folder: Path, stop: Event) -> str:
        if stop.is_set():
            raise CheckpointError(f"{self.at(file.name)}: the download was stopped; run the command again, it resumes")
        return huggingface_hub.hf_hub_download(
            self.name, file.name, revision=self.commit, local_dir=folder, tqdm_class=silent_bar(stop)
        )


def _remote(file: "RepoFile") -> RemoteFile:
    return RemoteFile(
        name=file.path, size=file.size, sha256=file.lfs.sha256 if file.lfs else None, blob_id=file.blob_id
    )
