"""S_n: the residual is kept normalized, and its scale is carried along."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Transform

Where = Literal["input", "output"]
"""Whether 1 / running_scale multiplies the input of a branch's last linear, or its output."""


class ResidualScaling(Transform):
    """Divides the residual of each token by its root mean square before every norm and carries the product along.

    running_scale starts at 1; before each norm, with r the scaled residual and eps the norm's own epsilon,
    m = sqrt(mean(r^2) + eps / running_scale^2),  r <- r / m,  running_scale <- running_scale * m,
    so the true residual is r * running_scale at all times, and r is the output of the norm (gain 1). A branch's output
    is divided by running_scale before it is added to r. Dividing eps by the square makes this exact.

    Without a bias 1 / running_scale commutes with the linear, so it may act on the *input* of o_proj and down_proj,
    before that input's quantizer (the default: tokens of massive activations come into the others' range), or on the
    *output*. A bias of these linears must be divided as well.

    Shape: residual [..., H], running_scale [..., 1].

    Source: FPTQuant (arXiv 2506.04985), dynamic residual scaling; the place before the linear and the epsilon are this
    project's choice.
    """

    symbol: ClassVar[str] = "S_n"
    name: ClassVar[str] = "residual_scaling"
    mergeable: ClassVar[bool] = False
    online: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ()

    def __init__(self, eps: float, where: Where = "input") -> None:
        super().__init__()
        if where not in get_args(Where):
            raise UserError(f"where = {where!r} is not known; choose one of {', '.join(get_args(Where))}")
        self.eps = eps
        self.where: Where = where

    def forward(self, residual: Tensor, running_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized residual and the new running scale."""
        return ops.residual_scale(residual, running_scale, eps=self.eps)

    def inverse(self, x: Tensor, running_scale: Tensor | None = None) -> Tensor:
        """The true residual of a scaled one."""
        if running_scale is None:
            raise UserError("S_n is undone with the running scale that its forward gave; pass running_scale")
        return (x * running_scale).to(x.dtype)

    def scale_branch(self, x: Tensor, running_scale: Tensor) -> Tensor:
        """A branch's activation divided by the running scale, so that it may be added to the scaled residual."""
        return (x / running_scale).to(x.dtype)

    def merge_into(self, weight: Tensor, side: str) -> Tensor:
        raise UserError("S_n depends on the token: it acts at run time and cannot be merged into weights")

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "where": self.where, "eps": self.eps}
