"""Calibration: statistics of activations, for quantizers that need data. Rounding to nearest needs none."""
