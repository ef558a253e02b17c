"""GPTQ as a rounding stage: every weight is rounded for the inputs that it will meet, quantized and from rounded weights.

Blocks are worked on in their order, and the linears of a block in the order of its data flow: q, k and v, then o, gate and up,
then down. All calibration windows go through a block at once; where they reach a linear, the Hessian of its input is summed and its
weight rounded before the pass goes on. So one pass of each block is enough, and one Hessian is in memory at a time.

A block that is finished can be kept in a file, from which a run that was killed goes on.

Memory: hidden states of all windows, and while a block runs its activations for all windows (about five times
tokens x intermediate_size), and five float64 matrices of the size of a Hessian, columns^2.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.files import KeptFile, KeptFiles, read_file, to_bytes
from fptquant.fingerprint import model_digest, tensors_digest
from fptquant.models.adapter import LINEAR_NAMES, BlockView, view_model
from fptquant.models.instrument import get_context
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartialDecoder
from fptquant.quantizers.gptq import Factor, GPTQOptions, Hessian, factorize, gptq_round
from fptquant.stages.distributed import broadcast_, is_main, on_main, own, reduced, world_size
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "rounding the weights"


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


@contextmanager
def _rounding(linears: Iterable[QuantizedLinear], rounder: _Rounder) -> Iterator[None]:
    hooks = [linear.register_forward_pre_hook(rounder.reached) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linears(block: BlockView) -> dict[str, QuantizedLinear]:
    """The linears of a block by name.

    Raises:
        UserError: if one of them cannot be rounded.
    """
    found: dict[str, QuantizedLinear] = {}
    for name in LINEAR_NAMES:
        linear = block.linear(name)
        if not isinstance(linear, QuantizedLinear) or linear.weight_quantizer is None:
            raise UserError(f"layers.{block.index}.{name} has no weight quantizer; nothing can be rounded at 16 bits")
        if linear.merging is not None:
            raise UserError(f"layers.{block.index}.{name}: merge the transforms before rounding")
        found[name] = linear
    return found


@dataclass
class _Block:
    """What is reported of a block."""

    linears: dict[str, LinearReport]
    seconds: float


class _KeptBlock:
    """A file with the rounded weights of a block, their ranges, and what is reported of them. The main process alone uses it."""

    def __init__(self, file: KeptFile, linears: dict[str, QuantizedLinear], belongs_to: str) -> None:
        self.file, self.linears, self.belongs_to = file, linears, belongs_to

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            assert linear.weight_quantizer is not None
            ranges = {"scale": linear.weight_quantizer.scale, "zero_point": linear.weight_quantizer.zero_point}
            parts = {"weight": linear.weight, **ranges}
            found |= {f"{part}/{name}": value for part, value in parts.items() if value is not None}
        return found

    def write(self, block: _Block) -> None:
        """When it is time (`KeptFiles`)."""
        if is_main():
            rest = {"belongs_to": self.belongs_to, **asdict(block)}
            self.file.write(lambda: to_bytes({name: value.cpu().contiguous() for name, value in self._tensors().items()}, rest))

    def restore_(self) -> _Block | None:
        """Puts back what the file holds, in every process, and returns the report; None if there is no file of this run."""
        block = on_main(self._read)
        if block is not None:
            broadcast_(self._tensors().values())
        return block

    def _read(self) -> _Block | None:
        if not self.file.path.is_file():
            return None
        tensors, rest = read_file(self.file.path)
        if rest["belongs_to"] != self.belongs_to:
            return None
        for name, value in self._tensors().items():
            value.copy_(tensors[name])
        return _Block({name: LinearReport(**report) for name, report in rest["linears"].items()}, rest["seconds"])


@dataclass(frozen=True)
class GPTQReport:
    """How every linear was rounded, by name, and how long it took in all parts of the run."""

    linears: dict[str, LinearReport]
    seconds: float


@torch.no_grad()
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
        kept: where the weights of finished blocks are kept.
        belongs_to: what decides the result besides windows, options, weights and static ranges.
        resume: go on with the blocks that are kept, if they belong to this run.

    Raises:
        UserError: if a weight has no quantizer, transforms are not merged yet, or an input holds NaN or infinity.
    """
    options = GPTQOptions() if options is None else options
    view = view_model(model)
    linears = [_linears(block) for block in view.blocks]
    if kept is not None:
        belongs_to = f"{belongs_to} {options} {tensors_digest(windows)} {model_digest(model)}"
    decoder, tokens = PartialDecoder(model, get_context(model)), windows.to(model.device)
    shared = len(windows) >= world_size()
    tokens = own(tokens) if shared else tokens
    with decoder.only(-1):
        state = decoder.run(tokens, None)
    found: list[_Block] = []
    for block, own_linears in zip(view.blocks, linears, strict=True):
        start, rounder = time.perf_counter(), _Rounder(options, shared=shared)
        file = None if kept is None else _KeptBlock(kept.file(f"block-{block.index}.safetensors"), own_linears, belongs_to)
        known = file.restore_() if file is not None and resume else None
        with decoder.only(block.index), _rounding(own_linears.values(), rounder) if known is None else nullcontext():
            state = decoder.run(tokens, state)
        found.append(known or _Block(rounder.reports, time.perf_counter() - start))
        if file is not None and known is None:
            file.write(found[-1])
        progress(block.index + 1, view.num_layers, DESCRIPTION)
    return GPTQReport({name: report for block in found for name, report in block.linears.items()}, sum(b.seconds for b in found))
