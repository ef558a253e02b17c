"""Tiny models with quantizers whose ranges are set, for tests of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.config.quantization import QuantizationConfig
from fptquant.models.instrument import instrument, iter_quantizers, set_modes
from fptquant.models.quantized_linear import QuantizedLinear
from tests.models.tiny import tiny_model, token_ids


def setting(bits: int = 8, *, dynamic: bool = False, weight_bits: int = 16, **options: Any) -> QuantizationConfig:
    """A quantization config: all activations and caches alike."""
    part = {"bits": bits, "dynamic": dynamic}
    return QuantizationConfig.model_validate({"weight": {"bits": weight_bits}, "activation": part, "kv_cache": part, **options})


def set_ranges(model: PreTrainedModel, ids: Tensor) -> None:
    """Min-max ranges from one batch, then every quantizer on."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.weight_quantizer is not None:
            module.weight_quantizer.set_range_from(module.weight)
    set_modes(model, "observe_range", "activation")
    set_modes(model, "observe_range", "kv_cache")
    with torch.no_grad():
        model(ids)
    for name, quantizer in iter_quantizers(model):
        if not name.endswith(".weight"):
            quantizer.finish_ranges()
    set_modes(model, "on")


def quantized_model(
    architecture: str,
    quantization: QuantizationConfig,
    *,
    ids: Tensor | None = None,
    options: dict[str, Any] | None = None,
    **transforms: Any,
) -> PreTrainedModel:
    """A tiny model with every quantizer on, their ranges from ``ids``."""
    model = tiny_model(architecture, **(options or {}))
    instrument(model, quantization, **transforms)
    set_ranges(model, token_ids(4, 24, seed=7) if ids is None else ids)
    return model
