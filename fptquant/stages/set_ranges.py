"""Sets the static ranges: weights from themselves, activations and KV caches from calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.models.architectures import view_model
from fptquant.models.context import placed
from fptquant.models.instrument import iter_quantizers, quantized_linears, set_modes
from fptquant.quantizers.quantizer import Mode, Quantizer
from fptquant.quantizers.ranges import RangeSetter
from fptquant.quantizers.sites import Kind, kind_of
from fptquant.stages.distributed import own, reduced, world_size
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_weight_ranges_(model: nn.Module, *, progress: Progress = quiet) -> None:
    """Sets the range of every weight quantizer of a model, or of a part of one, from its weight, and switches it on."""
    linears = quantized_linears(model)
    for index, (linear, quantizer) in enumerate(linears):
        quantizer.set_range_from(linear.merged_weight())
        quantizer.mode = "on"
        progress(index + 1, len(linears), "weight ranges")


@torch.no_grad()
def set_activation_ranges_(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    kinds: Sequence[Kind] = ("activation", "kv_cache"),
    first_position: Callable[[int], int] = lambda window: 0,
    progress: Progress = quiet,
) -> None:
    """Sets the centers and ranges of activation and KV cache quantizers from calibration windows, and switches them on.

    Two passes over the windows where a range is searched (min and max, then the error of every candidate), one where
    min-max ranges suffice, none where all are dynamic; one more, before, for centers. Nothing is quantized while values are
    observed, weights included: every range is that of the full-precision model's values. No activation is kept, whatever the
    number of windows. Several processes take turns at the windows.

    Args:
        kinds: those whose centers and ranges are set; the other kind keeps its own.
        first_position: of the window of an index. RoPE makes what a model computes depend on differences of positions alone, but
            the keys on positions: their ranges hold for those at which they were seen.

    Shape:
        windows: [windows, window], int64.

    Raises:
        UserError: if a static quantizer saw no value.
    """
    decoder = view_model(model).decoder

    def run(index: int) -> None:
        tokens = windows[index][None].to(model.device)
        decoder(input_ids=tokens, use_cache=False, **placed(tokens, [first_position(index)]))

    observe_windows_(model, run, len(windows), kinds=kinds, shared=True, progress=progress)


@torch.no_grad()
def observe_windows_(
    module: nn.Module,
    run: Callable[[int], None],
    windows: int,
    *,
    kinds: Sequence[Kind] = ("activation", "kv_cache"),
    at_least_once: bool = False,
    shared: bool = False,
    progress: Progress = quiet,
) -> None:
    """`set_activation_ranges_` for the quantizers of ``module``, a model or a part of one.

    Args:
        run: runs the window of this index through the module; called for every window, once for each pass.
        at_least_once: make one pass even if no range has to be set.
        shared: every process runs its share of the windows, if there are enough, and all get the ranges of all windows.
    """
    quantizers = [quantizer for kind in kinds for _, quantizer in iter_quantizers(module, kind)]
    others = {quantizer: quantizer.mode for name, quantizer in iter_quantizers(module) if kind_of(name) not in kinds}
    static = [quantizer for quantizer in quantizers if not quantizer.dynamic]
    passes: list[Mode] = ["observe_mean"] if any(quantizer.centered for quantizer in quantizers) else []
    passes += ["observe_range"] if static else ["off"] * (at_least_once and not passes)
    passes += ["observe_errors"] if any(quantizer.needs_errors for quantizer in static) else []
    set_modes(module, "off")
    shared = shared and windows >= world_size()
    indices = own(range(windows)) if shared else range(windows)
    for number, mode in enumerate(passes):
        for quantizer in quantizers if mode == "observe_mean" else static:
            quantizer.mode = mode
        for done, index in enumerate(indices, start=number * len(indices) + 1):
            with torch.inference_mode():  # not around finish_ranges: a backward pass could not use such scales
                run(index)
            progress(done, len(passes) * len(indices), "activation ranges")
        if shared and mode == "observe_mean":
            _add_up_(quantizers)
        elif shared:
            _combine_([quantizer.observed for quantizer in static if quantizer.observed is not None], mode)
        if mode == "observe_mean":
            for quantizer in quantizers:
                quantizer.finish_mean()
                quantizer.mode = "off"
    for quantizer in static:
        quantizer.finish_ranges()
    for quantizer in quantizers:
        quantizer.mode = "on"
    for quantizer, previous in others.items():
        quantizer.mode = previous


def _add_up_(quantizers: Sequence[Quantizer]) -> None:
    """Gives every process the sums of all."""
    for quantizer in quantizers:
        if quantizer.observed_sum is not None:
            quantizer.observed_sum = reduced(quantizer.observed_sum, "sum")


def _combine_(setters: Sequence[RangeSetter], mode: Mode) -> None:
    """Gives every process what all have observed in a pass."""
    for setter in setters:
        if mode == "observe_range" and setter.lo is not None and setter.hi is not None:
            setter.lo, setter.hi = reduced(setter.lo, "min"), reduced(setter.hi, "max")
        elif mode == "observe_errors" and setter.evidence is not None:
            setter.evidence = reduced(setter.evidence, "sum")
