"""Tiny random models of the four architectures: grouped heads, biases, a gain in every norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from fptquant.models.cache_argument import cache_argument

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SLIDING: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 5},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3ForCausalLM": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
VOCABULARY = 101


def tiny_model(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model in evaluation mode; every parameter is random, biases and gains too."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if architecture == "MistralForCausalLM":
        sizes["sliding_window"] = None
    config = AutoConfig.for_model(ARCHITECTURES[architecture], **(sizes | options))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(module, nn.Linear | nn.Embedding):
                width = module.in_features if isinstance(module, nn.Linear) else 1
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / width**0.5)
            elif isinstance(weight, Tensor):  # norms
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            if isinstance(bias, Tensor):
                bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return model.to(dtype).eval()


def token_ids(batch: int = 2, length: int = 12, *, seed: int = 1) -> Tensor:
    """Random tokens [batch, length] without the padding token 0."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def given(cache: Any) -> dict[str, Any]:
    """A cache as the argument that models of the installed library take."""
    return {cache_argument(LlamaForCausalLM): cache}
