"""A Hub on localhost: as much of the protocol as the real client needs, and failures on request.

Weight files are in large file storage: the Hub answers with a redirect to a second origin (a signed URL), which serves
ranges and may cut connections; other files come from the Hub itself. Names and headers as documented at
https://huggingface.co/docs/hub and used by huggingface_hub.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from checkpoint.checkpoint_files import sharded
from checkpoint.xet_server import XetStorage, byte_span, token_headers
from huggingface_hub import constants
from huggingface_hub.utils import close_session

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_localtesttoken"
LARGE = (".safetensors", ".pth", ".bin")


def blob_id(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class LocalHub:
    """What is served, how it fails, and what was asked.

    `names`: branches and tags; `refusal`: status and headers of every answer of the Hub; `xet`: where large
    files are besides; `cuts`: for a file, after how
    many bytes to cut each of the next connections; `failures`: for a file, the status of each of the next answers;
    `damage`: how many answers hold wrong bytes; `sent`: bytes of content sent, by file.
    """

    revisions: dict[str, dict[str, bytes]]
    names: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False
    refusal: tuple[int, dict[str, str]] | None = None
    down: bool = False
    ignores_ranges: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    damage: Counter[str] = field(default_factory=Counter)
    on_download: Callable[[str], None] = lambda _: None
    sent: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, str | None]] = field(default_factory=list)
    tokens_at_storage: list[str] = field(default_factory=list)
    storage: str = ""
    xet: XetStorage | None = None

    @property
    def downloaded(self) -> set[str]:
        """Large files of which more than a header was asked for."""
        return {name for name, wanted in self.ranges if wanted is None or not wanted.startswith("bytes=0-")}

    def tree(self, commit: str) -> list[dict[str, object]]:
        """The answer of the tree endpoint."""
        rows: list[dict[str, object]] = []
        for name, data in self.revisions[commit].items():
            row: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if name.endswith(LARGE):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            rows.append(row)
        return rows


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.hub.down:
            self.close_connection = True
        elif self.hub.refusal is not None:
            self.answer(self.hub.refusal[0], **self.hub.refusal[1])
        elif self.hub.xet is not None and parts[-1:] == ["xet-token"]:
            self.answer(200, **token_headers(self.hub.xet))
        elif parts[:2] == ["api", "models"]:
            self._api(parts[2:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve(parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    def _commit(self, revision: str) -> str | None:
        aliases = {**self.hub.names, **{commit: commit for commit in self.hub.revisions}}
        commit = aliases.get(revision)
        if commit is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        return commit

    def _api(self, parts: list[str]) -> None:
        if parts[1] == "absent":
            self.answer(404, X_Error_Code="RepoNotFound")
        elif (commit := self._commit(parts[3] if len(parts) > 3 else "main")) is not None:
            if parts[2:3] == ["tree"]:
                recursive = "recursive=true" in self.path.lower()
                rows = [row for row in self.hub.tree(commit) if recursive or "/" not in str(row["path"])]
                self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            else:
                info = {"id": "/".join(parts[:2]), "sha": commit, "siblings": []}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def _resolve(self, revision: str, name: str) -> None:
        commit = self._commit(revision)
        if commit is None:
            return
        data = self.hub.revisions[commit].get(name)
        if self.hub.failures.get(name):
            self.answer(self.hub.failures[name].pop(0))
        elif self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401 if "Authorization" not in self.headers else 403, X_Error_Code="GatedRepo")
        elif data is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif name.endswith(LARGE):
            linked = {"X_Linked_Size": str(len(data)), "X_Linked_Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
            if self.hub.xet is not None:
                linked["X_Xet_Hash"] = self.hub.xet.add(data)
                linked["Link"] = f'<{constants.ENDPOINT}/api/models/x/xet-token>; rel="xet-auth"'
            location = f"{self.hub.storage}/{commit}/{name}?signature=x"
            self.answer(302, Location=location, X_Repo_Commit=commit, ETag='"of-the-pointer"', **linked)
        else:
            self.answer(200, data, ETag=f'"{blob_id(data)}"', X_Repo_Commit=commit)


class _StorageHandler(_Handler):
    def do_GET(self) -> None:
        commit, name = (unquote(part) for part in urlsplit(self.path).path.strip("/").split("/"))
        hub, wanted = self.hub, self.headers.get("Range")
        hub.tokens_at_storage += [self.headers["Authorization"]] if "Authorization" in self.headers else []
        hub.ranges.append((name, wanted))
        if hub.down:
            self.close_connection = True
            return
        if wanted is None:
            hub.on_download(name)
        data = hub.revisions[commit][name]
        if hub.damage[name] and wanted is None:
            hub.damage[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, stop = byte_span(None if hub.ignores_ranges else wanted, len(data))
        headers = {"Content_Range": f"bytes {start}-{stop - 1}/{len(data)}"} if stop - start < len(data) else {}
        self._send(name, data[start:stop], 206 if headers else 200, headers)

    def _send(self, name: str, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        cuts = self.hub.cuts.get(name)
        cut = cuts.pop(0) if cuts and self.headers.get("Range", "") != "bytes=0-131071" else len(body)
        self.hub.sent[name] += len(body[:cut])
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut < len(body)


@contextmanager
def running_hub(files: Mapping[str, bytes], home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Serve `files` as the main branch of every repository but org/absent; the client uses it, and never sleeps."""
    hub = LocalHub(revisions={COMMIT: dict(files)})
    servers = []
    for base in (_HubHandler, _StorageHandler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (base,), {"hub": hub}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    close_session()  # it may have been made with a proxy, or for another server
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()
    close_session()


def shards(folder: Path) -> list[str]:
    """Shards in a download folder, finished or on their way."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix in {".safetensors", ".incomplete"})


def open_files(folder: Path) -> list[Path]:
    """Files below `folder` that this process has open."""
    targets = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [target for target in targets if target.is_relative_to(folder)]


def whole(hub: LocalHub) -> list[str]:
    """Every download of a whole shard, in order."""
    return [name for name, wanted in hub.ranges if wanted is None]


def five_shards(folder: Path) -> Path:
    """Five shards of 320 kB, more than is asked for when headers are read; each with a 3-D and a 2-D tensor."""
    torch.manual_seed(0)
    tensors = ({f"e{n}": torch.randn(4, 30, 500).bfloat16(), f"w{n}": torch.randn(100, 500)} for n in range(5))
    sharded(folder, {f"model-{n}.safetensors": part for n, part in enumerate(tensors)})
    (folder / "tokenizer.json").write_text("{}")
    return folder
