"""Quantize Llama 4 checkpoints to FP8 and int4, run them, and measure what was lost."""
