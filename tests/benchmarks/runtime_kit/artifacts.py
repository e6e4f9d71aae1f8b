"""Files of the rows, made when a row needs them and deleted when no later one does."""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4_quant import convert, preset

from .contenders import SCHEMES, Contender, Files

Run = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Runs a worker of this kit in an environment with llama.cpp."""


def needs(contender: Contender) -> frozenset[Files]:
    """What has to be on disk for a row; llama.cpp's quantizer starts from a BF16 file."""
    also = {Files.GGUF_BF16} if contender.files.is_gguf else set()
    return frozenset({Files.SOURCE, contender.files, *also})


@dataclass
class Workshop:
    """Makes and deletes files.

    Attributes:
        folder: where they lie; `source` in it is the BF16 checkpoint.
        run: for GGUF files.
    """

    folder: Path
    run: Run
    _tensors: dict[Files, dict[str, int]] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The BF16 checkpoint."""
        return self.folder / "source"

    def path(self, files: Files) -> Path:
        """Where files are, or will be."""
        if files is Files.SOURCE:
            return self.source
        return self.folder / (f"{files}.gguf" if files.is_gguf else files)

    def make(self, files: Files) -> Path:
        """Files that are there now."""
        path = self.path(files)
        if files.is_gguf:
            self.tensors(files)
        elif not path.exists():
            name, roles = SCHEMES[files]
            convert(self.source, path, scheme=preset(name, observer="absmax", quantize=roles))
        return path

    def tensors(self, files: Files) -> dict[str, int]:
        """Bytes of the tensors of a GGUF file, by name; makes it first."""
        if files not in self._tensors:
            base = self.source if files is Files.GGUF_BF16 else self.make(Files.GGUF_BF16)
            job = {"source": str(base), "output": str(self.path(files)), "type": files}
            self._tensors[files] = self.run("worker_gguf", job)["tensors"]
        return self._tensors[files]

    def drop_all_but(self, kept: Collection[Files]) -> None:
        """Delete what no row needs any more; never the source."""
        for files in set(Files) - set(kept) - {Files.SOURCE}:
            path = self.path(files)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
