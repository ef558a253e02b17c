"""Folding norm gains leaves the logits, and leaves gains of 1."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import UserError
from fptquant.models.norm import widen_norms_
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.untie import untie_
from tests.models.tiny import ARCHITECTURES, tiny_model
from tests.stages.transformed import architecture_options, logits, relative_error


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_logits_stay_and_the_error_falls_with_the_dtype(architecture: str) -> None:
    errors = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = tiny_model(architecture, dtype=dtype, tie_word_embeddings=True, **architecture_options(architecture))
        widen_norms_(model)
        before = logits(model)
        untie_(model)
        fuse_norms_(model)
        errors.append(relative_error(logits(model), before))
    assert errors[0] < 0.05
    assert errors[1] < 2e-6
    assert errors[2] < 1e-14


def test_gains_are_one_and_the_readers_have_them() -> None:
    model = tiny_model("Qwen3ForCausalLM")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse_norms_(model)
    fused, layer = model.state_dict(), "model.layers.0."
    expected = state[layer + "self_attn.k_proj.weight"].double() * state[layer + "input_layernorm.weight"].double()
    assert torch.equal(fused[layer + "self_attn.k_proj.weight"], expected.float())
    for untouched in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.q_norm.weight"):
        assert torch.equal(fused[layer + untouched], state[layer + untouched])
    for norm in (layer + "input_layernorm", layer + "post_attention_layernorm", "model.norm"):
        assert bool((fused[norm + ".weight"] == 1).all())


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="untie first"):
        fuse_norms_(tiny_model("LlamaForCausalLM", tie_word_embeddings=True))
