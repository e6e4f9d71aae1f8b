"""A dense Llama 4 that knows a page of text by heart, so that its next token is rarely in doubt.

Two engines that round differently may print different texts from a model that hesitates, however right they both are.
A random model always hesitates. This one is trained for a minute or two on a page of Python's own documentation, byte
by byte (no tokenizer: token = byte), until its greedy text is that page.

Everything that could go wrong between engines is in it: qk-norm, llama3 RoPE scaling, chunks shorter than the prompts,
a NoPE layer with temperature tuning that starts inside the prompts, grouped-query attention.
"""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

TOPICS = ("if", "while", "return", "pass")
VOCABULARY = 384
"""Bytes, then special tokens that never occur; a multiple of 128 so that the head too could be quantized."""

CHUNK = 64
MAX_LENGTH = 256
NUM_LAYERS = 4
WINDOW = 192
"""Bytes per training example: three chunks."""

BATCH = 8
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20


def page() -> Tensor:
    """The text as [length] int64 bytes; it differs a little from one Python version to the next."""
    return torch.tensor(list("".join(topics[topic] for topic in TOPICS).encode()))


def prompts(num_prompts: int, num_new: int) -> list[list[int]]:
    """Pieces of the page, spread evenly, from half a chunk to nearly three chunks long, with room to go on after."""
    text = page().tolist()
    lengths = [CHUNK // 2 + (i * 37) % (2 * CHUNK) for i in range(num_prompts)]
    last_start = len(text) - max(lengths) - num_new
    starts = [i * last_start // max(1, num_prompts - 1) for i in range(num_prompts)]
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def configuration() -> Llama4TextConfig:
    """Small; every linear weight's inputs are divisible by 128."""
    return Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        intermediate_size_mlp=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        # vLLM looks at the step alone, transformers and llama4-quant at the list first: both say "no expert layer".
        moe_layers=[],
        interleave_moe_layer_step=NUM_LAYERS + 1,
        num_local_experts=1,
        no_rope_layers=[1, 1, 1, 0],
        attention_chunk_size=CHUNK,
        attn_temperature_tuning=True,
        floor_scale=CHUNK // 2,
        use_qk_norm=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": MAX_LENGTH // 2,
        },
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )


def train(folder: Path, num_steps: int, seed: int = 0) -> float:
    """Train and save in BF16.

    Returns:
        Mean loss of the last ten steps, in nats per byte.
    """
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(configuration()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / num_steps)
    )
    text, losses = page(), []
    for _ in range(num_steps):
        starts = torch.randint(len(text) - WINDOW, (BATCH, 1))
        batch = text[starts + torch.arange(WINDOW)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.to(torch.bfloat16).save_pretrained(folder)
    return float(torch.tensor(losses[-10:]).mean())
