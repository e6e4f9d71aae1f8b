"""The decoder: embeddings in, hidden states out.

Pre-norm layers of attention and feed-forward; a feed-forward is a mixture of experts in `moe_layers` and a dense
SwiGLU elsewhere. Module names are those of Hugging Face checkpoints.

Shape letters: B batch, H hidden, T new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama4_quant.config import TextConfig
from llama4_quant.ops import native_elementwise
from llama4_quant.ops.native_tape import Tape
from llama4_quant.runtime import flex
from llama4_quant.runtime.attention import Attention, RecordedStep, Step, TextAttention, Visible, query_temperature
from llama4_quant.runtime.cache import KVCache, LayerCache
from llama4_quant.runtime.cache_formats import LayerFormat
from llama4_quant.runtime.elementwise import RMSNorm
from llama4_quant.runtime.experts import MLP, MixtureOfExperts
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.rope import TextRotary
from llama4_quant.runtime.token_step import TokenStep
from llama4_quant.runtime.visibility import plan_segments


class Embedding(nn.Module):
    """A table of V rows."""

    def __init__(self, builder: Builder, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = builder.parameter(num_rows, size)

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids [...] -> [..., H]."""
        return functional.embedding(ids, self.weight)


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: TextConfig, layer: int, builder: Builder, attention: Attention) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(builder, hidden, eps)
        self.self_attn = TextAttention(config, layer, builder.child("self_attn"), attention)
        self.post_attention_layernorm = RMSNorm(builder, hidden, eps)
        feed_forward = builder.child("feed_forward")
        self.feed_forward: nn.Module = (
            MixtureOfExperts(config, feed_forward)
            if layer in config.moe_layers
            else MLP(feed_forward, hidden, config.intermediate_size_mlp)
        )

    def forward(self, x_BTH: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), step, cache)
        y_BTH: Tensor = x_BTH + self.feed_forward(self.post_attention_layernorm(x_BTH))
        return y_BTH

    def record(self, tape: Tape, x_1H: Tensor, recorded: RecordedStep, cache: LayerFormat) -> None:
        """`forward` of one token on a tape: changes x.

        Raises:
            NotRecordableError: a part runs in torch.
        """
        attended_1H = self.self_attn.record(tape, self.input_layernorm.record(tape, x_1H), recorded, cache)
        native_elementwise.record_add(tape, x_1H, attended_1H)
        assert isinstance(self.feed_forward, MixtureOfExperts | MLP)
        y_1H = self.feed_forward.record(tape, self.post_attention_layernorm.record(tape, x_1H))
        native_elementwise.record_add(tape, x_1H, y_1H)


class TextModel(nn.Module):
    """Embedding table, decoder layers, last norm."""

    def __init__(self, config: TextConfig, builder: Builder, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.embed_tokens = Embedding(builder, config.vocab_size, config.hidden_size)
        layers = builder.child("layers")
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, layers.child(str(layer)), attention)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(builder, config.hidden_size, config.rms_norm_eps)
        self.rotary = TextRotary(config)
        self._token_step = TokenStep()

    def forward(self, x_BTH: Tensor, padding: Sequence[int], cache: KVCache | None) -> Tensor:
        """Run the layers over T new tokens.

        Args:
            x_BTH: their embeddings.
            padding: each row's columns of padding on the left, cached ones included.
            cache: earlier tokens, or None to compute a whole sequence. The layers store into it; the caller advances.

        Returns:
            Normalized hidden states [B, T, H].
        """
        if cache is not None and not torch.compiler.is_compiling():
            y = self._token_step.run(self, x_BTH, padding, cache)
            if y is not None:
                return y
        past = 0 if cache is None else cache.length
        step = make_step(
            self.config,
            self.rotary,
            new=x_BTH.shape[1],
            past=past,
            padding=padding,
            device=x_BTH.device,
            attention=self.attention,
        )
        for index, layer in enumerate(self.layers):
            x_BTH = layer(x_BTH, step, None if cache is None else cache.layers[index])
        y_BTH: Tensor = self.norm(x_BTH)
        return y_BTH

    def record(self, tape: Tape, x_1H: Tensor, recorded: RecordedStep, formats: Sequence[LayerFormat]) -> Tensor:
        """`forward` of one token on a tape, with a cache whose layers have these formats; changes x.

        Raises:
            NotRecordableError: a part runs in torch.
        """
        for layer, layer_format in zip(self.layers, formats, strict=True):
            assert isinstance(layer, DecoderLayer)
            tape.reuse_buffers()
            layer.record(tape, x_1H, recorded, layer_format)
        return self.norm.record(tape, x_1H)


def make_step(
    config: TextConfig,
    rotary: TextRotary,
    *,
    new: int,
    past: int,
    padding: Sequence[int],
    device: torch.device,
    attention: Attention = Attention.SDPA,
) -> Step:
    """What the layers of one forward pass share, for `new` columns after `past` ones."""
    columns = torch.arange(past, past + new, device=device)
    positions_BT = columns - torch.tensor(padding, device=device).unsqueeze(1)
    # Padding has no position; 0 is as good as any and keeps the logarithm below defined.
    positions_BT = positions_BT.clamp(min=0)
    temperature = None
    if config.attn_temperature_tuning:
        temperature = query_temperature(positions_BT, config.floor_scale, config.attn_scale)

    def plan(chunk_size: int | None) -> Visible:
        make = flex.plan if attention is Attention.FLEX else plan_segments
        return make(padding, past, new, chunk_size, device)

    full = plan(None)
    longest = past + new - min(padding)
    is_chunked = config.attention_chunk_size is not None and longest > config.attention_chunk_size
    return Step(
        past=past,
        rotation=rotary(positions_BT),
        temperature=temperature,
        chunked=plan(config.attention_chunk_size) if is_chunked else full,
        full=full,
    )
