"""What a calibration holds in memory at its worst moment, known before it starts.

Everything but the weights of one input, their sums and the solver's copies is bounded by constants: hidden states are
in files and pass in chunks.

Shape letters: H residual width, K in, N out.
"""

from collections.abc import Iterator
from dataclasses import replace

from llama4_quant.architecture import Role
from llama4_quant.calibration.final_gradient import HEAD_ELEMENTS
from llama4_quant.calibration.settings import Calibration, SolverSettings
from llama4_quant.calibration.solve import ROW_ELEMENTS
from llama4_quant.calibration.weights import VISION_ROLES
from llama4_quant.config import TextConfig
from llama4_quant.errors import UsageError
from llama4_quant.planning.plan import Plan
from llama4_quant.work import BASE_BYTES, BYTES_PER_DECISION, MemoryUse, tensor_items

_CHUNK_BYTES = 16 * 2**20
_CHUNKS = 24
"""Chunks of activations that are alive at the same time, at most: inputs of both models, and what is made of them."""
_SQUARES = 6
"""K x K matrices beside the sums: ordered, damped, factor, inverse, and what LAPACK copies."""
_ROW_BUFFERS = 8
"""Copies of the rows in hand in the solver."""
_SLACK = 256 * 2**20
"""Threads, their buffers for packed operands, and what the allocator keeps."""


def with_calibration(memory: MemoryUse, plan: Plan, settings: Calibration) -> MemoryUse:
    """Memory of a conversion that calibrates too.

    Args:
        memory: of its data-free part.
        plan: of the conversion.
        settings: of the calibration.

    Raises:
        UsageError: the calibration does not fit; the message names the smallest size that does.
    """
    needed = calibration_bytes(plan, settings.solver, settings.corpus.max_seq_length)
    if settings.target_bits is not None:
        needed = max(needed, survey_bytes(plan, settings.corpus.max_seq_length))
    if needed > memory.limit:
        raise UsageError(
            f"--max-memory {memory.limit:,} bytes is too little to calibrate: one expert with its Hessian needs "
            f"{needed:,}; give --max-memory {-(-needed // 2**20)}MiB or more, a shorter --max-seq-length, or "
            "--algorithm rtn"
        )
    return replace(
        memory,
        predicted=max(memory.predicted, needed),
        smallest=max(memory.smallest, -(-needed // 2**20) * 2**20),
    )


def calibration_bytes(plan: Plan, settings: SolverSettings, longest: int) -> int:
    """The most that the calibration of a plan holds, in bytes over what the interpreter holds anyway."""
    text = plan.config.text
    base = BASE_BYTES + _SLACK + BYTES_PER_DECISION * len(plan.decisions)
    activations = max(_CHUNKS * _CHUNK_BYTES, 12 * 4 * longest * _widest(text))
    stages = [*_stages(text), *_head_stages(plan), *_vision_stages(plan)]
    return base + activations + max(_vision_bytes(plan), *(_stage_bytes(settings, *stage) for stage in stages))


def _vision_bytes(plan: Plan) -> int:
    """The vision tower in BF16, which is there while image features are made, and one of its weights on the way in."""
    sizes = [d.num_weights for d in plan.decisions if d.name.startswith(("vision_model.", "multi_modal_projector."))]
    return 2 * sum(sizes) + 6 * max(sizes, default=0)


def survey_bytes(plan: Plan, longest: int) -> int:
    """The most that a survey holds: an expert's three weights, the Gram matrices of both its inputs, gradients, ...

    ... the factor of one Gram matrix with its copies, and a weight's rounding; or a part of the head with its logits.
    """
    text = plan.config.text
    hidden, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    base = BASE_BYTES + _SLACK + BYTES_PER_DECISION * len(plan.decisions)
    activations = max(_CHUNKS * _CHUNK_BYTES, 24 * 4 * longest * _widest(text))  # autograd keeps what it needs
    blocks = [(heads, 2 * heads + 2 * keys)]
    blocks += [(width, 3 * width) for width in (text.intermediate_size, text.intermediate_size_mlp)]
    largest = max(
        hidden**2 + inner**2 + _SQUARES * max(hidden, inner) ** 2 + hidden * (total + 6 * max(inner, heads))
        for inner, total in blocks
    )
    head = 3 * min(text.vocab_size * hidden, HEAD_ELEMENTS)
    return base + activations + 4 * max(largest, head)


def _stages(text: TextConfig) -> Iterator[tuple[int, int, int, int, int]]:
    """(K, N of all weights with that input, N of the largest, H if it writes to the residual, other weights held)."""
    hidden, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    yield hidden, heads + 2 * keys, heads, 0, 0
    yield heads, hidden, hidden, hidden, 0
    widths = {text.intermediate_size} if text.moe_layers else set()
    if len(text.moe_layers) < text.num_hidden_layers:
        widths.add(text.intermediate_size_mlp)
    for width in sorted(widths):
        # An expert's gate and up as they are read are one tensor of the source's floats, held until both are solved.
        yield hidden, 2 * width, width, 0, width * hidden
        yield width, hidden, hidden, hidden, 2 * width * hidden


def _head_stages(plan: Plan) -> Iterator[tuple[int, int, int, int, int]]:
    """lm_head, which is solved a work item's rows at a time."""
    for index, tensor in enumerate(plan.tensors):
        if tensor.spec.role is Role.LM_HEAD and tensor.decisions[0].scheme is not None:
            rows = max(item.stop - item.start for item in tensor_items(tensor, index))
            yield tensor.spec.shape[1], rows, rows, 0, 0


def _vision_stages(plan: Plan) -> Iterator[tuple[int, int, int, int, int]]:
    """The vision tower, its adapter and the projector, as if all their weights were quantized."""
    vision = plan.config.vision
    if vision is None or not any(d.scheme is not None and d.role in VISION_ROLES for d in plan.decisions):
        return
    hidden, inner = vision.hidden_size, vision.intermediate_size
    first, second = vision.projector_input_dim, vision.projector_output_dim
    yield hidden, 3 * hidden, hidden, 0, 0
    yield hidden, hidden, hidden, hidden, 0
    yield hidden, inner, inner, 0, 0
    yield inner, hidden, hidden, hidden, 0
    yield inner, first, first, 0, 0
    yield first, second, second, 0, 0
    yield second, plan.config.text.hidden_size, plan.config.text.hidden_size, 0, 0


def _stage_bytes(
    settings: SolverSettings, num_inputs: int, num_outputs: int, largest: int, residual: int, others: int
) -> int:
    sums = num_inputs**2 * (2 if settings.correct else 1) + (residual * num_inputs if settings.correct else 0)
    squares = _SQUARES * num_inputs**2
    pairs = 2 * (num_outputs * num_inputs + others)
    one = 5 * largest * num_inputs  # corrected weight, its drift, codes, the rounded one, and differences
    rows = _ROW_BUFFERS * min(largest * num_inputs, ROW_ELEMENTS)
    return 4 * (sums + squares + pairs + one + rows)


def _widest(text: TextConfig) -> int:
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    return max(text.hidden_size, heads)
