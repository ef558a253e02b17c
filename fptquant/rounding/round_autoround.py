"""AutoRound as a rounding stage: how weights are rounded, and where their ranges end, is learned from each block's output.

Two streams of hidden states go from block to block: that of the model in full precision (transforms merged, prefix in place), and
that of the quantized one. The block learns to give, for the inputs that the rounded blocks before it make (activations and caches
quantized, where the setting does so), what the full-precision block gives for full-precision inputs: mean squared error, or that of
each token in proportion to its own size, signed gradients, the batch of each iteration drawn at random.

An iteration counts by its loss as a share of what rounding to nearest has on the same windows, so that different batches compare;
the best one is kept. If all windows together do not confirm it, the block stays rounded to nearest. With S_n, too, it is the true
residual whose error counts.

Memory: five times the hidden states of all windows of a process; while a block learns, its activations and their gradients for
2,048 tokens at a time, and eight times its weights in float32 (offsets, the best ones, their gradients, quantized weights).

Source: arXiv 2309.05516, Algorithm 1, with the two streams of its authors' program; the comparison with nearest is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.files import KeptFiles
from fptquant.models.instrument import quantizers_off
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartState
from fptquant.quantizers.autoround import AutoRoundOptions, LearnedRounding
from fptquant.quantizers.quantizer import Quantizer
from fptquant.rounding.round_blocks import BlockMethod, Linears, Tick, round_blocks_
from fptquant.stages.distributed import broadcast_, own, rank, reduced, world_size
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_AT_ONCE = 2048
"""Tokens that go through a block together, but never less than a window."""


@dataclass(frozen=True)
class BlockReport:
    """How one block was rounded: errors of its output on all windows, as the objective says, and the best iteration."""

    nearest: float
    learned: float
    """Never above ``nearest``."""
    best_iteration: int
    """0 is rounding to nearest."""
    seconds: float


class _AutoRound(BlockMethod):
    """Carries both streams, and lets the weights of a block learn."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, options: AutoRoundOptions, seed: int) -> None:
        super().__init__(model, windows)
        self.settings = (options, seed)
        self.units = options.iterations
        self._options, self._seed = options, seed
        self._shared = 1 < world_size() <= len(windows)
        self._own = own(torch.arange(len(windows))) if self._shared else torch.arange(len(windows))
        self._tokens = windows[self._own].to(model.device)
        self._at_once = max(1, TOKENS_AT_ONCE // windows.shape[1])

    def begin(self) -> None:
        self._state = self.decoder.run(self._tokens, None)
        with quantizers_off(self.model):
            self._exact = self.decoder.run(self._tokens, None)

    def look(self) -> None:
        with quantizers_off(self.model):
            self._exact = self._through(self._exact)

    def go_on(self) -> None:
        self._state = self._through(self._state)

    def _through(self, state: PartState) -> PartState:
        """The block's output for the windows of this process."""
        return self.decoder.run_in_parts(self._tokens, state, self._at_once)

    def _run(self, state: PartState, part: Tensor) -> PartState:
        return self.decoder.run(self._tokens[part], state.rows(part))

    def round_(self, linears: Linears, tick: Tick) -> dict[str, Any]:
        inputs = self._state
        self.go_on()
        nearest_state, nearest = self._state, self._all_losses()
        block = _LearningBlock(linears, self._options, shared=self._shared)
        if not bool(torch.isfinite(nearest).all()):
            raise UserError(f"the output of {block.name} holds NaN or infinity; check the layers before it, or use a wider dtype")
        best_iteration = self._learn(block, inputs, nearest, tick)
        block.finish_()
        self._state = self._through(inputs)
        learned = self._all_losses()
        if not learned.mean() < nearest.mean():
            block.restart_()
            block.finish_()
            self._state, learned, best_iteration = nearest_state, nearest, 0
        return {"nearest": float(nearest.mean()), "learned": float(learned.mean()), "best_iteration": best_iteration}

    def _losses(self, output: PartState, exact: PartState) -> Tensor:
        """Of each window, [windows], float32 or wider."""
        return output.errors(exact, self._options.objective).mean(1)

    def _all_losses(self) -> Tensor:
        """Of all windows, those of other processes included."""
        losses = self._losses(self._state, self._exact)
        if not self._shared:
            return losses
        everyones = losses.new_zeros(len(self.windows))
        everyones[self._own.to(losses.device)] = losses
        return reduced(everyones, "sum")

    def _learn(self, block: _LearningBlock, inputs: PartState, nearest: Tensor, tick: Tick) -> int:
        """Leaves the best state of the block in place, and returns its iteration."""
        generator = torch.Generator().manual_seed(self._seed)
        best, least = 0, 1.0
        for iteration in range(self._options.iterations):
            batch = torch.randperm(len(self.windows), generator=generator)[: self._options.batch].to(self.model.device)
            block.place_()
            share = float(self._backward(inputs, self._own_part(batch)) / nearest[batch].sum())
            if share < least:
                best, least = iteration, share
                block.keep_()
            block.step_(self._options.rate(iteration))
            if iteration + 1 < self._options.iterations:
                tick(iteration + 1, f"{block.name}: {least:.3f} of the error of rounding to nearest")
        block.restore_()
        return best

    def _own_part(self, batch: Tensor) -> Tensor:
        """Where this process has its windows of a batch."""
        return batch[batch % world_size() == rank()] // world_size() if self._shared else batch

    def _backward(self, inputs: PartState, batch: Tensor) -> Tensor:
        """The summed losses of all processes; the gradients of this one's windows reach its weights."""
        total = torch.zeros((), dtype=torch.float64, device=batch.device)
        for part in torch.split(batch, self._at_once) if len(batch) else ():
            with torch.enable_grad():
                output = self._run(inputs, part)
                loss = self._losses(output, self._exact.rows(part)).sum()
                # Only signs count: the sum over tokens and channels instead of the mean keeps gradients in float16's range.
                (loss * output.hidden[0].numel()).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return reduced(total, "sum") if self._shared else total


class _LearningBlock:
    """The weights of a block while they learn: each linear holds W_q as a leaf, whose gradient goes on to offsets and ratios.

    So W_q is made once for all parts of a batch, and processes that share the batch add up this gradient alone.
    """

    def __init__(self, linears: Linears, options: AutoRoundOptions, *, shared: bool) -> None:
        self._shared = shared
        self._linears = [(linear, _quantizer(linear)) for linear in linears.values()]
        self._roundings = [
            LearnedRounding(linear.weight, quantizer, learn_clipping=options.learn_clipping) for linear, quantizer in self._linears
        ]
        self._made: list[Tensor] = []
        self.name = self._linears[0][1].name.rsplit(".", 2)[0]

    def place_(self) -> None:
        """Gives every linear the W_q of the present state, and no quantizer."""
        self._made = []
        for (linear, quantizer), rounding in zip(self._linears, self._roundings, strict=True):
            quantizer.mode = "off"
            rounding.require_gradients_(True)
            with torch.enable_grad():
                self._made.append(rounding.quantized())
            linear.weight.data = self._made[-1].detach().to(linear.weight.dtype)
            linear.weight.requires_grad_(True)
            linear.weight.grad = torch.zeros_like(linear.weight)  # a process may have no window in the batch

    def step_(self, rate: float) -> None:
        """Takes the gradients of W_q on to what is learned, and moves it."""
        for (linear, _), rounding, quantized in zip(self._linears, self._roundings, self._made, strict=True):
            assert linear.weight.grad is not None
            gradient = linear.weight.grad.to(quantized.dtype)
            quantized.backward(reduced(gradient, "sum") if self._shared else gradient)  # type: ignore[no-untyped-call]
            linear.weight.grad = None
            rounding.step_(rate)

    def finish_(self) -> None:
        """Leaves W_q in the linears and its range in their quantizers, which are on again."""
        self._made = []
        for (linear, quantizer), rounding in zip(self._linears, self._roundings, strict=True):
            rounding.require_gradients_(False)
            weight, quantizer.scale, zero = rounding.result()
            quantizer.zero_point = quantizer.zero_point if zero is None else zero
            quantizer.mode = "on"
            linear.weight.requires_grad_(False)
            linear.weight.grad = None
            linear.weight.data = weight
            # processors may differ in last bits
            broadcast_(part for part in (linear.weight, quantizer.scale, quantizer.zero_point) if part is not None)

    def keep_(self) -> None:
        for rounding in self._roundings:
            rounding.keep_()

    def restore_(self) -> None:
        for rounding in self._roundings:
            rounding.restore_()

    def restart_(self) -> None:
        for rounding in self._roundings:
            rounding.restart_()


def _quantizer(linear: QuantizedLinear) -> Quantizer:
    assert linear.weight_quantizer is not None
    return linear.weight_quantizer


@dataclass(frozen=True)
class AutoRoundReport:
    """How every block was rounded, by name, and how long it took in all parts of the run."""

    blocks: dict[str, BlockReport]
    seconds: float


def round_autoround_(
    model: PreTrainedModel,
    windows: Tensor,
    options: AutoRoundOptions | None = None,
    *,
    seed: int = 0,
    kept: KeptFiles | None = None,
    belongs_to: str = "",
    resume: bool = False,
    progress: Progress = quiet,
) -> AutoRoundReport:
    """Rounds every quantized weight of an instrumented model in place, whose ranges are set and whose quantizers are on.

    Weight ranges become the learned ones. The same seed draws the same batches in every block. Several processes share the windows
    of each batch, and all get the weights of the main one.

    Shape:
        windows: [windows, window], int64, the calibration text.

    Args:
        kept, belongs_to, resume: as in `fptquant.rounding.round_blocks.round_blocks_`.

    Raises:
        UserError: if a weight has no quantizer, transforms are not merged yet, or a block gives NaN or infinity.
    """
    method = _AutoRound(model, windows, AutoRoundOptions() if options is None else options, seed)
    blocks = round_blocks_(method, kept=kept, belongs_to=belongs_to, resume=resume, progress=progress)
    reports = {f"layers.{index}": BlockReport(**block.report, seconds=block.seconds) for index, block in enumerate(blocks)}
    return AutoRoundReport(reports, sum(block.seconds for block in blocks))
