"""The whole model: text, and images if the checkpoint has a vision tower.

How a loader fills it (nothing is ever held twice)::

    model = Llama4Model(config, scheme_of=plan.scheme_of)   # on meta: shapes only
    model.materialize(torch.device("cpu"))                  # uninitialized storage
    for spec in linear_specs(config):                       # every linear weight, experts one by one
        for suffix, target in model.linear_target(spec).items():
            target.copy_(...)                               # "<spec.name>.<suffix>" of the checkpoint, as stored
    for name, target in model.plain_targets().items():      # norms, embeddings, biases, by checkpoint name
        target.copy_(...)
    model.repack()                                          # for kernels that want another order of bytes

`linear_target` gives `{"weight": [N, K]}` for an unquantized or `{"weight_packed": ..., "weight_scale": ...}` for an
int4 weight; for a routed expert these are views into the layer's stack. The two together cover every stored tensor of
the model once.

Shape letters: B batch, H hidden, T new tokens, V vocabulary.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama4_quant import ops
from llama4_quant.architecture import LinearSpec, Llama4Config
from llama4_quant.errors import UsageError
from llama4_quant.runtime.attention import Attention, TextAttention
from llama4_quant.runtime.cache import KVCache
from llama4_quant.runtime.cache_formats import CacheDtype, CacheScales
from llama4_quant.runtime.elementwise import Elementwise
from llama4_quant.runtime.expert_store import ExpertStore
from llama4_quant.runtime.experts import MixtureOfExperts
from llama4_quant.runtime.linear import Builder, WeightStorage
from llama4_quant.runtime.offload import OffloadedExperts
from llama4_quant.runtime.text import DecoderLayer, TextModel
from llama4_quant.runtime.vision import Projector, VisionModel
from llama4_quant.scheme import SchemeLookup, WeightScheme


class Logits(StrEnum):
    """Of which positions `Llama4Model.forward` gives logits."""

    ALL = "all"
    LAST = "last"
    """Of the last column only: what generation needs."""


def _unquantized(_name: str) -> None:
    return None


class Llama4Model(nn.Module):
    """A Llama 4 for inference.

    Attributes:
        config: what the model was built from.
        dtype: compute dtype. Changing it later with `.to(dtype)` would also cast scales; build another model instead.
        expert_store: where offloaded experts are; None where they are in memory.
    """

    def __init__(
        self,
        config: Llama4Config,
        *,
        scheme_of: SchemeLookup = _unquantized,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
        attention: Attention | str = Attention.SDPA,
        kernel: ops.Kernel | str = ops.Kernel.AUTO,
        lm_head: WeightScheme | None = None,
        offload_experts: bool = False,
    ) -> None:
        """Allocate uninitialized storage.

        Args:
            config: the model.
            scheme_of: how each linear weight is stored, by `LinearSpec.name`; None for an unquantized one.
            dtype: compute dtype and dtype of unquantized weights.
            device: where to allocate; on meta, call `materialize` before filling.
            attention: `sdpa`, `eager` or `flex`.
            kernel: what runs the weights: a backend, or `auto` for the first that can, weight by weight.
            lm_head: store the head like this, whatever `scheme_of` says; one that is tied to the embeddings gets
                storage of its own.
            offload_experts: routed experts get no storage; `attach_experts` says where they are.

        Raises:
            SchemeError: a scheme does not fit a weight, or experts of one layer differ in theirs.
            UsageError: `kernel` is unknown, or cannot run a weight.
        """
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.expert_store: ExpertStore | None = None
        chosen = ops.Kernel.parse(kernel)
        builder = Builder(
            dtype=dtype,
            device=torch.device(device),
            scheme_of=scheme_of,
            kernel=chosen,
            offload_experts=offload_experts,
        )
        text_builder = builder.child(config.prefix.removesuffix(".")) if config.prefix else builder
        text = config.text
        self.model = TextModel(text, text_builder.child("model"), Attention(attention))
        head_builder = text_builder if lm_head is None else replace(text_builder, scheme_of=lambda _name: lm_head)
        self.lm_head = (
            None
            if text.tie_word_embeddings and lm_head is None
            else head_builder.linear("lm_head", text.vocab_size, text.hidden_size)
        )
        if config.vision is not None:
            self.vision_model = VisionModel(config.vision, builder.child("vision_model"))
            projector = builder.child("multi_modal_projector")
            self.multi_modal_projector = Projector(config.vision, text.hidden_size, projector)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    def materialize(self, device: torch.device | str) -> Self:
        """Give meta parameters uninitialized storage on `device`, and move there what already has content."""
        materialize(self, device)
        return self

    def repack(self) -> None:
        """Once every weight is filled: put weights in the order that their kernels want."""
        for weight in self._weights():
            weight.repack()

    def kernels(self, device: torch.device | str | None = None) -> tuple[ops.KernelCount, ...]:
        """Which backend runs how many weights, by operator, and why none that comes first in the table.

        Args:
            device: where the model is to be, if it is not there; nothing is moved.

        Raises:
            UsageError: the kernel asked for cannot run a weight there.
        """
        place = self.device if device is None else torch.device(device)
        choices = [weight.choice_for(place) for weight in self._weights()]
        offloaded = (module for module in self.modules() if isinstance(module, OffloadedExperts))
        return ops.count_kernels([*choices, *(choice for m in offloaded for choice in m.choices_for(place).values())])

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """For `copy` and `pickle`.

        Raises:
            UsageError: experts are offloaded.
        """
        if self.expert_store is not None:
            raise UsageError(
                "a model with offloaded experts holds open files and cannot be copied or pickled; where you need "
                'another, load it once more: load(..., offload="experts")'
            )
        return super().__reduce_ex__(protocol)

    def attach_experts(self, store: ExpertStore) -> None:
        """Say where offloaded experts are; the store is closed with the model."""
        moe = [
            (number, layer.feed_forward)
            for number, layer in enumerate(self.model.layers)
            if isinstance(layer, DecoderLayer) and isinstance(layer.feed_forward, MixtureOfExperts)
        ]
        following = [(number, feed_forward.router) for number, feed_forward in moe[1:]]
        for (number, feed_forward), after in zip(moe, [*following, None], strict=True):
            assert isinstance(feed_forward.experts, OffloadedExperts)
            feed_forward.experts.attach(store, number, after)
        self.expert_store = store
        weakref.finalize(self, store.close)

    def _weights(self) -> Iterator[WeightStorage]:
        return (module for module in self.modules() if isinstance(module, WeightStorage))

    def linear_target(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Where the stored tensors of a linear weight go.

        Returns:
            Final storage by the tensor's suffix in a checkpoint (`weight`, `weight_packed`, `weight_scale`), each
            [N, ...]; write with `copy_`.
        """
        path = spec.name.removeprefix(self.config.prefix)
        if spec.expert is not None:
            experts, _, projection = path.rpartition(f".{spec.expert}.")
            path = f"{experts}.{projection}"
        module = self.get_submodule(path)
        assert isinstance(module, WeightStorage), f"{path} holds no linear weight"
        return module.stored(spec.expert)

    def plain_targets(self) -> dict[str, Tensor]:
        """Every parameter that is not a linear weight, by its name in a checkpoint; write with `copy_`."""
        linear_tensors = {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, WeightStorage)
            for name in module.stored_names
        }
        return {
            self._checkpoint_name(path): parameter.detach()
            for path, parameter in self.named_parameters()
            if path not in linear_tensors
        }

    def _checkpoint_name(self, path: str) -> str:
        is_text = path.startswith(("model.", "lm_head."))
        return f"{self.config.prefix}{path}" if is_text else path

    def use_cache_scales(self, layer: int, scales: CacheScales) -> None:
        """Round keys and values of a decoder layer as an FP8 cache with these scales does."""
        attention = self.model.layers[layer].self_attn
        assert isinstance(attention, TextAttention)
        attention.cache_scales = scales

    def new_cache(self, batch_size: int, capacity: int = 256, dtype: CacheDtype | str = CacheDtype.AUTO) -> KVCache:
        """An empty cache for `batch_size` sequences with room for `capacity` tokens; it grows when needed.

        Args:
            batch_size: rows.
            capacity: tokens of each.
            dtype: how keys and values are kept: `auto` is `fp8` for a checkpoint that has scales for it, else the
                model's dtype; `fp8` and `int8` take one byte.

        Raises:
            UsageError: unknown dtype.
        """
        attentions = [layer.self_attn for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        return KVCache(
            self.config.text,
            batch_size,
            dtype=self.dtype,
            device=self.device,
            capacity=capacity,
            kind=CacheDtype.parse(dtype),
            scales=[attention.cache_scales for attention in attentions],
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits: Logits | str = Logits.ALL,
    ) -> Tensor:
        """Compute T new tokens of every sequence.

        Args:
            input_ids: [B, T] integers; image tokens stand where image features go.
            pixel_values: [tiles, 3, image_size, image_size]: the tiles of this call's image tokens, in order.
            attention_mask: [B, T], or [B, cached + T] of which the last T columns count; 0 is padding, on the left
                only. None: no padding among the new tokens.
            cache: tokens of earlier calls; the new ones are added. None: `input_ids` is the whole sequence.
            logits: of all T positions, or of the last only.

        Returns:
            [B, T, V], or [B, 1, V] for `Logits.LAST`, in the model's dtype.

        Raises:
            UsageError: shapes do not fit, padding not on the left, or image tokens and tiles do not match.
        """
        images = self._place_images(input_ids, pixel_values)
        x_BTH = self._hidden(input_ids, images, attention_mask, cache)
        return self._head(x_BTH if Logits(logits) is Logits.ALL else x_BTH[:, -1:])

    def prefill(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Compute a prompt into a cache, some columns at a time, so that memory does not grow with its length.

        Args:
            input_ids: as for `forward`.
            cache: for the prompt's columns, behind those that it has.
            pixel_values: as for `forward`, of the whole prompt.
            attention_mask: as for `forward`.
            chunk_size: columns at a time; chunks end at its multiples. None: all at once.

        Returns:
            Logits of the last position, [B, 1, V].

        Raises:
            UsageError: as of `forward`; or a chunk size below 1.
        """
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(f"prefill_chunk_size is {chunk_size}, expected at least 1")
        _padding(input_ids, attention_mask, cache)  # before the first chunk
        images, past, num_columns = self._place_images(input_ids, pixel_values), cache.length, input_ids.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -num_columns:]
        step = chunk_size or num_columns
        borders = [past, *range((past // step + 1) * step, past + num_columns, step), past + num_columns]
        for start, stop in pairwise(border - past for border in borders):
            chunk = slice(start, stop)
            x_BTH = self._hidden(
                input_ids[:, chunk],
                None if images is None else images.columns(chunk),
                None if mask is None else mask[:, chunk],
                cache,
            )
        return self._head(x_BTH[:, -1:])

    def _hidden(
        self, input_ids: Tensor, images: "_Images | None", attention_mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Normalized hidden states [B, T, H]; the cache has them then."""
        padding = _padding(input_ids, attention_mask, cache)
        x_BTH: Tensor = self.model.embed_tokens(input_ids)
        if images is not None:
            x_BTH = images.put_into(x_BTH)
        x_BTH = self.model(x_BTH, padding, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1], padding)
        return x_BTH

    def _head(self, x_BTH: Tensor) -> Tensor:
        x_BTH = x_BTH.contiguous()  # or torch's linear makes a copy of the head for every row
        if self.lm_head is None:
            return functional.linear(x_BTH, self.model.embed_tokens.weight)
        logits_BTV: Tensor = self.lm_head(x_BTH)
        return logits_BTV

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Features of image tiles, as the decoder takes them.

        Args:
            pixel_values: [tiles, 3, image_size, image_size], any floating dtype.

        Returns:
            [tiles * tokens per tile, H].

        Raises:
            UsageError: this model has no vision tower, or the tiles have another shape.
        """
        vision = self.config.vision
        if vision is None:
            raise UsageError("this is a text-only model: it takes no images")
        expected = (vision.num_channels, vision.image_size, vision.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise UsageError(
                f"pixel_values have shape {list(pixel_values.shape)}, expected [tiles, {', '.join(map(str, expected))}]"
            )
        # Where the tower is: calibration gives only that part of a model its weights.
        device = self.vision_model.class_embedding.device
        tiles = pixel_values.to(device=device, dtype=self.dtype)
        features: Tensor = self.multi_modal_projector(self.vision_model(tiles).flatten(0, 1))
        return features

    def _place_images(self, input_ids: Tensor, pixel_values: Tensor | None) -> "_Images | None":
        if pixel_values is None:
            return None
        features = self.image_features(pixel_values)
        assert self.config.image_token_index is not None
        is_image_BT = torch.eq(input_ids, self.config.image_token_index)
        num_places = int(is_image_BT.sum())
        if num_places != features.shape[0]:
            raise UsageError(
                f"input_ids have {num_places} image tokens, but {pixel_values.shape[0]} tiles make {features.shape[0]} "
                "features; pass the tiles of exactly these image tokens"
            )
        return _Images(features=features, is_image_BT=is_image_BT)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """Image features [places, H], and the columns where they go, row by row."""

    features: Tensor
    is_image_BT: Tensor

    def columns(self, chunk: slice) -> "_Images":
        """Those of some columns."""
        number_BT = self.is_image_BT.flatten().cumsum(0).view(self.is_image_BT.shape) - 1
        is_image_BT = self.is_image_BT[:, chunk]
        return _Images(features=self.features[number_BT[:, chunk][is_image_BT]], is_image_BT=is_image_BT)

    def put_into(self, x_BTH: Tensor) -> Tensor:
        """Embeddings with the features in their places."""
        return x_BTH.masked_scatter(self.is_image_BT.unsqueeze(-1), self.features)


def materialize(root: nn.Module, device: torch.device | str) -> None:
    """Give the meta parameters of a module uninitialized storage on `device`, and move there what has content."""
    for module in root.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.to(device)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
        if isinstance(module, WeightStorage | OffloadedExperts | Elementwise | TextAttention):
            module.choose(torch.device(device))


def _padding(input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> tuple[int, ...]:
    """Columns of padding on the left of each row, cached ones included."""
    batch_size, num_new = input_ids.shape
    past = (0,) * batch_size if cache is None else cache.padding
    if len(past) != batch_size:
        raise UsageError(f"input_ids have {batch_size} rows, but the cache was made for {len(past)}")
    if attention_mask is None:
        return past
    cached = 0 if cache is None else cache.length
    if attention_mask.shape not in {(batch_size, num_new), (batch_size, cached + num_new)}:
        raise UsageError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected {[batch_size, num_new]}"
            + (f" or {[batch_size, cached + num_new]}" if cached else "")
        )
    is_real = attention_mask[:, -num_new:].bool()
    if bool((is_real[:, :-1] & ~is_real[:, 1:]).any()):
        raise UsageError("attention_mask has padding after a token; pad on the left")
    new = [int(count) for count in (~is_real).sum(dim=1).tolist()]
    if any(count and pad < cached for count, pad in zip(new, past, strict=True)):
        raise UsageError("attention_mask has padding after tokens that are in the cache; pad on the left")
    return tuple(pad + count for pad, count in zip(past, new, strict=True))
