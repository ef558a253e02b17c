"""What is measured on a model: perplexity, agreement with full precision, and where the error of quantization arises."""
