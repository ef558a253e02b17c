"""Perplexity, agreement with the full-precision model, equivalence, and signal-to-quantization-noise ratio."""
