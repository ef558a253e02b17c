"""Weight ranges from the outputs of the layers: each is narrowed by the ratio that `fptquant.quantizers.clip_range` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fptquant.files import KeptFiles
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.quantizers.clip_range import clip_range_
from fptquant.quantizers.quantizer import Quantizer
from fptquant.rounding.hessian_pass import HessianPass
from fptquant.rounding.round_blocks import round_blocks_
from fptquant.rounding.token_weights import TokenWeights
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ClippingReport:
    """What became of the sum of D H D^T of every linear, by name, and how long it took in all parts of the run."""

    linears: dict[str, dict[str, float]]
    """``before`` and ``after``."""
    seconds: float


class _Clipping(HessianPass):
    settings = "clip"

    def work_(self, linear: QuantizedLinear, quantizer: Quantizer, hessian: Tensor, name: str) -> dict[str, Any]:
        before, after = clip_range_(linear.weight, quantizer, hessian)
        return {"before": before, "after": after}


def clip_ranges_(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    token_weights: TokenWeights | None = None,
    kept: KeptFiles | None = None,
    belongs_to: str = "",
    resume: bool = False,
    progress: Progress = quiet,
) -> ClippingReport:
    """Narrows the weight ranges of an instrumented model, whose ranges are set and whose quantizers are on, and rounds nothing.

    Shape:
        windows: [windows, window], int64, the calibration text.

    Args:
        token_weights: as in `fptquant.rounding.hessian_pass.HessianPass`; what decides them is part of ``belongs_to``.
        kept, belongs_to, resume: as in `fptquant.rounding.round_blocks.round_blocks_`.

    Raises:
        UserError: if a weight has no quantizer, or transforms are not merged yet.
    """
    blocks = round_blocks_(
        _Clipping(model, windows, token_weights), kept=kept, belongs_to=belongs_to, resume=resume, progress=progress
    )
    linears = {name: report for block in blocks for name, report in block.report.items()}
    return ClippingReport(linears, sum(block.seconds for block in blocks))
