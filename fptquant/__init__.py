"""Function-preserving transforms for quantized language models."""
