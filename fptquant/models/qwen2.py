"""Qwen2 and Qwen2.5: Llama's block with biases on the query, key and value projections."""

from fptquant.models.adapter import Adapter

QWEN2 = Adapter(architecture="Qwen2ForCausalLM", biases=frozenset({"q_proj", "k_proj", "v_proj"}))
