"""Quantization: calibration data in, a smaller graph with explicit Q/DQ out, and the proof that it still behaves."""

PRECISIONS = ("int8", "int8-weights", "int4-weights", "fp16")
