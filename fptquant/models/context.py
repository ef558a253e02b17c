"""What the quantized modules of one model share during a forward pass: kept tokens and the running scale of S_n."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fptquant.errors import UserError


class ForwardContext:
    """State of one forward pass of one model.

    ``kept`` marks the tokens that bypass every activation and cache quantizer and take no part in range setting: the
    first ``full_precision_tokens`` of each text, and padding. ``running_scale`` is sigma of S_n: the true residual is
    the carried one times sigma.

    Shape: kept: bool [B, T] or [1, T], or None where no token is kept; running_scale [B, T, 1], float32 or wider.
    """

    def __init__(self, full_precision_tokens: int = 0) -> None:
        self.full_precision_tokens = full_precision_tokens
        self.own_layers = False
        """Whether decoder layers were replaced, so that the library does not find them to record hidden states."""
        self.kept: Tensor | None = None
        self.running_scale: Tensor | None = None
        self.residual: Tensor | None = None
        """The carried residual, on its way from a norm to the layer that called it."""
        self._scale_before: dict[int, Tensor | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardContext:
        """A copied model starts between two passes: tensors of a pass in flight belong to the old one."""
        copied = ForwardContext(self.full_precision_tokens)
        copied.own_layers = self.own_layers
        memo[id(self)] = copied
        return copied

    def clear(self) -> None:
        """Forgets the pass."""
        self.kept = None
        self.running_scale = None
        self.residual = None
        self._scale_before = {}

    def enter_layer(self, index: int) -> None:
        """Restores the running scale that layer ``index`` started from, should its forward run again.

        Gradient checkpointing replays a layer during the backward pass, when ``running_scale`` is that of a later one.
        """
        if index in self._scale_before:
            self.running_scale = self._scale_before[index]
        else:
            self._scale_before[index] = self.running_scale

    def inverse_scale(self, x: Tensor) -> Tensor | None:
        """1 / sigma [B, T, 1] to multiply ``x`` by, or None outside of S_n."""
        return None if self.running_scale is None else self.running_scale.to(x.device).reciprocal()

    def kept_tokens(self, x: Tensor) -> Tensor | None:
        """The kept tokens as a mask for ``x`` [B, T, C]: bool [B, T, 1]."""
        return None if self.kept is None else self.kept.to(x.device)[:, :, None]

    def kept_heads(self, x: Tensor) -> Tensor | None:
        """The kept tokens as a mask for ``x`` [B, heads, T, any]: bool [B, 1, T, 1]."""
        return None if self.kept is None else self.kept.to(x.device)[:, None, :, None]


def find_kept_tokens(first: int, length: int, past: int, inputs: dict[str, Any]) -> Tensor | None:
    """Marks the first ``first`` tokens of each text, and padding, among the tokens of this pass.

    With a padding mask, tokens are counted from the first that is no padding, whatever the position ids say; without
    one, the position ids count, and without these the length of the cache.

    Shape: length = T; past = tokens that were seen before this pass; returns bool [B, T] or [1, T], or None if no token
        is marked.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + length:
        real = mask[:, : past + length].bool()
        index = real.cumsum(1) - 1
        kept = ((index < first) | ~real)[:, past:]
    elif first == 0:
        return None
    elif positions is not None:
        kept = positions.reshape(-1, length) < first
    else:
        kept = torch.arange(past, past + length)[None] < first
    return kept if bool(kept.any()) else None


def begin_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the decoder: fills its context. A plain function, so that deep copies stay independent."""
    context = module.context
    assert isinstance(context, ForwardContext)
    context.clear()
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
    inputs = dict(zip(names, args, strict=False)) | kwargs
    asked = inputs.get("output_hidden_states") or getattr(module.config, "output_hidden_states", False)
    if context.own_layers and asked:
        raise UserError(
            "output_hidden_states is not possible where the residual is scaled or quantized; "
            "register forward hooks on the decoder layers instead"
        )
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None:
        return  # the model itself reports this mistake
    cache = inputs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    kept = find_kept_tokens(context.full_precision_tokens, tokens.shape[1], past, inputs)
    context.kept = None if kept is None else kept.to(tokens.device)


def end_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder: lets go of the tensors of the pass unless a backward pass may replay layers."""
    context = module.context
    assert isinstance(context, ForwardContext)
    if not (module.training and getattr(module, "gradient_checkpointing", False)):
        context.clear()
