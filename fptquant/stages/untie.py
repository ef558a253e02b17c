"""Gives ``lm_head`` a weight of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fptquant.models.architectures import view_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untie_(model: PreTrainedModel) -> bool:
    """Copies the embedding into ``lm_head`` where the two share one parameter; tells whether they did.

    The gain of the last norm and T_r act differently on the two. ``config.tie_word_embeddings`` becomes False, so that
    a saved model stays untied when it is loaded.
    """
    view = view_model(model)
    tied = view.tied
    if tied:
        weight = view.lm_head.weight
        view.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
    return tied
