"""Xet storage on localhost: as much of its protocol as `hf_xet` needs to download files.

A file is one xorb of chunks that are stored as they are: a header of 8 bytes (version 0, stored size, scheme 0, size;
sizes of three bytes, little-endian) and up to 128 KiB. The client asks for a token, for the file's reconstruction
(which chunks, and where), and then for ranges of xorbs. Protocol: https://huggingface.co/docs/xet.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CHUNK_BYTES = 128 * 2**10
TOKEN = "xet-token"


@dataclass
class XetStorage:
    """What is stored, and what was asked.

    `cuts`: after how many bytes to cut each of the next answers with content; while `stalled` is set, none is sent.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    cuts: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    num_sent: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)

    def add(self, data: bytes) -> str:
        """Store a file; its name here."""
        name = hashlib.sha256(data).hexdigest()
        self.files[name] = data
        return name


def chunks(data: bytes) -> list[bytes]:
    """A file cut into chunks."""
    return [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]


def xorb(data: bytes) -> bytes:
    """All chunks of a file, each behind its header."""
    parts = []
    for chunk in chunks(data):
        size = len(chunk).to_bytes(3, "little")
        parts.append(b"\0" + size + b"\0" + size + chunk)
    return b"".join(parts)


class _Handler(BaseHTTPRequestHandler):
    storage: XetStorage
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(404, b"")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.storage.asked.append(path)
        _, version, kind, name = (*path.split("/"), "", "", "")[:4]
        if (version, kind) == ("v1", "reconstructions") and name in self.storage.files:
            self._reconstruction(name)
        elif (version, kind) == ("v1", "content"):
            self._content(xorb(self.storage.files[name]))
        else:
            self.answer(404, b"")

    def _reconstruction(self, name: str) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, b"")
            return
        data = self.storage.files[name]
        start, stop = byte_span(self.headers.get("Range"), len(data))
        if start >= len(data):
            self.answer(416, b"")
            return
        first, last = start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)
        offset = first * (CHUNK_BYTES + 8)
        end = min(last * (CHUNK_BYTES + 8), len(xorb(data)))
        span = {"start": first, "end": last}
        where = {
            "range": span,
            "url": f"{self.storage.url}/v1/content/{name}",
            "url_range": {"start": offset, "end": end - 1},
        }
        term = {
            "hash": name,
            "unpacked_length": min(last * CHUNK_BYTES, len(data)) - first * CHUNK_BYTES,
            "range": span,
        }
        answer = {
            "offset_into_first_range": start - first * CHUNK_BYTES,
            "terms": [term],
            "fetch_info": {name: [where]},
        }
        self.answer(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def _content(self, stored: bytes) -> None:
        start, stop = byte_span(self.headers.get("Range"), len(stored))
        body = stored[start:stop]
        cut = self.storage.cuts.pop(0) if self.storage.cuts else len(body)
        self.storage.num_sent += len(body[:cut])
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(stored)}")
        self.end_headers()
        while self.storage.stalled.is_set():
            os.sched_yield()  # `time.sleep` does nothing in these tests
        self.wfile.write(body[:cut])
        self.close_connection = cut < len(body)


def byte_span(wanted: str | None, size: int) -> tuple[int, int]:
    """Start and stop of a `Range` header; all bytes without one."""
    if wanted is None:
        return 0, size
    first, last = wanted.removeprefix("bytes=").split("-")
    return int(first), min(size, int(last) + 1 if last else size)


def token_headers(storage: XetStorage) -> dict[str, str]:
    """What the Hub answers when the client asks for a token."""
    return {
        "X_Xet_Cas_Url": storage.url,
        "X_Xet_Access_Token": TOKEN,
        "X_Xet_Token_Expiration": str(int(time.time()) + 3600),
    }


@contextmanager
def running_xet() -> Iterator[XetStorage]:
    """Serve an empty storage."""
    storage = XetStorage()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"storage": storage}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    storage.url = f"http://127.0.0.1:{server.server_port}"
    yield storage
    server.shutdown()
    server.server_close()
