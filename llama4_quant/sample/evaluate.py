"""Measure the sample: `python -m llama4_quant.sample.evaluate [--model DIR]`.

Runs the saved BF16 checkpoint through unmodified transformers in float32, so the figures are independent of this
package's own runtime.

Legend: B windows, L positions, T tokens, E experts, V vocabulary.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Llama4ForConditionalGeneration

from llama4_quant.python_text import Document, collect
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR, baselines, shapes
from llama4_quant.sample.data import Chat, caption_chat, prompt_text
from llama4_quant.sample.export import load_reference
from llama4_quant.sample.tokenizer import BOS, EOT, VOCAB_SIZE, token_id

_WINDOW = 512
_BATCH_ROWS = 8
_LONGEST_CAPTION = 16
# Image canvases in tiles, with how many held-out images of each are captioned.
_CANVASES = {(1, 1): 260, (1, 2): 52, (2, 1): 52, (2, 2): 52}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShare:
    """How evenly one mixture's experts are used."""

    layer: int
    smallest: float
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The figures of the model card. Perplexities are per token of the shipped tokenizer."""

    num_tokens: int
    perplexity: float
    unigram_perplexity: float
    bigram_perplexity: float
    captions_right: dict[str, float]
    caption_accuracy: float
    num_captions: int
    experts: tuple[ExpertShare, ...]


def evaluate(folder: Path, train_documents: Sequence[Document], held_out_text: str) -> Report:
    """Evaluate a checkpoint.

    Args:
        folder: the BF16 checkpoint.
        train_documents: what it was trained on (for the count-based baselines).
        held_out_text: what it was not trained on.
    """
    model = load_reference(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows_BL = held_out_windows(tokenizer, held_out_text)
    perplexity, shares = score_text(model, windows_BL)
    encoded = tokenizer.encode_batch([d.text for d in train_documents])
    train = torch.tensor([token for e in encoded for token in e.ids])
    counted = baselines.score(train, windows_BL, vocab_size=VOCAB_SIZE)
    right = {f"{h}x{w}": caption_accuracy(model, tokenizer, (h, w), n) for (h, w), n in _CANVASES.items()}
    total = sum(_CANVASES.values())
    return Report(
        num_tokens=windows_BL[:, 1:].numel(),
        perplexity=perplexity,
        unigram_perplexity=counted.unigram,
        bigram_perplexity=counted.bigram,
        captions_right=right,
        caption_accuracy=sum(right[f"{h}x{w}"] * n for (h, w), n in _CANVASES.items()) / total,
        num_captions=total,
        experts=shares,
    )


def held_out_windows(tokenizer: Tokenizer, text: str) -> Tensor:
    """Cut a text into windows [B, L], each <|begin_of_text|> and then `_WINDOW` - 1 tokens; the rest is dropped."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    body = ids[: len(ids) // (_WINDOW - 1) * (_WINDOW - 1)].view(-1, _WINDOW - 1)
    return torch.cat([torch.full((len(body), 1), token_id(tokenizer, BOS)), body], dim=1)


@torch.inference_mode()
def score_text(model: Llama4ForConditionalGeneration, windows_BL: Tensor) -> tuple[float, tuple[ExpertShare, ...]]:
    """Perplexity over all tokens but the first of every window, and how the mixtures used their experts."""
    counts: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.language_model.model.layers):
        if layer.is_moe_layer:
            counts[index] = torch.zeros(layer.feed_forward.num_experts)
            hooks.append(layer.feed_forward.router.register_forward_hook(_count_into(counts[index])))
    loss = math.fsum(_loss(model, rows_BL) for rows_BL in torch.split(windows_BL, _BATCH_ROWS))
    for hook in hooks:
        hook.remove()
    shares = [
        ExpertShare(layer=layer, smallest=(c.min() / c.sum()).item(), largest=(c.max() / c.sum()).item())
        for layer, c in counts.items()
    ]
    return math.exp(loss / windows_BL[:, 1:].numel()), tuple(shares)


def caption_accuracy(
    model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, canvas: tuple[int, int], num_images: int
) -> float:
    """Share of held-out scenes, each drawn at new places, whose greedy caption is right word for word."""
    rng = random.Random(f"held-out {canvas}")  # noqa: S311
    scenes = shapes.scenes(held_out=True)
    chats = [
        caption_chat(scenes[i % len(scenes)], rng, canvas=canvas, question=shapes.QUESTIONS[0])
        for i in range(num_images)
    ]
    said: list[str] = []
    for start in range(0, num_images, 52):
        said += answer(model, tokenizer, chats[start : start + 52])
    return sum(text == chat.answer for text, chat in zip(said, chats, strict=True)) / num_images


@torch.inference_mode()
def answer(model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, chats: Sequence[Chat]) -> list[str]:
    """Answer image questions greedily; all prompts must have the same number of tokens."""
    ids_BL = torch.tensor([tokenizer.encode(prompt_text(chat.question)).ids for chat in chats])
    prompt_length = ids_BL.shape[1]
    pixels = torch.cat([chat.pixels for chat in chats if chat.pixels is not None])
    end = token_id(tokenizer, EOT)
    for _ in range(_LONGEST_CAPTION):
        logits = model(input_ids=ids_BL, pixel_values=pixels, use_cache=False, logits_to_keep=1).logits
        ids_BL = torch.cat([ids_BL, logits[:, -1:].argmax(dim=-1)], dim=1)
        if (ids_BL[:, prompt_length:].eq(end)).any(dim=1).all():
            break
    rows: list[list[int]] = ids_BL[:, prompt_length:].tolist()
    texts: list[str] = tokenizer.decode_batch([r[: r.index(end)] if end in r else r for r in rows])
    return texts


def render(report: Report) -> str:
    """The report as people read it."""
    lines = [
        f"held-out text       {report.num_tokens:,} tokens in windows of {_WINDOW}",
        f"  perplexity        {report.perplexity:.2f}",
        f"  bigram model      {report.bigram_perplexity:.2f}  ({report.bigram_perplexity / report.perplexity:.2f} x)",
        f"  unigram model     {report.unigram_perplexity:.2f}  ({report.unigram_perplexity / report.perplexity:.2f} x)",
        f"held-out captions   {report.caption_accuracy:.1%} of {report.num_captions} exactly right",
    ]
    lines += [f"  {canvas} tiles         {share:.1%}" for canvas, share in report.captions_right.items()]
    for share in report.experts:
        lines.append(f"experts of layer {share.layer}  {share.smallest:.1%} to {share.largest:.1%} of held-out tokens")
    return "\n".join(lines)


def _loss(model: Llama4ForConditionalGeneration, rows_BL: Tensor) -> float:
    logits = model(input_ids=rows_BL, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), rows_BL[:, 1:].flatten(), reduction="sum").item()


def _count_into(counts_E: Tensor) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
    def count(_router: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        logits_TE = output[1]
        counts_E.add_(torch.bincount(logits_TE.argmax(dim=-1), minlength=len(counts_E)))

    return count


@click.command()
@click.option("--model", "folder", type=click.Path(exists=True, path_type=Path), default=SAMPLE_DIR, help="Checkpoint.")
@click.option("--threads", default=1, show_default=True, help="Threads that torch uses.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(*, folder: Path, threads: int, as_json: bool) -> None:
    """Print held-out perplexity beside its baselines, caption accuracy, and how evenly experts are used."""
    torch.set_num_threads(threads)
    report = evaluate(folder, collect().train, HELD_OUT_TEXT.read_text(encoding="utf-8"))
    click.echo(json.dumps(asdict(report), indent=2) if as_json else render(report))


if __name__ == "__main__":
    main()
