"""How a static range is set, as a value: which rule, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fptquant.errors import UserError

RULES = {"min_max": 0, "mse": 1, "lp": 1, "percentile": 2}
"""Numbers of the rules in the C core (``fptq_range_rule``)."""

HISTOGRAM_BINS = 2048
"""Steps of the histogram that percentiles are read from."""


@dataclass(frozen=True)
class RangeMethod:
    """The rule and its settings.

    Attributes:
        method: ``min_max``; ``percentile``; ``mse`` (lp with p = 2); ``lp``: minimize sum |x - fake_quant(x)|^p.
        p: exponent of ``lp``, 2 to 4.
        percentile: share of the values inside the range, in percent.
        candidates: number of clipping ratios tried, in equal steps of the logarithm from lowest_ratio to 1.
        lowest_ratio: the smallest ratio tried, in (0, 1].
        clip_ratio: the share of each token's own range that a dynamic quantizer's grid covers, in (0, 1]; all that a dynamic
            quantizer uses of this.

    Raises:
        UserError: if a setting is out of its bounds; names all of them.
    """

    method: Literal["min_max", "percentile", "mse", "lp"] = "min_max"
    p: float = 2.4
    percentile: float = 99.99
    candidates: int = 80
    lowest_ratio: float = 0.3
    clip_ratio: float = 1.0

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
        if not 0 < self.clip_ratio <= 1:
            mistakes.append(f"clip_ratio = {self.clip_ratio} must lie in (0, 1]")
        if mistakes:
            raise UserError("range setting: " + "; ".join(mistakes))

    @property
    def exponent(self) -> float:
        """The exponent of the error that the rule minimizes."""
        return 2.0 if self.method == "mse" else self.p

    def ratios(self) -> list[float]:
        """The clipping ratios tried, ascending to 1.

        >>> RangeMethod("lp", candidates=3, lowest_ratio=0.25).ratios()
        [0.25, 0.5, 1.0]
        """
        steps = max(1, self.candidates - 1)
        return [self.lowest_ratio ** ((steps - step) / steps) for step in range(steps + 1)][-self.candidates :]
