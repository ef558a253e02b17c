"""How a static range is set, as a value: which rule, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fptquant.errors import UserError


@dataclass(frozen=True)
class RangeMethod:
    """The rule and its settings.

    Attributes:
        method: ``min_max``; ``percentile``; ``mse`` (lp with p = 2); ``lp``: minimize sum |x - fake_quant(x)|^p.
        p: exponent of ``lp``, 2 to 4.
        percentile: share of the values inside the range, in percent.
        candidates: number of clipping ratios tried, in equal steps of the logarithm from lowest_ratio to 1.
        lowest_ratio: the smallest ratio tried, in (0, 1].

    Raises:
        UserError: if a setting is out of its bounds; names all of them.

    >>> RangeMethod("lp", candidates=3, lowest_ratio=0.25).ratios()
    tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """

    method: Literal["min_max", "percentile", "mse", "lp"] = "min_max"
    p: float = 2.4
    percentile: float = 99.99
    candidates: int = 80
    lowest_ratio: float = 0.3

    def __post_init__(self) -> None:
        mistakes = []
        if self.method not in ("min_max", "percentile", "mse", "lp"):
            mistakes.append(f"method = {self.method!r} must be min_max, percentile, mse or lp")
        if not 2 <= self.p <= 4:
            mistakes.append(f"p = {self.p} must lie in 2..4")
        if not 0 < self.percentile <= 100:
            mistakes.append(f"percentile = {self.percentile} must lie in (0, 100]")
        if self.candidates < 1:
            mistakes.append(f"candidates = {self.candidates} must be positive")
        if not 0 < self.lowest_ratio <= 1:
            mistakes.append(f"lowest_ratio = {self.lowest_ratio} must lie in (0, 1]")
        if mistakes:
            raise UserError("range setting: " + "; ".join(mistakes))

    @property
    def exponent(self) -> float:
        """The exponent of the error that the rule minimizes."""
        return 2.0 if self.method == "mse" else self.p

    def ratios(self) -> Tensor:
        """The clipping ratios tried, float64 [candidates], ascending to 1."""
        if self.candidates == 1:
            return torch.ones(1, dtype=torch.float64)
        steps = torch.linspace(1, 0, self.candidates, dtype=torch.float64)
        return torch.tensor(self.lowest_ratio, dtype=torch.float64).pow(steps)
