"""Qwen3: Llama's block with an RMSNorm of each query and key head before RoPE."""

from fptquant.models.adapter import Adapter

QWEN3 = Adapter(
    architecture="Qwen3ForCausalLM",
    biases=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    has_qk_norm=True,
)
"""``attention_bias`` of the config decides whether the biases exist."""
