"""Where a checkpoint is found: a folder, the Hub's cache (real layout, no network), a Hub that answers on localhost."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint.checkpoint_files import two_shards
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import resolve, side_files
from llama4_quant.errors import CheckpointError, UsageError

REPOSITORY = "meta-llama/Llama-4-Tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, *, shared: bool = False) -> Path:
    """A downloaded snapshot as huggingface_hub lays it out; `shared`: with its store that repositories share."""
    repository = cache / "models--meta-llama--Llama-4-Tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(two_shards(cache / "plain").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if shared:
            (cache / "blobs" / "ab").mkdir(parents=True, exist_ok=True)
            path.rename(cache / "blobs" / "ab" / f"{number:064x}")
            blob.symlink_to(f"../../blobs/ab/{number:064x}")
        else:
            path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path / "model")
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == Path("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == folder
    with pytest.raises(UsageError, match="--revision main is for Hub repositories"):
        resolve(str(folder), "main")


@pytest.mark.parametrize(
    "path",
    [
        "/no/where",
        "./model",
        "../model",
        "model",
        "~/nowhere",
        "a/b/c",
        "a/b/",
        "a/model.safetensors",
        "",
        "a b/c",
        "x" * 5000,
        "~no-such-user/m",
    ],
)
def test_a_local_path_that_does_not_exist_is_not_asked_of_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="expected an existing folder or a Hub id"):
        resolve(path)


@pytest.mark.parametrize("shared", [False, True])
def test_a_cached_snapshot_is_read_through_its_links(offline: Path, shared: bool) -> None:
    offline.mkdir()
    snapshot = cached(offline, shared=shared)
    for revision in (None, "main", COMMIT):
        assert resolve(REPOSITORY, revision) == snapshot
    with CheckpointReader.open(resolve(REPOSITORY)) as reader:
        assert sorted(reader.tensors) == ["a", "b"]
        assert torch.isfinite(reader.read("a")).all()


def test_links_of_a_snapshot_may_lead_to_its_blobs_only(offline: Path) -> None:
    offline.mkdir()
    snapshot = cached(offline)
    other = offline / "models--meta-llama--Other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "a.safetensors").resolve().rename(other / "x")
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to(other / "x")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: expected a file inside"):
        CheckpointReader.open(snapshot)


def test_not_in_the_cache_and_offline(offline: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"meta-llama/Llama-4-Tiny: not complete in the local cache.*HF_HUB_OFFLINE"
    ):
        resolve(REPOSITORY)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download needs; the repository's name says how to answer."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        refusals = {"gated": (403, "GatedRepo"), "absent": (404, "RepoNotFound"), "private": (401, "")}
        refusals["norev"] = (404, "RevisionNotFound")
        name = next((part for part in path.split("/") if part in refusals), None)
        if name is not None:
            self.answer(refusals[name][0], b"", {"X-Error-Code": refusals[name][1]})
        elif "/resolve/" in path and path.rsplit("/", 1)[1] in self.files:
            data = self.files[path.rsplit("/", 1)[1]]
            self.answer(200, data, {"ETag": f'"{hash(data) & 0xFFFFFFFF:040x}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": f"{1:040x}"} for n, d in self.files.items()]
            self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            siblings = [{"rfilename": file} for file in self.files]
            info = {"id": "org/fine", "modelId": "org/fine", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The real client library against a server on localhost."""
    files = {path.name: path.read_bytes() for path in two_shards(tmp_path / "model").iterdir()}
    extra = {
        "README.md": b"-",
        "tokenizer.json": b"{}",
        "original/params.json": b"{}",
        "evil.py": b"-",
        "pytorch_model.bin": b"-",
    }
    handler = type("Handler", (Hub,), {"files": {**files, **extra}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    close_session()  # it may have been made with a proxy
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    yield handler
    server.shutdown()
    server.server_close()
    close_session()


def test_only_needed_files_are_downloaded(hub: type[Hub]) -> None:
    folder = resolve("org/fine")
    assert sorted(path.name for path in folder.rglob("*")) == [
        "a.safetensors",
        "b.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    CheckpointReader.open(folder).close()


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("org/gated", r"access is restricted; accept the licence at https://huggingface.co/org/gated and log in"),
        ("org/absent", "neither a local folder nor a repository that you can see on the Hub"),
        ("org/private", r"the Hub asks for a valid token .401.; log in with `hf auth login` or set HF_TOKEN"),
        ("org/norev", "at revision v9: the repository has no such revision"),
    ],
)
def test_refusals_of_the_hub(hub: type[Hub], repository: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(repository, "v9")
    assert str(caught.value).startswith(repository)
    assert hub.asked  # the message came from an answer, not from a failure to connect


def test_other_failures_of_the_client_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"the download failed: OSError: .*No space left on device; run the command"
    ):
        resolve("org/name")


def test_side_files(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    copied = [
        "LICENSE",
        "LICENSE.txt",
        "USE_POLICY.md",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.tiktoken",
    ]
    left = [
        "README.md",
        "pytorch_model.bin",
        "tokenizer.safetensors",
        ".hidden.model",
        "tokenizer.py",
        "model.gguf",
        "x.json",
    ]
    for name in (*copied, *left):
        (folder / name).write_text("x")
    (folder / "tokenizer").mkdir()
    assert side_files(folder) == tuple(folder / name for name in copied)


def test_side_files_cannot_be_links_to_secrets(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    (tmp_path / "secret").write_text("token")
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a file inside"):
        side_files(folder)
