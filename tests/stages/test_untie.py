"""Untying gives lm_head a weight of its own and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from fptquant.models.architectures import view_model
from fptquant.stages.untie import untie_
from tests.models.tiny import tiny_model
from tests.stages.transformed import logits


def test_tied_weights_become_two_with_the_same_logits() -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    before = logits(model)
    assert untie_(model)
    view = view_model(model)
    assert not view.tied
    assert not model.config.tie_word_embeddings
    assert torch.equal(view.lm_head.weight, view.embedding.weight)
    assert view.lm_head.weight.data_ptr() != view.embedding.weight.data_ptr()
    assert torch.equal(logits(model), before)


def test_untied_stays_as_it_is() -> None:
    model = tiny_model("Qwen2ForCausalLM")
    weight = view_model(model).lm_head.weight
    assert not untie_(model)
    assert view_model(model).lm_head.weight is weight


def test_a_saved_model_stays_untied(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    untie_(model)
    with torch.no_grad():
        view_model(model).lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not view_model(loaded).tied
    assert torch.equal(logits(loaded), logits(model))
