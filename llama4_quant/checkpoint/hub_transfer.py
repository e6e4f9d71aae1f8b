"""What the Hub's client lacks: a part of a file and no byte more, and a whole file whose download can be stopped."""

from threading import Event
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked as exported
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from llama4_quant.errors import CheckpointError


def read_part(url: str, start: int, num_bytes: int) -> bytes:
    """Bytes of a file on the Hub; no more than these are transferred or held, whatever the server sends.

    Raises:
        CheckpointError: the server does not serve parts of files.
        Exception: whatever the client raises.
    """
    wanted = {"Range": f"bytes={start}-{start + num_bytes - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with http_stream_backoff(
        "GET",
        url,
        headers=build_hf_headers(headers=wanted),
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # it cannot retry what fails inside this block
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and start > 0:
            raise CheckpointError(f"{url}: expected a server that serves parts of files, and it does not; is it a Hub?")
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= num_bytes:
                return bytes(data[:num_bytes])
    raise ConnectionError(f"expected {num_bytes:,} bytes, and {len(data):,} arrived")


def silent_bar(stop: Event) -> type[Any]:
    """A progress bar for the client that shows nothing and, as it is called for every chunk, ends what must stop."""

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise CheckpointError("the download was stopped; run the command again, it resumes")
            super().update(n)

    return SilentBar
