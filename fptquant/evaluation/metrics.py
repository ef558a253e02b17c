"""Metrics as plain functions of tensors."""

from __future__ import annotations

import math

from torch import Tensor

from fptquant.errors import UserError


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum x^2 / sum (x - y)^2)`` in decibels; infinite if they are equal.

    >>> import torch
    >>> round(sqnr_db(torch.ones(4), torch.full((4,), 0.9)), 3)
    20.0

    Raises:
        UserError: if the shapes differ.
    """
    _same_shape(reference, approximation)
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - approximation.double()).square().sum())
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two sums of squares; infinite without noise, minus infinite without a signal."""
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
