"""An RMSNorm that computes in the dtype of its input if that is wider than float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.models.adapter import BlockView, ModelView
from fptquant.models.architectures import view_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, then multiplies by a gain.

    y = weight * x / sqrt(mean(x^2) + eps), computed in float32, or in float64 for a float64 input. The model library's
    own class computes in float32 always, so a float64 model of its making is exact to 1e-7 only.

    Shape: input and output [..., H]; weight [H].
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def _widen(view: ModelView | BlockView, name: str) -> None:
    norm = view.get(name)
    if not isinstance(norm, RMSNorm):
        weight, eps = norm.weight, norm.variance_epsilon
        assert isinstance(weight, nn.Parameter)
        assert isinstance(eps, float)
        view.replace(name, RMSNorm(weight, eps))


def widen_norms_(model: PreTrainedModel) -> None:
    """Replaces every RMSNorm by one that is exact in float64; parameters and their names stay the same.

    Needed wherever a float64 model must be more exact than a float32 one (equivalence tests, reference logits).
    """
    view = view_model(model)
    _widen(view, "final_norm")
    for block in view.blocks:
        for name in ("input_norm", "post_norm", *(("q_norm", "k_norm") if view.adapter.has_qk_norm else ())):
            _widen(block, name)
