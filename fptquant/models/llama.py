"""Llama 1 to 3 and the many models that share its classes (SmolLM2, TinyLlama, Vicuna)."""

from fptquant.models.adapter import LINEAR_NAMES, Adapter

LLAMA = Adapter(architecture="LlamaForCausalLM", biases=frozenset(LINEAR_NAMES))
"""``attention_bias`` and ``mlp_bias`` of the config decide which biases there are."""
