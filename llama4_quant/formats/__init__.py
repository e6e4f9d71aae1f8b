"""How quantized weights are spelled in a checkpoint: tensor names, dtypes and shapes, and `quantization_config`."""
