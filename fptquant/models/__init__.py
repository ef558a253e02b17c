"""Model knowledge as data, and the modules that quantize a transformers model in place."""
