"""Sets the static ranges: weights from themselves, activations and KV caches from calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fptquant.models.adapter import view_model
from fptquant.models.instrument import iter_quantizers, set_modes
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_weight_ranges_(model: PreTrainedModel, *, progress: Progress = quiet) -> None:
    """Sets the range of every weight quantizer from its weight, and switches it on."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear) and module.weight_quantizer is not None]
    for index, linear in enumerate(linears):
        assert linear.weight_quantizer is not None
        linear.weight_quantizer.set_range_from(linear.weight)
        linear.weight_quantizer.mode = "on"
        progress(index + 1, len(linears), "weight ranges")


@torch.no_grad()
def set_activation_ranges_(model: PreTrainedModel, windows: Tensor, *, progress: Progress = quiet) -> None:
    """Sets the ranges of activation and KV cache quantizers from calibration windows, and switches them on.

    Two passes over the windows where a range is searched (min and max, then the error of every candidate), one where
    min-max ranges suffice, none where all are dynamic. Nothing is quantized while values are observed, weights included:
    every range is that of the full-precision model's values. No activation is kept, whatever the number of windows.

    Shape:
        windows: [windows, window], int64.

    Raises:
        UserError: if a static quantizer saw no value.
    """
    quantizers = [quantizer for kind in ("activation", "kv_cache") for _, quantizer in iter_quantizers(model, kind)]
    weights = {quantizer: quantizer.mode for _, quantizer in iter_quantizers(model, "weight")}
    static = [quantizer for quantizer in quantizers if not quantizer.dynamic]
    passes = ["observe_range"] if static else []
    passes += ["observe_errors"] if any(quantizer.needs_errors for quantizer in static) else []
    decoder = view_model(model).decoder
    set_modes(model, "off", "weight")
    for number, mode in enumerate(passes):
        for quantizer in static:
            quantizer.mode = "observe_range" if mode == "observe_range" else "observe_errors"
        for index, window in enumerate(windows):
            with torch.inference_mode():  # not around finish_ranges: a backward pass could not use such scales
                decoder(input_ids=window[None].to(model.device), use_cache=False)
            progress(number * len(windows) + index + 1, len(passes) * len(windows), "activation ranges")
    for quantizer in static:
        quantizer.finish_ranges()
    for quantizer in quantizers:
        quantizer.mode = "on"
    for quantizer, previous in weights.items():
        quantizer.mode = previous
