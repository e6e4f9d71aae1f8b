"""How large a model may be: config.json is untrusted, and time and memory of a plan grow with what it says.

Every limit is several times what the largest Llama 4 has. Sizes are counted without listing weights, so a model of
absurd size is refused before anything is built for it.
"""

from llama4_quant.config_sections import TextConfig, VisionConfig
from llama4_quant.errors import ConfigError

MAX_LAYERS = 1024
MAX_EXPERTS = 16384
"""Of all layers together; Maverick has 3,072."""
MAX_WIDTH = 2**20
"""Of any layer; Maverick's widest has 16,384."""
MAX_VOCABULARY = 2**24
MAX_SIDE = 2**14
"""Of an image tile, in pixels; Llama 4's have 336."""
MAX_PARAMETERS = 2**43
"""Of each tower, 17.6 TB in BF16; Maverick has 4 * 10^11. It bounds the number of work items of a plan."""


def check_parameters(number: int, where: str) -> None:
    """Raise ConfigError for a model of absurd size."""
    if number > MAX_PARAMETERS:
        raise ConfigError(f"{where}: sizes of a model of {number:,} weights; expected at most {MAX_PARAMETERS:,}")


def num_text_parameters(text: TextConfig) -> int:
    """Of all matrices; norms and biases are nothing beside them."""
    num_moe = len(text.moe_layers)
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    moe = (text.num_local_experts + 1) * 3 * text.intermediate_size + text.num_local_experts
    dense = 3 * text.intermediate_size_mlp
    layers = text.num_hidden_layers * heads + num_moe * moe + (text.num_hidden_layers - num_moe) * dense
    return text.hidden_size * (2 * text.vocab_size + layers)


def num_vision_parameters(vision: VisionConfig) -> int:
    """Of all matrices, patch embedding and positions included."""
    hidden, intermediate, output = vision.hidden_size, vision.intermediate_size, vision.projector_output_dim
    patches = hidden * (vision.num_patches + vision.num_channels * vision.patch_size**2)
    layers = vision.num_hidden_layers * (4 * hidden**2 + 2 * hidden * intermediate)
    return patches + layers + vision.projector_input_dim * intermediate + output**2
