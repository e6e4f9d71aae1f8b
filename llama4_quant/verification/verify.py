"""Is a converted checkpoint whole? Every byte, every header, every code; and with the source, how far every weight is.

Four questions, each only as deep as the ones before allow:

- bytes: the SHA-256 ranges of manifest.json tile every file, so one flipped bit is found, and placed;
- structure: headers, index, config.json and the tensors agree, as for loading;
- values: codes and scales decode to finite numbers;
- the source, if given: kept weights are equal to it, and quantized ones as far from it as the report says; both up to
  the powers of two that calibration has moved between weights, which are computed again.
"""

from pathlib import Path

from llama4_quant.checkpoint.source import open_source
from llama4_quant.errors import Llama4QuantError
from llama4_quant.stream import Progress
from llama4_quant.verification.files import check_files, listed_files
from llama4_quant.verification.findings import Problem, Verification, WeightDistance, broken_promise
from llama4_quant.verification.hugging_face import HuggingFaceOutput
from llama4_quant.verification.meta import MetaOutput
from llama4_quant.verification.promises import promised_errors


def verify(
    output: str | Path,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint that `convert` wrote.

    Args:
        output: its folder.
        source: the BF16 checkpoint (a folder, or a Hub id) that it was made from; adds the distance of every weight.
        revision: branch, tag or commit of a Hub id.
        progress: called with what is checked and the bytes done more than before.

    Returns:
        All problems found; damage is data here, not an exception.

    Raises:
        CheckpointError: `output` is not a folder with a manifest, or the source cannot be used.
    """
    folder = Path(output)
    files = listed_files(folder)
    problems = [*check_files(folder, files, progress)]
    is_meta = any(file.name.endswith(".pth") for file in files)
    num_weights = 0
    distances: list[WeightDistance] = []
    try:
        with (MetaOutput if is_meta else HuggingFaceOutput).open(folder) as found:
            num_weights = found.num_weights
            problems += found.check_values()
            if source is not None:
                with open_source(str(source), revision) as original:
                    distances, wrong = found.compare(original, progress)
                promised = promised_errors(folder)
                problems += [*wrong, *filter(None, (broken_promise(weight, promised) for weight in distances))]
    except Llama4QuantError as error:
        problems.append(Problem(where=str(folder), what=str(error)))
    return Verification(
        output=str(output),
        source=None if source is None else str(source),
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        num_weights=num_weights,
        problems=tuple(problems),
        distances=tuple(distances),
    )
