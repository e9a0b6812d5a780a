"""Quantization: calibration data in, a smaller graph with explicit Q/DQ out, and the proof that it still behaves."""
