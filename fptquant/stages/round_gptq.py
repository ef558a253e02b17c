"""GPTQ as a rounding stage: every weight is rounded for the inputs that it will meet, quantized and from rounded weights.

Blocks are worked on in their order, and the linears of a block in the order of its data flow: q, k and v, then o, gate and up,
then down. All calibration windows go through a block at once; where they reach a linear, the Hessian of its input is summed and its
weight rounded before the pass goes on. So one pass of each block is enough, and one Hessian is in memory at a time.

Memory: hidden states of all windows, and while a block runs its activations for all windows (about five times
tokens x intermediate_size), and five float64 matrices of the size of a Hessian, columns^2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fptquant.files import KeptFiles
from fptquant.models.hooks import hooked
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartState
from fptquant.quantizers.gptq import Factor, GPTQOptions, Hessian, factorize, gptq_round
from fptquant.stages.distributed import broadcast_, own, reduced, world_size
from fptquant.stages.progress import Progress, quiet
from fptquant.stages.round_blocks import BlockMethod, Linears, Tick, round_blocks_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LinearReport:
    """How one weight was rounded."""

    loss: float
    """Sum over the rows of (w - q) H (w - q)^T, with the damped Hessian."""
    damping: float
    """The share of the mean diagonal that was added."""


class _Rounder:
    """Rounds the linears of one block as its pass reaches them."""

    def __init__(self, options: GPTQOptions, *, shared: bool) -> None:
        self.options, self.shared = options, shared
        self.reports: dict[str, LinearReport] = {}
        self._last: tuple[Tensor, Factor] | None = None

    def reached(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a `QuantizedLinear` with a weight quantizer."""
        assert isinstance(linear, QuantizedLinear)
        quantizer = linear.weight_quantizer
        assert quantizer is not None
        name = quantizer.name.removesuffix(".weight")
        factor = self._factor(linear, args[0], name)
        rounded, loss = gptq_round(linear.weight, quantizer, factor, self.options)
        linear.weight.copy_(rounded)
        # Processors differ in the last bits, and then in the rounding.
        broadcast_(part for part in (linear.weight, quantizer.scale, quantizer.zero_point) if part is not None)
        self.reports[name] = LinearReport(loss, factor.damping)

    def _factor(self, linear: QuantizedLinear, x: Tensor, name: str) -> Factor:
        """Of the inputs as they meet the weight, or that of the last linear if it read the same."""
        changed = linear.input_quantizer is not None or linear.online is not None or linear.scaled is not None
        if self._last is not None and self._last[0] is x and not changed:
            return self._last[1]
        self._last = None
        inputs = linear.prepare_input(x)
        inverse = linear.context.inverse_scale(x) if linear.scaled == "output" else None
        hessian = Hessian(linear.in_features, x.device)
        hessian.add(inputs if inverse is None else inputs * inverse)
        matrix = hessian.matrix()
        factor = factorize(reduced(matrix, "sum") if self.shared else matrix, self.options, name)
        self._last = (x, factor)
        return factor


class _GPTQ(BlockMethod):
    """All windows go through a block at once, and its linears are rounded where they are reached."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, options: GPTQOptions) -> None:
        super().__init__(model, windows)
        self.settings = options
        self._shared = len(windows) >= world_size()
        self._state: PartState | None = None

    def begin(self) -> None:
        tokens = self.windows.to(self.model.device)
        self._tokens = own(tokens) if self._shared else tokens
        self.go_on()

    def round_(self, linears: Linears, tick: Tick) -> dict[str, Any]:
        rounder = _Rounder(self.settings, shared=self._shared)
        with hooked(linear.register_forward_pre_hook(rounder.reached) for linear in linears.values()):
            self.go_on()
        return {name: asdict(report) for name, report in rounder.reports.items()}

    def go_on(self) -> None:
        self._state = self.decoder.run(self._tokens, self._state)


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
        kept, belongs_to, resume: as in `fptquant.stages.round_blocks.round_blocks_`.

    Raises:
        UserError: if a weight has no quantizer, transforms are not merged yet, or an input holds NaN or infinity.
    """
    method = _GPTQ(model, windows, GPTQOptions() if options is None else options)
    blocks = round_blocks_(method, kept=kept, belongs_to=belongs_to, resume=resume, progress=progress)
    linears = {name: LinearReport(**report) for block in blocks for name, report in block.report.items()}
    return GPTQReport(linears, sum(block.seconds for block in blocks))
