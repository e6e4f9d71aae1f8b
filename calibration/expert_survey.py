"""Which samples to calibrate on so that every expert sees enough tokens: the original model is run first, and counts.

The calibration set is always used. While an expert of some layer has fewer tokens than asked for, further samples are
drawn from the corpus, a set as large as the first at a time, and of these the ones are kept, in order, that have tokens
for such an expert. At most MAX_FACTOR times the calibration set is looked at. What was chosen is written down: an
interrupted conversion goes on with the same samples.

Shape letters: E experts, L layers with experts, S samples, T tokens, k experts per token.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from llama4_quant.calibration.corpus import Corpus, Sample
from llama4_quant.calibration.embed import write_embeddings
from llama4_quant.calibration.routing import Routing
from llama4_quant.calibration.rows import RowFile
from llama4_quant.calibration.sequential import SequentialPass
from llama4_quant.calibration.source_weights import SourceWeights
from llama4_quant.calibration.streams import Sequences, Streams
from llama4_quant.checkpoint.files import os_errors, read_own, replace_durably
from llama4_quant.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.planning.plan import Plan

MAX_FACTOR = 4
_CHOICE_NAME = "samples.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which samples of a corpus are calibrated on.

    Attributes:
        numbers: of the samples, ascending, counted from the corpus' first.
        note: what became of the wish for tokens; "" without one.
    """

    numbers: tuple[int, ...]
    note: str = ""

    def samples(self, corpus: Corpus) -> Iterator[Sample]:
        """Draw them."""
        wanted = set(self.numbers)
        for number, sample in enumerate(islice(iter(corpus), self.numbers[-1] + 1)):
            if number in wanted:
                yield sample


class Survey:
    """Counts the tokens of experts in the original model, and chooses samples by that."""

    def __init__(
        self,
        plan: Plan,
        reader: CheckpointReader,
        folder: Path,
        *,
        device: torch.device,
        done: Callable[[str, int], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            plan: of the conversion.
            reader: the source.
            folder: for hidden states and the choice; what an interrupted run left there is used.
            device: where to compute.
            done: called with a weight's name, and 0, after each piece of work.
        """
        self._plan, self._reader, self._folder = plan, reader, folder
        self._device, self._done = device, done

    def choose(self, corpus: Corpus, num_wanted: int) -> tuple[Choice, bool]:
        """Choose samples.

        Args:
            corpus: the data.
            num_wanted: tokens that every expert is to see.

        Returns:
            The choice, and whether it was made now rather than found.
        """
        found = self._remembered()
        if found is not None:
            return found, False
        choice = self._choose(corpus, num_wanted)
        data = json.dumps(asdict(choice)).encode()
        with os_errors(f"{self._folder}: cannot be written", self._folder, len(data)):
            replace_durably(self._folder / _CHOICE_NAME, data)
        for folder in self._folder.glob("survey-*"):
            shutil.rmtree(folder)
        return choice, True

    def _remembered(self) -> Choice | None:
        try:
            content = parse_json(read_own(self._folder / _CHOICE_NAME, MAX_JSON_BYTES), _CHOICE_NAME)
            numbers, note = tuple(content["numbers"]), content["note"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_sound = numbers and all(type(number) is int for number in numbers) and sorted(set(numbers)) == list(numbers)
        return Choice(numbers=numbers, note=note) if is_sound and isinstance(note, str) else None

    def _choose(self, corpus: Corpus, num_wanted: int) -> Choice:
        size = corpus.description.num_samples
        seen_LE = self._count(corpus, 0, size).sum(dim=0)
        kept, looked_at = list(range(size)), size
        for start in range(size, MAX_FACTOR * size, size):
            if bool((seen_LE >= num_wanted).all()):
                break
            counts_SLE = self._count(corpus, start, start + size)
            for number, counts_LE in enumerate(counts_SLE, start):
                if bool(((seen_LE < num_wanted) & (counts_LE > 0)).any()):
                    kept.append(number)
                    seen_LE += counts_LE
            looked_at += len(counts_SLE)
            if len(counts_SLE) < size:
                break
        return Choice(numbers=tuple(kept), note=self._note(seen_LE, num_wanted, size, len(kept), looked_at))

    def _note(self, seen_LE: Tensor, num_wanted: int, size: int, num_kept: int, looked_at: int) -> str:
        """What was reached, in words."""
        did = f"{num_kept - size:,} of {looked_at - size:,} further samples were added to the {size:,} asked for"
        short = torch.nonzero(seen_LE < num_wanted).tolist()
        if not short:
            return f"Every expert has at least {num_wanted:,} tokens (--min-tokens-per-expert): {did}."
        layers = self._plan.config.text.moe_layers
        place = int(seen_LE.argmin())
        layer, expert = divmod(place, seen_LE.shape[1])
        why = (
            "the data ends there"
            if looked_at < MAX_FACTOR * size
            else f"at most {MAX_FACTOR} times as many are looked at"
        )
        return (
            f"{len(short):,} of {seen_LE.numel():,} experts have fewer than {num_wanted:,} tokens "
            f"(--min-tokens-per-expert), the least layer {layers[layer]} expert {expert} with "
            f"{int(seen_LE[layer, expert]):,}: {did}, and {why}."
        )

    def _count(self, corpus: Corpus, start: int, stop: int) -> Tensor:
        """Tokens [S, L, E] that samples `start` to `stop` send to experts; fewer samples if the data ends before."""
        lengths = tuple(len(sample.input_ids) for sample in corpus.samples(start, stop))
        text = self._plan.config.text
        shape = (len(lengths), len(text.moe_layers), text.num_local_experts)
        if not lengths or not text.moe_layers:
            return torch.zeros(shape, dtype=torch.int64)
        folder = self._folder / f"survey-{start}"
        with os_errors(f"{folder}: cannot be created"):
            folder.mkdir(exist_ok=True)
        counts = _Counts(folder, lengths, text.num_local_experts)
        passing = SequentialPass(
            self._plan.config,
            SourceWeights(self._plan, self._reader, self._device),
            folder,
            with_original=False,
            done=self._done,
            routed=counts.write,
        )

        def embed(streams: Streams) -> None:
            write_embeddings(streams, lambda: corpus.samples(start, stop), self._plan, self._reader, None)

        passing.run(Sequences(lengths=lengths), embed)
        counts.keep_nothing_else()
        return torch.stack([counts.read(layer) for layer in text.moe_layers], dim=1)


class _Counts:
    """Tokens of each sample for each expert, in a file for each layer, so that they survive an interruption."""

    def __init__(self, folder: Path, lengths: tuple[int, ...], num_experts: int) -> None:
        self._folder, self._lengths, self._num_experts = folder, lengths, num_experts

    def write(self, layer: int, routing: Routing) -> None:
        """Count and bring to the disk."""
        num_samples, num_experts = len(self._lengths), self._num_experts
        sample_T = torch.repeat_interleave(torch.arange(num_samples), torch.tensor(self._lengths))
        places_Tk = sample_T.unsqueeze(1) * num_experts + routing.quantized_experts.cpu()
        counts = torch.bincount(places_Tk.flatten(), minlength=num_samples * num_experts)
        with self._file(layer) as file:
            file.write(slice(0, num_samples), counts.view(num_samples, num_experts))
            file.sync()

    def read(self, layer: int) -> Tensor:
        """The counts [S, E] of a layer."""
        with self._file(layer) as file:
            return file.read(slice(0, len(self._lengths))).to(torch.int64)

    def keep_nothing_else(self) -> None:
        """Give back the disk that hidden states take; all layers are counted."""
        for path in self._folder.glob("*.rows"):
            if not path.name.startswith("counts-"):
                path.unlink()

    def _file(self, layer: int) -> RowFile:
        return RowFile(self._folder / f"counts-{layer}.rows", len(self._lengths), self._num_experts)
