import json
from pathlib import Path

import pytest
import torch

from llama4_quant.python_text import PythonText, collect
from llama4_quant.sample import HELD_OUT_TEXT
from llama4_quant.sample.baselines import score
from llama4_quant.sample.held_out import MAX_HELD_OUT_BYTES, held_out_text

SOURCE = '''"""A module that is about bees and honey."""
import surely_not_installed
raise SystemExit("parsed, never run")

class Hive:
    """A hive of bees that makes some honey."""

    def swarm(self):
        """Leave the hive and look for another one."""
        def nested():
            """Functions in functions count too."""

def copy():
    """A hive of bees that makes some honey."""

def short():
    """Too short."""
'''


@pytest.fixture(scope="module")
def corpus() -> PythonText:
    return collect()


def test_collecting_parses_sources_without_running_them(tmp_path: Path) -> None:
    (tmp_path / "bees.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""A test suite is not documentation."""')
    found = collect(tmp_path)
    (bees,) = [d for d in (*found.train, *found.held_out) if d.name.startswith("module:")]
    assert [entry.name for entry in bees.entries] == ["bees", "bees.Hive", "bees.Hive.swarm", "bees.Hive.swarm.nested"]
    assert bees.text.startswith("bees\nA module that is about bees and honey.\n\nbees.Hive\nA hive")


def test_collecting_twice_gives_the_same() -> None:
    folder = Path(json.__file__).parent
    assert collect(folder) == collect(folder)


def test_held_out_text_is_not_trained_on(corpus: PythonText) -> None:
    train_names = {d.name for d in corpus.train}
    train_texts = {" ".join(e.text.split()) for d in corpus.train for e in d.entries}
    held_out_texts = {" ".join(e.text.split()) for d in corpus.held_out for e in d.entries}
    assert train_names.isdisjoint({d.name for d in corpus.held_out})
    assert train_texts.isdisjoint(held_out_texts)
    assert len(held_out_texts) > 100


def test_held_out_file_is_bounded_and_varied(corpus: PythonText) -> None:
    text = held_out_text(corpus.held_out)
    assert MAX_HELD_OUT_BYTES / 2 < len(text.encode()) <= MAX_HELD_OUT_BYTES
    shipped = HELD_OUT_TEXT.read_text(encoding="utf-8")
    assert len(shipped.encode()) <= MAX_HELD_OUT_BYTES
    # Twelve thousand characters are the most that one document contributes.
    assert len(shipped) > 8 * 12_000


def test_baselines_know_what_they_counted() -> None:
    train = torch.tensor([0, 1] * 500)
    windows_BL = torch.tensor([[0, 1, 0, 1, 0]])
    found = score(train, windows_BL, vocab_size=2)
    # Even counts: a coin. After 0 always 1, after 1 always 0: 0.95 of that and 0.05 of the coin is 0.975.
    assert found.unigram == pytest.approx(2.0, rel=1e-9)
    assert found.bigram == pytest.approx(1 / 0.975, rel=1e-9)
