"""What the quantized modules of one model share during a forward pass: the place of each token and the running scale of S_n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.cache_argument import cache_argument, given_cache


class ForwardContext:
    """State of one forward pass of one model.

    ``index`` says where each token stands in its text, counted from 0; -1 is padding. From it every quantizer gets its
    kept tokens: those before its ``full_precision_tokens``, and padding, which bypass it and take no part in range
    setting. ``running_scale`` is sigma of S_n: the true residual is the carried one times sigma.

    Shape: index int64 [B, T] or [1, T], or None outside of a pass; running_scale [B, T, 1], float32 or wider.
    """

    def __init__(self) -> None:
        self.own_layers = False
        """Whether decoder layers were replaced, so that the library does not find them to record hidden states."""
        self.attention: str | None = None
        """The attention function without which the model computes something else; None for any."""
        self.full_precision = False
        """Whether linears leave out transforms that are not merged yet, and attention T_h and P_h: then the model computes what its
        teacher does."""
        self.index: Tensor | None = None
        self.running_scale: Tensor | None = None
        self.residual: Tensor | None = None
        """The carried residual, on its way from a norm to the layer that called it."""
        self._lowest: int | None = None
        self._kept: dict[int, Tensor] = {}
        self._scale_before: dict[int, Tensor | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardContext:
        """A copied model starts between two passes: tensors of a pass in flight belong to the old one."""
        copied = ForwardContext()
        copied.own_layers = self.own_layers
        copied.attention = self.attention
        memo[id(self)] = copied
        return copied

    def begin(self, index: Tensor | None) -> None:
        """Starts a pass over the tokens at ``index``, or none."""
        self.index = index
        self._lowest = None
        self._kept = {}

    def clear(self) -> None:
        """Forgets the pass."""
        self.begin(None)
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

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Passes leave out what `full_precision` says meanwhile."""
        before, self.full_precision = self.full_precision, True
        try:
            yield
        finally:
            self.full_precision = before

    def kept_tokens(self, x: Tensor, first: int) -> Tensor | None:
        """The tokens of ``x`` [B, T, C] that stay in full precision where ``first`` tokens of each text do.

        Shape: bool [B, T, 1] or [1, T, 1], or None where this pass has no such token.
        """
        kept = self._find_kept(first)
        return None if kept is None else kept.to(x.device)[:, :, None]

    def kept_heads(self, x: Tensor, first: int) -> Tensor | None:
        """As `kept_tokens`, for ``x`` [B, heads, T, any]: bool [B, 1, T, 1] or [1, 1, T, 1], or None."""
        kept = self._find_kept(first)
        return None if kept is None else kept.to(x.device)[:, None, :, None]

    def _find_kept(self, first: int) -> Tensor | None:
        """One mask for each number per pass; a step of decoding, beyond every first token, builds none."""
        if self.index is None:
            return None
        if self._lowest is None:
            self._lowest = int(self.index.min())
        if self._lowest >= first:
            return None
        if first not in self._kept:
            self._kept[first] = self.index < first
        return self._kept[first]


def find_token_index(length: int, past: int, inputs: dict[str, Any]) -> Tensor:
    """Where the tokens of this pass stand in their texts; -1 is padding.

    With a padding mask, tokens are counted from the first that is no padding, whatever the position ids say; without
    one, the position ids count, and without these the length of the cache.

    Shape: length = T; past = tokens that were seen before this pass; returns int64 [B, T] or [1, T].
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + length:
        real = mask[:, : past + length].bool()
        return (real.cumsum(1) - 1).masked_fill(~real, -1)[:, past:]
    if isinstance(positions, Tensor):
        return positions.reshape(-1, length)
    return torch.arange(past, past + length)[None]


def placed(tokens: Tensor, first: Sequence[int]) -> dict[str, Tensor]:
    """Arguments of a pass over texts [B, T] that stand at the positions from ``first`` on, although nothing is before them.

    The mask says where texts begin, so that the first tokens of a text are still its first (`find_token_index`).

    Shape: first has a place for each text.
    """
    if not any(first):
        return {}
    positions = torch.tensor(first)[:, None] + torch.arange(tokens.shape[1])
    return {"position_ids": positions.to(tokens.device), "attention_mask": torch.ones_like(tokens)}


def begin_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the decoder: fills its context. A plain function, so that deep copies stay independent."""
    context = module.context
    assert isinstance(context, ForwardContext)
    context.clear()
    attention = getattr(module.config, "_attn_implementation", None)
    if context.attention is not None and attention != context.attention:
        raise UserError(
            f"the attention function was changed to {attention}, which knows nothing of this model's prefix, queries or softmax "
            f'outputs; call model.set_attn_implementation("{context.attention}")'
        )
    names = ("input_ids", "attention_mask", "position_ids", cache_argument(type(module)), "inputs_embeds")
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
    cache = given_cache(inputs)
    past = int(cache.get_seq_length()) if cache is not None else 0
    context.begin(find_token_index(tokens.shape[1], past, inputs) if tokens.numel() else None)


def end_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder: lets go of the tensors of the pass unless a backward pass may replay layers."""
    context = module.context
    assert isinstance(context, ForwardContext)
    if not (module.training and getattr(module, "gradient_checkpointing", False)):
        context.clear()
