"""Learns T_r: one orthogonal matrix for the whole model that lowers the L_p norm of everything around the residual.

f(R) = mean of |x_h'|^p over all entries of x' = R x, where x runs over every vector of the residual space that is a
weight: rows of q, k, v, gate, up and lm_head (they read the residual), columns of o and down and rows of the embedding
(they write it). A rotation keeps every vector's length, so f falls exactly by spreading large entries.

Riemannian gradient descent with momentum: with R <- cayley(E) R, E antisymmetric, the gradient in E at 0 is the
antisymmetric part of p (|Y|^(p-1) sign Y)^T Y, Y = X R^T. The step is scaled so that its axes turn by the learning rate
(a mean angle, in radians), which falls linearly to zero. Every step sees another sample of rows, drawn from a seed; the model
is never held twice.

Source: the objective is FPTQuant's (arXiv 2506.04985), the Cayley update SpinQuant's (arXiv 2405.16406), without data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.models.adapter import ModelView
from fptquant.models.architectures import view_model
from fptquant.stages.merge_transforms import BLOCK_SIDES
from fptquant.stages.progress import Progress, quiet
from fptquant.transforms import ResidualRotation
from fptquant.transforms.base import generator
from fptquant.transforms.residual_rotation import cayley

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOMENTUM = 0.9
JUDGED_ROWS = 8
"""The report is made on so many times the rows of one step, drawn once, of which the learning knows nothing."""


@dataclass
class RotationReport:
    """The mean p-th power of an entry, on rows that served for nothing else."""

    before: float
    after: float
    identity: float
    """The same without any rotation."""
    steps: int
    rows: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All fields, fit for JSON."""
        return asdict(self)


def residual_weights(view: ModelView) -> Iterator[tuple[Tensor, str]]:
    """Every weight that reads or writes the residual, and its side of T_r."""
    yield view.embedding.weight.detach(), "embedding"
    yield view.lm_head.weight.detach(), "read"
    for block in view.blocks:
        for name, side in BLOCK_SIDES["residual_rotation"].items():
            yield block.linear(name).weight.detach(), side


def sample_rows(view: ModelView, rows: int, rng: torch.Generator) -> Tensor:
    """About ``rows`` vectors of the residual space [n, H], float32 or wider, from every weight by its share, at least one."""
    weights = list(residual_weights(view))
    counts = [weight.shape[1 if side == "write" else 0] for weight, side in weights]
    share = min(1.0, rows / sum(counts))
    samples = []
    for (weight, side), count in zip(weights, counts, strict=True):
        taken = max(1, round(share * count))
        index = torch.randint(0, count, (taken,), generator=rng).to(weight.device)
        vectors = weight[:, index].mT if side == "write" else weight[index]
        samples.append(vectors.to(torch.promote_types(weight.dtype, torch.float32)))
    return torch.cat(samples)


def mean_power(rows: Tensor, rotation: Tensor, p: float) -> float:
    """mean |R x|^p over the entries of all rows."""
    return float((rows @ rotation.to(rows.dtype).mT).abs().pow(p).mean(dtype=torch.float64))


def relative_gradient(rows: Tensor, rotation: Tensor, p: float) -> Tensor:
    """The gradient of the sum of |cayley(E) R x|^p in antisymmetric E at 0, [H, H], antisymmetric, float64."""
    turned = rows @ rotation.to(rows.dtype).mT
    slope = p * turned * (turned * turned if p == 4 else turned.abs().pow(p - 2))
    gradient = (slope.mT @ turned).double()
    return (gradient - gradient.mT) / 2


@torch.no_grad()
def learn_rotation_(
    model: PreTrainedModel,
    rotation: ResidualRotation,
    *,
    p: float = 4.0,
    steps: int = 100,
    lr: float = 0.01,
    rows: int = 4096,
    seed: int = 0,
    progress: Progress = quiet,
) -> RotationReport:
    """Learns T_r in place, from where it stands; the model is only read. Fold the norm gains first.

    Args:
        lr: angle by which the axes turn in the first step, in radians (root mean square of the norms of E's rows).
        rows: vectors of the residual space that one step looks at.

    Raises:
        UserError: if the rotation has another size than the residual.
    """
    view = view_model(model)
    if rotation.hidden_size != view.hidden_size:
        raise UserError(f"T_r has size {rotation.hidden_size}, the residual of this model {view.hidden_size}")
    began, rng = time.perf_counter(), generator(seed)
    judged = sample_rows(view, JUDGED_ROWS * rows, generator(seed + 1))
    start = rotation.matrix().to(judged.device)
    matrix, velocity = start, torch.zeros_like(start)
    for step in range(steps):
        gradient = relative_gradient(sample_rows(view, rows, rng), matrix, p)
        velocity = MOMENTUM * velocity + gradient / gradient.square().mean().sqrt().clamp_min(1e-300)
        scale = velocity.square().sum(-1).mean().sqrt().clamp_min(1e-300)
        matrix = cayley(-lr * (1 - step / steps) / scale * velocity) @ matrix
        progress(step + 1, steps, "learning the residual rotation")
    before, after = mean_power(judged, start, p), mean_power(judged, matrix, p)
    if after < before:
        rotation.set_matrix_(matrix)
    identity = mean_power(judged, torch.eye(view.hidden_size, device=judged.device), p)
    return RotationReport(before, min(before, after), identity, steps, rows, time.perf_counter() - began)
