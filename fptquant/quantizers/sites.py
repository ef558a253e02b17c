"""Where quantizers sit: the site points of a model, the named sets of points, and the quantizer each point gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, cast

from fptquant.errors import UserError
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor, PerToken
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.ranges import RangeMethod

if TYPE_CHECKING:
    from fptquant.config.quantization import QuantizationConfig

Kind = Literal["weight", "activation", "kv_cache"]
"""What a quantizer acts on; each kind has its own part of the config."""

BLOCK_POINTS = (
    "attn_in", "q_out", "k_out", "v_out", "q", "k_cache", "v_cache", "softmax_out", "o_in", "o_out", "residual_attn",
    "mlp_in", "gate_out", "up_out", "silu_out", "down_in", "down_out", "residual_mlp",
)  # fmt: skip
"""Points of every block in the order of data flow; ``q`` and ``k_cache`` come after RoPE."""

MODEL_POINTS = ("embedding_out", "final_norm_out")
"""Points that exist once."""

POINTS = (*BLOCK_POINTS, *MODEL_POINTS)

CACHE_POINTS = frozenset({"k_cache", "v_cache"})
"""Points that follow ``quantization.kv_cache``; the others follow ``quantization.activation``."""

HEAD_AXIS_POINTS = frozenset({"q", "k_cache", "v_cache", "softmax_out"})
"""Points with heads on axis 1: [batch, heads, tokens, any]."""

HEAD_CHANNEL_POINTS = frozenset({"q_out", "k_out", "v_out", "o_in"})
"""Points whose channels are heads times head_dim."""

CENTERED_POINTS = frozenset({"attn_in", "o_in", "mlp_in", "down_in"}) | CACHE_POINTS
"""Points at which a constant that is added costs nothing after them: biases take it up, and softmax does not see it."""

RESIDUAL_POINTS = frozenset({"residual_attn", "residual_mlp"})
"""Points between blocks and branches, which need the shared decoder layer."""

_LINEARS_KV = frozenset({"attn_in", "o_in", "mlp_in", "down_in"}) | CACHE_POINTS
_LINEARS_KV_BMM = _LINEARS_KV | {"q", "softmax_out"}
_ALL_EXCEPT_RESIDUAL = _LINEARS_KV_BMM | {
    "q_out", "k_out", "v_out", "o_out", "gate_out", "up_out", "silu_out", "down_out", "final_norm_out",
}  # fmt: skip
SITE_SETS: dict[str, frozenset[str]] = {
    "linears_kv": _LINEARS_KV,
    "linears_kv_bmm": _LINEARS_KV_BMM,
    "all_except_residual": _ALL_EXCEPT_RESIDUAL,
    "all": _ALL_EXCEPT_RESIDUAL | RESIDUAL_POINTS | {"embedding_out"},
}
"""Named sets of points, each a superset of the one before."""

INPUT_POINT = {
    "q_proj": "attn_in", "k_proj": "attn_in", "v_proj": "attn_in", "o_proj": "o_in",
    "gate_proj": "mlp_in", "up_proj": "mlp_in", "down_proj": "down_in",
}  # fmt: skip
"""The point at which the input of each linear is quantized."""

OUTPUT_POINT = {
    "q_proj": "q_out", "k_proj": "k_out", "v_proj": "v_out", "o_proj": "o_out",
    "gate_proj": "gate_out", "up_proj": "up_out", "down_proj": "down_out",
}  # fmt: skip
"""The point at which the output of each linear is quantized."""


def kind_of(name: str) -> Kind:
    """What a quantizer acts on, by its name.

    >>> kind_of("layers.3.k_cache"), kind_of("layers.3.down_proj.weight"), kind_of("final_norm_out")
    ('kv_cache', 'weight', 'activation')
    """
    last = name.rpartition(".")[2]
    if last == "weight":
        return "weight"
    return "kv_cache" if last in CACHE_POINTS else "activation"


def layer_and_site(name: str) -> tuple[int | None, str]:
    """The block in which a quantizer sits, None for those that exist once, and its name there.

    >>> layer_and_site("layers.3.k_cache"), layer_and_site("layers.3.down_proj.weight"), layer_and_site("final_norm_out")
    ((3, 'k_cache'), (3, 'down_proj.weight'), (None, 'final_norm_out'))
    """
    if not name.startswith("layers."):
        return None, name
    _, layer, site = name.split(".", 2)
    return int(layer), site


@dataclass(frozen=True)
class QuantizerSpec:
    """Everything a quantizer needs but its place."""

    bits: int
    symmetric: bool
    granularity: Granularity
    dynamic: bool
    range_method: RangeMethod
    full_precision_tokens: int = 0
    group_size: int | None = None
    """Channels that share a static range, for all tokens."""
    outlier_threshold: float | None = None
    """Magnitude from which a channel stays in full precision."""
    centered: bool = False
    """Whether the mean of each channel is left out of what is rounded."""

    @property
    def grid(self) -> IntegerGrid:
        """The integers that it rounds to."""
        return IntegerGrid(self.bits, self.symmetric)

    def build(self, name: str) -> Quantizer:
        """A new quantizer for the place called ``name``."""
        return Quantizer(
            self.grid,
            self.granularity,
            dynamic=self.dynamic,
            range_method=self.range_method,
            name=name,
            full_precision_tokens=self.full_precision_tokens,
            group_size=self.group_size,
            outlier_threshold=self.outlier_threshold,
            centered=self.centered,
        )


def _weight_granularity(name: str, group_size: int | None) -> Granularity:
    """Output channels are axis 0 of weights."""
    if name == "per_group":
        if group_size is None:
            raise UserError("quantization.weight.granularity = per_group needs quantization.weight.group_size")
        return PerGroup(group_size)
    return PerTensor() if name == "per_tensor" else PerChannel(0)


def _range_method(settings: Any) -> RangeMethod:
    return RangeMethod(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(RangeMethod)})


def weight_spec(quantization: QuantizationConfig) -> QuantizerSpec | None:
    """The quantizer of every linear's weight, or None at 16 bits."""
    weight = quantization.weight
    if weight.bits == 16:
        return None
    granularity = _weight_granularity(weight.granularity, weight.group_size)
    return QuantizerSpec(weight.bits, weight.symmetric, granularity, False, _range_method(weight.range))


def point_specs(quantization: QuantizationConfig, head_dim: int = 1) -> dict[str, QuantizerSpec]:
    """The quantizer of every point that has one: those of the site set, and those that an override gives bits.

    Args:
        head_dim: of the model; ranges per head need it.

    Raises:
        UserError: for an unknown site set or point, an override that would act on nothing, or a granularity that a point
            cannot have.
    """
    if quantization.sites not in SITE_SETS:
        raise UserError(f"unknown site set {quantization.sites}; choose one of {', '.join(SITE_SETS)}")
    for point in quantization.overrides:
        if point not in POINTS:
            near = get_close_matches(point, POINTS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"quantization.overrides: unknown site {point}; {hint}The sites are: {', '.join(POINTS)}")
    specs = {point: _point_spec(quantization, point, head_dim) for point in POINTS}
    return {point: spec for point, spec in specs.items() if spec is not None}


def _static_granularity(point: str, name: str, group_size: int | None, head_dim: int) -> tuple[Granularity, int | None]:
    """Granularity and group size of a static quantizer.

    Raises:
        UserError: if the point has no heads or channels to share a range, or the group size is missing.
    """
    if name == "per_head" and point in HEAD_AXIS_POINTS:
        return PerChannel(1), None
    if name == "per_head" and point in HEAD_CHANNEL_POINTS:
        return PerTensor(), head_dim
    if name == "per_group" and point != "softmax_out" and group_size is not None:
        return PerTensor(), group_size
    if name == "per_tensor":
        return PerTensor(), None
    raise UserError(f"quantization: {point} cannot have ranges {name} (group_size = {group_size}); set another granularity there")


def _point_spec(quantization: QuantizationConfig, point: str, head_dim: int) -> QuantizerSpec | None:
    base: Any = quantization.kv_cache if point in CACHE_POINTS else quantization.activation
    overrides: Mapping[str, Any] = cast(Any, quantization.overrides)
    override = overrides.get(point)
    in_set = point in SITE_SETS[quantization.sites]

    def setting(field: str) -> Any:
        own = getattr(override, field, None)
        return getattr(base, field) if own is None else own

    if not in_set and (override is None or override.bits is None):
        if override is not None:
            raise UserError(
                f"quantization.overrides.{point}: this site is not in the set {quantization.sites}; "
                "give the override bits, or choose a larger set"
            )
        return None
    if setting("bits") == 16:
        return None
    granularity: Granularity = PerToken()
    group_size = None
    if not base.dynamic:
        granularity, group_size = _static_granularity(point, setting("granularity"), setting("group_size"), head_dim)
    kept = getattr(override, "full_precision_tokens", None)
    return QuantizerSpec(
        bits=setting("bits"),
        symmetric=setting("symmetric"),
        granularity=granularity,
        dynamic=base.dynamic,
        range_method=_range_method(setting("range")),
        full_precision_tokens=quantization.full_precision_tokens if kept is None else kept,
        group_size=group_size,
        outlier_threshold=getattr(base, "outlier_threshold", None),
        centered=base.centered and point in CENTERED_POINTS,
    )
