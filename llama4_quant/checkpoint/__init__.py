"""Checkpoint files: reading safetensors by pieces, laying out an output, writing it so that it is complete or absent.

Nothing here knows of quantization or of Llama 4: tensors have names, dtypes, shapes and bytes.
"""
