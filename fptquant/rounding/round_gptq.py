"""GPTQ as a rounding stage: every weight is rounded for the inputs that it will meet, quantized and from rounded weights.

Blocks are worked on as in `fptquant.rounding.hessian_pass`. Memory: what stands there, and four more matrices of a Hessian's size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fptquant.files import KeptFiles
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.quantizers.clip_range import clip_range_
from fptquant.quantizers.gptq import Factor, GPTQOptions, factorize, gptq_round
from fptquant.quantizers.quantizer import Quantizer
from fptquant.rounding.hessian_pass import HessianPass
from fptquant.rounding.round_blocks import round_blocks_
from fptquant.rounding.token_weights import TokenWeights
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LinearReport:
    """How one weight was rounded."""

    loss: float
    """Sum over the rows of (w - q) H (w - q)^T, with the damped Hessian."""
    damping: float
    """The share of the mean diagonal that was added."""


class _GPTQ(HessianPass):
    """Rounds each weight where it is reached, with ``clip`` after its range was narrowed for the same inputs."""

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, options: GPTQOptions, token_weights: TokenWeights | None = None
    ) -> None:
        super().__init__(model, windows, token_weights)
        self.settings = options
        self._factor: tuple[Tensor, Factor] | None = None

    def work_(self, linear: QuantizedLinear, quantizer: Quantizer, hessian: Tensor, name: str) -> dict[str, Any]:
        if self._factor is None or self._factor[0] is not hessian:
            self._factor = None
            self._factor = (hessian, factorize(hessian, self.settings, name))
        factor = self._factor[1]
        if self.settings.clip:
            clip_range_(linear.weight, quantizer, hessian)
        rounded, loss = gptq_round(linear.weight, quantizer, factor, self.settings)
        linear.weight.copy_(rounded)
        return asdict(LinearReport(loss, factor.damping))


@dataclass(frozen=True)
class GPTQReport:
    """How every linear was rounded, by name, and how long it took in all parts of the run."""

    linears: dict[str, LinearReport]
    seconds: float


def round_gptq_(
    model: PreTrainedModel,
    windows: Tensor,
    options: GPTQOptions | None = None,
    *,
    token_weights: TokenWeights | None = None,
    kept: KeptFiles | None = None,
    belongs_to: str = "",
    resume: bool = False,
    progress: Progress = quiet,
) -> GPTQReport:
    """Rounds every quantized weight of an instrumented model in place, whose ranges are set and whose quantizers are on.

    Several processes share the windows, and all get the weights of the main one.

    Shape:
        windows: [windows, window], int64, the calibration text.

    Args:
        token_weights: as in `fptquant.rounding.hessian_pass.HessianPass`; what decides them is part of ``belongs_to``.
        kept, belongs_to, resume: as in `fptquant.rounding.round_blocks.round_blocks_`.

    Raises:
        UserError: if a weight has no quantizer, transforms are not merged yet, or an input holds NaN or infinity.
    """
    method = _GPTQ(model, windows, GPTQOptions() if options is None else options, token_weights)
    blocks = round_blocks_(method, kept=kept, belongs_to=belongs_to, resume=resume, progress=progress)
    linears = {name: LinearReport(**report) for block in blocks for name, report in block.report.items()}
    return GPTQReport(linears, sum(block.seconds for block in blocks))
