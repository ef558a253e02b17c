"""A prefix: tokens before every text, of which only the keys and values are left, in full precision.

Token i of a text attends to P prefix tokens and to tokens 0..i of its own. RoPE makes scores depend on differences of
positions alone, so the prefix stands at positions -P..-1 and the text keeps its own positions, masks and cache:
logits(prefix, text) = concatenation, without a trace of it in what the caller gives or gets.

The prefix is no part of any cache: a caller's cache holds the text alone. Where attention slides over a window, the prefix stays
visible to every token, as it must to keep the massive activations away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fptquant.errors import UserError
from fptquant.models.architectures import view_model
from fptquant.models.cache_argument import cache_argument
from fptquant.models.context import ForwardContext
from fptquant.models.heads import transform_keys
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.wide_buffers import WideBuffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of RoPE whose angles are position times a fixed frequency."""


class Prefix(WideBuffers):
    """Keys and values of the prefix for one attention module; empty until `set_prefix_` fills it.

    A call gives the (key, value) that attention puts before those of the text. Whoever changes keys and values at run time
    (T_k, T_v while they are trained and not merged) changes these too, by a forward hook of this module.

    Shape: key, value [kv_heads, P, head_dim], float32 or wider; keys after RoPE and before T_h, at positions -P..-1. They keep that
        dtype when the model is converted to a narrower one.
    """

    wide: ClassVar[tuple[str, ...]] = ("key", "value")
    key: Tensor | None
    value: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    @property
    def length(self) -> int:
        """P; 0 while the prefix is empty or switched off."""
        return self.key.shape[1] if self.enabled and self.key is not None else 0

    def forward(self) -> tuple[Tensor, Tensor]:
        assert self.key is not None
        assert self.value is not None
        return self.key, self.value

    def extra_repr(self) -> str:
        return f"{self.length} tokens"


def prefix_keys_values(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The keys and values that an attention module puts before those of the text, or None without a prefix.

    The one place where attention asks for them. A pass that plays the full-precision teacher has none: what a prefix is
    measured against is the model without it.

    Shape: both [kv_heads, P, head_dim]; keys after RoPE, at positions -P..-1, and after T_h or P_h.
    """
    prefix, context = module.prefix, module.context
    assert isinstance(context, ForwardContext)
    if not isinstance(prefix, Prefix) or prefix.length == 0 or context.full_precision:
        return None
    key, value = prefix()
    return transform_keys(module, key), value


def prepend(prefix: Tensor, x: Tensor) -> Tensor:
    """The keys or the values of a prefix [kv_heads, P, head_dim] before those of each text [B, kv_heads, Tk, head_dim]."""
    return torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1, -1), x], dim=2)


def put_prefix_first(
    prefix: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the prefix before the text; every query attends to all of the prefix.

    Without a mask several queries are causal and stand at the beginning of the keys (an empty static cache has more),
    and one query attends to every key, as in the model library.

    Shape: prefix [kv_heads, P, head_dim] twice; query [B, heads, Tq, head_dim]; key, value [B, kv_heads, Tk, head_dim];
        mask bool or additive [.., .., Tq, Tk] or None; returns key and value [B, kv_heads, P + Tk, head_dim] and the
        mask [.., .., Tq, P + Tk].
    """
    queries, length = query.shape[2], prefix[0].shape[1]
    if mask is None and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()[None, None]
    key, value = (prepend(part, x) for part, x in zip(prefix, (key, value), strict=True))
    if mask is not None:
        free = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([free((*mask.shape[:-1], length)), mask], dim=-1)
    return key, value, mask


def shift_keys(keys: Tensor, inverse_frequencies: Tensor, steps: int) -> Tensor:
    """Moves keys by ``steps`` positions: RoPE pair i (dimensions i and i + D/2) turns by steps * inverse_frequencies[i].

    A factor that RoPE put on the keys (YaRN) stays as it is.

    Shape: keys [..., D] after RoPE; inverse_frequencies [D/2]; returns keys' shape and dtype; computed in float64.
    """
    angle = inverse_frequencies.to(keys.device, torch.float64) * steps
    cosine, sine = angle.cos(), angle.sin()
    first, second = keys.double().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(keys.dtype)


def check_prefix_model(model: PreTrainedModel) -> None:
    """Finds out whether a prefix can stand before every text of this model.

    Raises:
        UserError: if the angles of RoPE depend on the length of the text.
    """
    check_movable(model, "a prefix", "quantization.prefix")


def check_movable(model: PreTrainedModel, what: str, setting: str) -> None:
    """Finds out whether this model computes the same of a text wherever it stands; errors as in `check_prefix_model`."""
    if not is_movable(model):
        raise UserError(
            f"{what} is not possible with RoPE of type {_rope_type(model)}, whose frequencies change with the length of the text; "
            f"set {setting}=null (possible: {', '.join(ROPE_TYPES)})"
        )


def is_movable(model: PreTrainedModel) -> bool:
    """Whether the frequencies of the model's RoPE are the same for texts of any length."""
    return _rope_type(model) in ROPE_TYPES


def _rope_type(model: PreTrainedModel) -> str:
    return getattr(view_model(model).get("rotary"), "rope_type", "default")


def check_prefix_length(model: PreTrainedModel, length: int) -> None:
    """Finds out whether the model can read a prefix of this length at once.

    Raises:
        UserError: if the prefix is longer than the window over which attention slides.
    """
    sliding = getattr(model.config, "sliding_window", None)
    if sliding is not None and length > sliding:
        raise UserError(f"a prefix of {length} tokens is longer than the model's sliding window of {sliding}; give a shorter one")


@torch.no_grad()
def compute_prefix_(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Reads the prefix once, in full precision, and keeps its keys and values; later passes have it before their text.

    The model was prepared by `fptquant.models.instrument.instrument` with a prefix, its transforms are merged, and its
    quantizers are off.

    Raises:
        UserError: if the model was not prepared so, or cannot have this prefix.
    """
    check_prefix_model(model)
    check_prefix_length(model, len(ids))
    prefixes = model_prefixes(model)
    if not prefixes:
        raise UserError("this model is not prepared for a prefix; set quantization.prefix before calibrating")
    if any(module.mode != "off" for module in model.modules() if isinstance(module, Quantizer)):
        raise UserError("the prefix is computed in full precision; switch the quantizers off before")
    view, cache = view_model(model), DynamicCache()
    context = view.decoder.context
    assert isinstance(context, ForwardContext)
    with prefix_off(model), context.teacher():  # keys before T_h or P_h, which are moved to other positions
        tokens = torch.tensor([list(ids)], device=model.device)
        view.decoder(input_ids=tokens, use_cache=True, **{cache_argument(type(view.decoder)): cache})
    frequencies = view.get("rotary").inv_freq
    assert isinstance(frequencies, Tensor)
    for prefix, layer in zip(prefixes, cache.layers, strict=True):
        fill_prefix_(prefix, layer, frequencies)


def fill_prefix_(prefix: Prefix, layer: Any, inverse_frequencies: Tensor) -> None:
    """Keeps what one layer of a cache holds after the prefix was read at positions 0..P-1."""
    dtype = torch.promote_types(layer.keys.dtype, torch.float32)
    prefix.key = shift_keys(layer.keys[0].to(dtype), inverse_frequencies, -layer.keys.shape[2])
    prefix.value = layer.values[0].to(dtype).clone()


def model_prefixes(model: PreTrainedModel) -> list[Prefix]:
    """The prefix of every block, in their order; empty if the model was not prepared for one."""
    found = (getattr(block.attention, "prefix", None) for block in view_model(model).blocks)
    return [prefix for prefix in found if isinstance(prefix, Prefix)]


def prefix_length(model: PreTrainedModel) -> int:
    """Tokens that stand before every text of this model."""
    return max((prefix.length for prefix in model_prefixes(model)), default=0)


@contextmanager
def prefix_off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its prefix meanwhile; a full-precision teacher that shares the student's weights runs so."""
    before = [(prefix, prefix.enabled) for prefix in model_prefixes(model)]
    for prefix, _ in before:
        prefix.enabled = False
    try:
        yield
    finally:
        for prefix, enabled in before:
            prefix.enabled = enabled
