"""Metrics as plain functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fptquant.errors import UserError


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """``log sum_j exp(z_j) - z_target`` for every token, in fp64.

    Shape:
        logits: [T, vocabulary]; targets: [T], int64
        result: [T], float64
    """
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return logits.logsumexp(-1).double() - chosen.double()


def jensen_shannon_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two next-token distributions, in nats.

    ``JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2``; 0 for equal distributions, at most log 2.

    Shape:
        logits, reference: [T, vocabulary]
        result: [T], float64

    Source: J. Lin, "Divergence measures based on the Shannon entropy", 1991.

    >>> a = torch.tensor([[0.0, -1e9]]); b = torch.tensor([[-1e9, 0.0]])
    >>> round(jensen_shannon_divergence(a, b).item() / math.log(2), 6)
    1.0
    """
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    # p (log p - log m) is 0 where p underflows to 0: log p stays finite there, so no NaN arises.
    divergence = (log_p - log_m).mul_(log_p.exp()).sum(-1, dtype=torch.float64)
    divergence += (log_q - log_m).mul_(log_q.exp()).sum(-1, dtype=torch.float64)
    return divergence.mul_(0.5).clamp_(min=0)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum x^2 / sum (x - y)^2)`` in decibels; infinite if they are equal.

    >>> round(sqnr_db(torch.ones(4), torch.full((4,), 0.9)), 3)
    20.0

    Raises:
        UserError: if the shapes differ.
    """
    _same_shape(reference, approximation)
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - approximation.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """``max |x - y| / max |x|``.

    Raises:
        UserError: if the shapes differ.
    """
    _same_shape(reference, approximation)
    largest = float(reference.double().abs().max())
    error = float((reference.double() - approximation.double()).abs().max())
    return error / largest if largest > 0 else (0.0 if error == 0 else math.inf)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UserError(f"shapes differ: {list(a.shape)} and {list(b.shape)}; compare outputs for the same input")
