"""Is the source what a plan can start from: not quantized, and exactly the tensors of the model?"""

from collections.abc import Mapping, Sequence

from llama4_quant.architecture import Llama4Config, TensorSpec
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.reader import TensorEntry
from llama4_quant.errors import CheckpointError, some_tensors

SOURCE_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
"""Dtypes a source weight may have, with bytes per element."""


def check_not_quantized(config: Llama4Config) -> None:
    """Raise CheckpointError if config.json says that the source is quantized already."""
    found = config.quantization
    if found:
        method = shown(found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown")
        raise CheckpointError(
            f"the source is already quantized (config.json: quantization_config, quant_method {method}); "
            "convert from the BF16 checkpoint instead"
        )


def check_entries(specs: Sequence[TensorSpec], entries: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError unless the source's headers hold exactly the model's tensors in float dtypes."""
    expected = {spec.name: spec for spec in specs}
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(f"{some_tensors(missing)} missing from the checkpoint, but part of config.json's model")
    unknown = [name for name in entries if name not in expected]
    if unknown:
        raise CheckpointError(f"{some_tensors(unknown)} in the checkpoint, but not part of the model in config.json")
    for name, spec in expected.items():
        entry = entries[name]
        if tuple(entry.shape) != spec.shape:
            raise CheckpointError(
                f"{name}: shape {list(entry.shape)} in {entry.path.name}, but config.json asks for {list(spec.shape)}"
            )
        if entry.dtype not in SOURCE_DTYPES:
            raise CheckpointError(
                f"{name}: dtype {entry.dtype} in {entry.path.name}, expected {', '.join(SOURCE_DTYPES)}; "
                "is the source quantized already?"
            )
