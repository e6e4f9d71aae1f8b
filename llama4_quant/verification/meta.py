"""Verifying a checkpoint in Meta's layout (`--format meta-fp8`): the tensors of every rank, and against the source.

The plan of a conversion says which tensors each file holds; for an output it is made again, from params.json and the
sizes that only the tensors tell. So structure is one comparison, and what the source should have become is found as
the conversion found it, except that nothing is quantized again.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import torch

from llama4_quant.checkpoint.header import DTYPE_NAMES, TensorEntry
from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.meta import check_finished
from llama4_quant.checkpoint.meta_params import Params, Widths
from llama4_quant.checkpoint.paths import PARAMS_NAME, locate
from llama4_quant.checkpoint.pickles import read_contents
from llama4_quant.checkpoint.reader import CheckpointReader, open_file
from llama4_quant.checkpoint.state_dicts import tensor_name
from llama4_quant.config import Llama4Config
from llama4_quant.errors import CheckpointError, some_tensors
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.error import WeightError, measure
from llama4_quant.quantizers.quantize import QuantizedWeight
from llama4_quant.scheme import preset
from llama4_quant.stream import Piece, Progress, encode_kept, read_pieces, split_piece
from llama4_quant.verification.findings import Problem, WeightDistance, distance, is_finite

CHUNK_BYTES = 64 * 2**20
"""What is read at a time of a tensor whose values are checked."""

_FILE = re.compile(r"consolidated\.\d\d+\.pth|fp8_scales_\d+\.pt")
_SCHEME = preset("FP8_DYNAMIC")
"""How the scales were chosen does not show in an output."""


class MetaOutput:
    """An open output.

    Attributes:
        plan: what it is.
    """

    def __init__(self, plan: Plan, files: CheckpointReader) -> None:
        """Args: files: its tensors by their names in the plan."""
        self.plan = plan
        self._files = files

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        """Open the files of all ranks and check that they hold exactly the tensors of a model.

        Raises:
            CheckpointError: files are missing or damaged, or tensors are not those that params.json asks for.
            ConfigError: params.json is not usable.
        """
        check_finished(folder)
        where = locate(folder, PARAMS_NAME)
        params = Params(read_json(where), str(where))
        with ExitStack() as files:
            tensors, descriptors = _open_tensors(folder, files)
            num_ranks = sum(path.suffix == ".pth" for path in descriptors)
            config = Llama4Config.from_dict(params.config(_widths(tensors, num_ranks)))
            plan = make_plan(config, _SCHEME, None, CheckpointFormat.META_FP8, num_ranks)
            _check_tensors(plan, tensors)
            yield cls(
                plan,
                CheckpointReader(path=folder, config={}, tensors=tensors, descriptors=descriptors, files=files),
            )

    @property
    def num_weights(self) -> int:
        """Weights of the model."""
        return len(self.plan.decisions)

    def check_values(self) -> Iterator[Problem]:
        """NaN and Inf are problems in codes, scales and unquantized values alike; so are scales below zero."""
        for output in self.plan.outputs:
            num_rows = output.shape[0]
            step = max(1, CHUNK_BYTES // output.row_nbytes)
            for start in range(0, num_rows, step):
                rows = self._files.read_rows(output.name, start, min(num_rows, start + step))
                if not is_finite(rows):
                    yield Problem(where=output.name, what="holds NaN or Inf")
                    break
                if output.dtype is torch.float32 and bool((rows < 0).any()):
                    yield Problem(where=output.name, what="holds scales below zero")
                    break

    def compare(
        self, source: CheckpointReader, progress: Progress | None
    ) -> tuple[list[WeightDistance], list[Problem]]:
        """Kept weights must equal the source; of quantized ones the distances.

        Raises:
            CheckpointError: the source is another model.
        """
        problems: list[Problem] = []
        sums: dict[str, WeightError] = {}
        config = Llama4Config.from_dict(source.config)
        num_ranks = self.plan.model_parallel
        plan = make_plan(config, _SCHEME, source.tensors, CheckpointFormat.META_FP8, num_ranks)
        if plan.outputs != self.plan.outputs:
            raise CheckpointError(f"{source.path}: not the model that the output was made of: other tensors or shapes")
        for piece in (piece for tensor in plan.tensors for piece in read_pieces(source, tensor)):
            for part in split_piece(piece):
                if part.decision.scheme is not None:
                    error = measure(part.values, self._stored(part))
                    name = part.decision.name
                    sums[name] = error.merge(sums[name]) if name in sums else error
                elif not self._is_kept(part):
                    what = f"rank {part.rank}: differs from the source, but was to be kept"
                    problems.append(Problem(where=part.decision.name, what=what))
            if progress is not None:
                progress(piece.decision.name, piece.num_bytes)
        distances = [distance(name, _SCHEME.weights, error) for name, error in sums.items()]
        return distances, problems

    def _stored(self, part: Piece) -> QuantizedWeight:
        """What is stored of a rank's part of an expert."""
        spread, linear = part.decision.spread, part.decision.linear
        assert spread is not None
        assert linear is not None
        assert linear.expert is not None
        assert part.rank is not None
        outputs, inputs = part.values.shape
        codes_IO = self._files.read_rows(
            spread.weights(part.rank), linear.expert * inputs, (linear.expert + 1) * inputs
        )
        scale_1O = self._files.read_rows(spread.scales(part.rank), linear.expert, linear.expert + 1)
        return QuantizedWeight(codes=codes_IO.T, scale=scale_1O.view(outputs, 1), scheme=_SCHEME.weights)

    def _is_kept(self, part: Piece) -> bool:
        expected = encode_kept(part)
        found = self._files.read_rows(expected.name, expected.row_start, expected.row_start + len(expected.values))
        return torch.equal(expected.values.view(torch.int16), found.view(torch.int16))


def _paths(folder: Path) -> list[Path]:
    return [locate(folder, name) for name in sorted(path.name for path in folder.iterdir()) if _FILE.fullmatch(name)]


def _open_tensors(folder: Path, stack: ExitStack) -> tuple[dict[str, TensorEntry], dict[Path, int]]:
    """Every tensor under the name that a plan gives it, and the open files."""
    tensors: dict[str, TensorEntry] = {}
    descriptors = {path: open_file(path, stack) for path in _paths(folder)}
    for path, descriptor in descriptors.items():
        for key, stored in read_contents(descriptor, path).items():
            name = tensor_name(path.name, key)
            tensors[name] = TensorEntry(
                name=name,
                dtype=DTYPE_NAMES[stored.dtype],
                shape=stored.shape,
                path=path,
                start=stored.start,
                nbytes=stored.nbytes,
            )
    return tensors, descriptors


def _widths(tensors: Mapping[str, TensorEntry], num_ranks: int) -> Widths:
    """Sizes of the whole model that only the tensors tell."""

    def size(suffix: str, dim: int) -> int | None:
        shapes = [entry.shape for name, entry in tensors.items() if name.endswith(suffix)]
        return shapes[0][dim] * num_ranks if shapes and dim < len(shapes[0]) else None

    return Widths(
        vocab_size=size("/tok_embeddings.weight", 0),
        intermediate_size=size(".feed_forward.experts.moe_w_in_eD_F", 1),
        intermediate_size_mlp=size(".feed_forward.w1.weight", 0),
    )


def _check_tensors(plan: Plan, found: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError unless the files hold exactly the tensors of the plan."""
    expected = {output.name: output for output in plan.outputs}
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{some_tensors(missing)} missing, but part of the model in {PARAMS_NAME}")
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise CheckpointError(f"{some_tensors(unknown)} not part of the model in {PARAMS_NAME}")
    for name, output in expected.items():
        entry = found[name]
        if (entry.torch_dtype, entry.shape) != (output.dtype, output.shape):
            raise CheckpointError(
                f"{name}: expected {DTYPE_NAMES[output.dtype]} {list(output.shape)} of the model in {PARAMS_NAME}, "
                f"found {entry.dtype} {list(entry.shape)}"
            )
