"""Text that every CPython installation has: what the sample is trained on, and calibration without data of the user's.

It is split into documents that models are trained and calibrated on and documents that are held out from both, so that
a measurement on the held-out ones (the sample's held_out.txt) is on text that nothing has seen.

One document is one topic of `pydoc_data.topics`, or all docstrings of one module of the standard library. Sources are
parsed, never imported, so collecting runs no foreign code and needs no optional C library. The split hashes the
document's name: it does not change when other documents come or go with another Python version. The text is licensed
under the Python Software Foundation License.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics as pydoc_topics

_HELD_OUT_ONE_IN = 10
_MIN_CHARACTERS = 24
# Test suites and bundled tools are absent from many distributions; codec tables are near-copies of one another.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One docstring under its qualified name, or one topic."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What is kept together on one side of the split."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        """The entries, each under its name, separated by blank lines."""
        return "\n\n".join(f"{entry.name}\n{entry.text}" for entry in self.entries)

    @property
    def held_out(self) -> bool:
        """Whether this document is kept from training and calibration."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % _HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonText:
    """Both sides of the split, each in a fixed order."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def collect(stdlib: Path | None = None) -> PythonText:
    """Collect and split the text of the running Python.

    Args:
        stdlib: folder of the standard library; that of the running interpreter by default.

    Returns:
        The documents. A docstring that occurs twice is kept once, so no held-out text is also trained on.
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    documents = [*_topic_documents(), *_module_documents(folder)]
    # Held-out documents claim their docstrings first: a copy elsewhere must not leak into training.
    ordered = sorted(documents, key=lambda d: (not d.held_out, d.name))
    unique = list(_without_repeats(ordered))
    return PythonText(
        train=tuple(d for d in unique if not d.held_out),
        held_out=tuple(d for d in unique if d.held_out),
    )


def _without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        entries = []
        for entry in document.entries:
            key = " ".join(entry.text.split())
            if key not in seen:
                seen.add(key)
                entries.append(entry)
        if entries:
            yield Document(name=document.name, entries=tuple(entries))


def _topic_documents() -> Iterator[Document]:
    for name, text in sorted(pydoc_topics.topics.items()):
        yield Document(name=f"topic:{name}", entries=(Entry(name=name, text=_tidy(text)),))


def _module_documents(stdlib: Path) -> Iterator[Document]:
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith("config-"):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        entries = tuple(_docstrings(tree, module))
        if entries:
            yield Document(name=f"module:{module}", entries=entries)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Entry]:
    text = _tidy(ast.get_docstring(node) or "")
    if len(text) >= _MIN_CHARACTERS:
        yield Entry(name=name, text=text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.expandtabs().strip().splitlines())
