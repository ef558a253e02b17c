"""Adapters name the right modules in all four architectures."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fptquant.errors import UserError
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import adapter_for, get_adapter, supported_architectures, view_model
from fptquant.models.norm import RMSNorm, widen_norms_
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_view_finds_every_part(architecture: str) -> None:
    model = tiny_model(architecture)
    view = view_model(model)
    assert view.adapter.architecture == architecture
    assert view.embedding is model.get_input_embeddings()
    assert view.lm_head is model.get_output_embeddings()
    assert (view.hidden_size, view.head_dim, view.num_heads, view.num_kv_heads, view.group) == (64, 16, 4, 2, 2)
    assert view.intermediate_size == 96
    assert view.num_layers == len(view.blocks) == 2
    for block in view.blocks:
        assert dict(block.linears()).keys() == set(LINEAR_NAMES)
        assert block.q_proj.out_features == 64
        assert block.k_proj.out_features == block.v_proj.out_features == 32
        assert block.down_proj.in_features == 96
        assert block.input_norm.weight.shape == block.post_norm.weight.shape == (64,)
        assert (block.q_norm is not None) is view.adapter.has_qk_norm


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_declared_linears_have_biases(architecture: str) -> None:
    view = view_model(tiny_model(architecture))
    for block in view.blocks:
        with_bias = {name for name, linear in block.linears() if linear.bias is not None}
        assert with_bias <= view.adapter.biases


@pytest.mark.parametrize("tied", [False, True])
def test_tied(tied: bool) -> None:
    assert view_model(tiny_model("LlamaForCausalLM", tie_word_embeddings=tied)).tied is tied


def test_replace_is_seen() -> None:
    view = view_model(tiny_model("LlamaForCausalLM"))
    new = nn.Linear(64, 64)
    block = view.blocks[1]
    block.replace("q_proj", new)
    assert block.q_proj is new
    assert view.blocks[0].q_proj is not new


def test_unsupported_architecture_is_named() -> None:
    model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel is not supported.*LlamaForCausalLM, Mistral.*Qwen2.*Qwen3"):
        get_adapter(model)
    with pytest.raises(UserError, match="Foo"):
        adapter_for("Foo")
    assert sorted(ARCHITECTURES) == supported_architectures()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_widened_norms_change_nothing_in_float32(architecture: str) -> None:
    model = tiny_model(architecture)
    keys = set(model.state_dict())
    before = model(token_ids()).logits
    widen_norms_(model)
    assert torch.equal(model(token_ids()).logits, before)
    assert set(model.state_dict()) == keys


def test_widened_norm_is_exact_in_float64() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    norm = RMSNorm(nn.Parameter(torch.rand(8, dtype=torch.float64)), 1e-5)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=0)
