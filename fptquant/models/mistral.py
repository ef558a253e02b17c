"""Mistral: Llama's block with a sliding window over the keys."""

from fptquant.models.adapter import Adapter

MISTRAL = Adapter(architecture="MistralForCausalLM", biases=frozenset())
