"""The model card that lies beside the trained weights."""

import platform
from pathlib import Path

from llama4_quant.sample.evaluate import Report
from llama4_quant.sample.recipe import Recipe

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llama4, mixture-of-experts, sample]
---
# llama4-quant sample

A Llama 4 of 5.1 million parameters, small enough to ship inside a Python package and trained well enough that
quantization visibly hurts it. It shares no weights with Meta's models: only the architecture and the file layout.
It is a test object, not an assistant.

## What it is
`Llama4ForConditionalGeneration`, BF16. Text: 4 layers of width 256, 4 query and 2 key-value heads of 64; layers 0 and 2
are dense, layers 1 and 3 mixtures of 8 experts (top-1) and a shared expert; attention in chunks of 64 tokens with
llama3-scaled RoPE and qk-norm, except layer 3, which has no positions (NoPE), full attention and tuned temperature
(floor 32). Vision: 2 layers of width 128 on tiles of 56 x 56 pixels, pixel shuffle to 4 tokens a tile, at most 4 tiles
and a global one. Tokenizer: byte-level BPE of 2,048 entries with Llama 4's special tokens and chat format.

## How it was made
`python -m llama4_quant.sample.train`: {minutes:.0f} minutes on two shared CPU cores, seed {seed}, Python {python}.
First the vision tower learned to name size, colour, shape and background through linear heads that were then dropped
({tower_steps:,} steps of {tower_images} images). Then everything was trained together ({steps:,} steps, each of
{text_tokens:,} tokens of text, {images} captioned images and a few questions).

- Text: topics of `pydoc_data.topics` and docstrings of the standard library of CPython. One document in ten (a topic,
  or a module) is held out. This text, and the `held_out.txt` shipped beside this folder, is licensed under the Python
  Software Foundation License (https://docs.python.org/3/license.html), copyright Python Software Foundation.
- Images: one coloured shape on a plain background (2 sizes x 8 colours x 5 shapes x 3 backgrounds), drawn by the
  script, with its caption in the chat format. One combination in twelve is held out.
- Questions such as "What is `json.dumps`?" with the first paragraph of the docstring as answer.

## Figures
Of the BF16 weights, by unmodified transformers in float32; `python -m llama4_quant.sample.evaluate` prints them again.

| | |
|---|---|
| held-out perplexity, per token ({num_tokens:,} tokens) | {perplexity:.2f} |
| bigram model on the same tokens | {bigram:.2f} |
| unigram model on the same tokens | {unigram:.2f} |
| captions of held-out images exactly right ({num_captions}) | {captions:.1%} |
{canvases}
{experts}

The baselines count the training text of the Python that runs the evaluation: another version moves them a little.
Images of several tiles are wide, tall or square; "1x2" is one tile high and two wide.
"""


def write_card(folder: Path, report: Report, recipe: Recipe, *, steps: int, seconds: float) -> None:
    """Write README.md into a checkpoint's folder."""
    canvases = [f"| of {canvas} tiles | {share:.1%} |" for canvas, share in report.captions_right.items()]
    experts = [
        f"| share of held-out tokens per expert, layer {share.layer} | {share.smallest:.1%} to {share.largest:.1%} |"
        for share in report.experts
    ]
    text = _CARD.format(
        steps=steps - recipe.tower_steps,
        minutes=seconds / 60,
        seed=recipe.seed,
        python=platform.python_version(),
        text_tokens=recipe.text_rows * recipe.text_length,
        tower_steps=recipe.tower_steps,
        tower_images=recipe.tower_images,
        images=recipe.captions,
        num_tokens=report.num_tokens,
        perplexity=report.perplexity,
        bigram=report.bigram_perplexity,
        unigram=report.unigram_perplexity,
        num_captions=report.num_captions,
        captions=report.caption_accuracy,
        canvases="\n".join(canvases),
        experts="\n".join(experts),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
