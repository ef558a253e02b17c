"""What a config says of quantizers: where they sit, their bits, granularities and ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fptquant.config.labels import AUTO_PREFIX, expand_label, setting_label
from fptquant.config.strict import StrictModel

SitePoint = Literal[
    "embedding_out", "attn_in", "q_out", "k_out", "v_out", "q", "k_cache", "v_cache", "softmax_out", "o_in", "o_out",
    "residual_attn", "mlp_in", "gate_out", "up_out", "silu_out", "down_in", "down_out", "residual_mlp",
    "final_norm_out",
]  # fmt: skip
"""Every place in a model where a quantizer can sit."""

SiteSet = Literal["linears_kv", "linears_kv_bmm", "all_except_residual", "all"]
"""Named sets of sites, each a superset of the one before."""

_LINEARS_KV: frozenset[SitePoint] = frozenset({"attn_in", "o_in", "mlp_in", "down_in", "k_cache", "v_cache"})
_LINEARS_KV_BMM: frozenset[SitePoint] = _LINEARS_KV | {"q", "softmax_out"}
_ALL_EXCEPT_RESIDUAL: frozenset[SitePoint] = _LINEARS_KV_BMM | {
    "q_out", "k_out", "v_out", "o_out", "gate_out", "up_out", "silu_out", "down_out", "final_norm_out",
}  # fmt: skip
SITE_SETS: dict[SiteSet, frozenset[SitePoint]] = {
    "linears_kv": _LINEARS_KV,
    "linears_kv_bmm": _LINEARS_KV_BMM,
    "all_except_residual": _ALL_EXCEPT_RESIDUAL,
    "all": _ALL_EXCEPT_RESIDUAL | {"residual_attn", "residual_mlp", "embedding_out"},
}
"""The site points of each set."""

HEAD_SITES: frozenset[SitePoint] = frozenset({"q", "k_cache", "v_cache", "softmax_out", "q_out", "k_out", "v_out", "o_in"})
"""Sites with heads, which can have a range for each."""

CACHE_SITES: frozenset[SitePoint] = frozenset({"k_cache", "v_cache"})
"""Sites that follow ``quantization.kv_cache``; all others follow ``quantization.activation``."""


def _check_bits(bits: int) -> int:
    if bits != 16 and not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits are not possible; choose 2 to 8, or 16 (left in full precision)")
    return bits


Bits = Annotated[int, AfterValidator(_check_bits)]
"""Bits of a grid: 2 to 8, or 16 for no quantizer."""


def _check_prefix(prefix: Any) -> Any:
    """One message instead of one for each kind of value."""
    ids = isinstance(prefix, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prefix)
    if prefix is None or (isinstance(prefix, str) and prefix):
        return prefix
    if not (ids and prefix and min(prefix) >= 0):
        raise ValueError(f"{prefix!r} is no prefix; write auto, a text, a list of token ids, or null")
    return prefix


PrefixSetting = Annotated[str | list[int] | None, BeforeValidator(_check_prefix)]
"""``auto``, a text, token ids, or nothing."""


class RangeConfig(StrictModel):
    """How a static quantizer finds its range; fields as in `fptquant.quantizers.ranges.RangeMethod`."""

    method: Literal["min_max", "percentile", "mse", "lp"] = "min_max"
    p: float = Field(default=2.4, ge=2, le=4, description="exponent of sum |x - fake_quant(x)|^p (lp)")
    percentile: float = Field(default=99.99, gt=50, le=100, description="share of values inside the range (percentile)")
    candidates: int = Field(default=80, ge=2, le=1000, description="clipping ratios that are tried (mse, lp)")
    lowest_ratio: float = Field(default=0.3, gt=0, lt=1, description="smallest clipping ratio that is tried (mse, lp)")
    clip_ratio: float = Field(
        default=1.0, gt=0, le=1, description="share of each token's range that is covered (dynamic); auto: by the bits"
    )


class WeightConfig(StrictModel):
    """Quantizer of every linear's weight."""

    bits: Bits = 16
    symmetric: bool = True
    granularity: Literal["per_channel", "per_group", "per_tensor"] = "per_channel"
    group_size: int | None = Field(default=None, ge=1)
    range: RangeConfig = RangeConfig()


def _fill_granularity(data: Any, static: str) -> Any:
    """A dynamic quantizer works per token, a static one as ``static`` says, unless the file says otherwise."""
    if isinstance(data, dict) and "granularity" not in data:
        return {**data, "granularity": "per_token" if data.get("dynamic") is True else static}
    return data


_NARROW = {"activation": 0.9, "kv_cache": 0.95}
"""What ``clip_ratio: auto`` stands for with 4 bits or fewer, whose steps become finer by what is clipped."""


def _with_clip_ratio(settings: Any, part: str, bits: Any, dynamic: Any) -> Any:
    """A range's settings with a number for ``clip_ratio: auto``: 1 for dynamic grids of more than 4 bits."""
    if not isinstance(settings, dict) or settings.get("clip_ratio") != "auto":
        return settings
    whole = dynamic is True and isinstance(bits, int) and bits > 4
    return {**settings, "clip_ratio": 1.0 if whole else _NARROW[part]}


def _fill_part(data: Any, part: str, granularity: str) -> Any:
    """What a part leaves to be filled in: its granularity, and the share of each token's range."""
    data = _fill_granularity(data, granularity)
    if isinstance(data, dict) and "range" in data:
        return {**data, "range": _with_clip_ratio(data["range"], part, data.get("bits"), data.get("dynamic"))}
    return data


def _fill_override(site: str, override: Any, parts: dict[str, Any]) -> Any:
    """A site of other bits than its part, whose share of each token's range is ``auto``, has a range of its own."""
    name = "kv_cache" if site in CACHE_SITES else "activation"
    part = parts.get(name)
    if not isinstance(override, dict) or not isinstance(part, dict):
        return override
    own = part.get("range") if part.get("dynamic") is True and override.get("bits") not in (None, 16) else None
    given = override.get("range", own)
    filled = _with_clip_ratio(given, name, override.get("bits", part.get("bits")), part.get("dynamic"))
    return override if filled == given else {**override, "range": filled}


class ActivationConfig(StrictModel):
    """Quantizer of the activations: static per tensor, group of channels or head, or dynamic per token."""

    bits: Bits = 16
    symmetric: bool = False
    dynamic: bool = False
    granularity: Literal["per_tensor", "per_group", "per_head", "per_token"] = "per_tensor"
    group_size: int | None = Field(default=None, ge=1, description="neighboring channels that share a range (per_group)")
    centered: bool = Field(
        default=False, description="round what differs from each channel's mean on the calibration text, where linears read it"
    )
    outlier_threshold: float | None = Field(
        default=None, gt=0, description="channels in which any token of a pass is as large stay in full precision (LLM.int8: 6)"
    )
    range: RangeConfig = RangeConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return _fill_part(data, "activation", "per_tensor")


class KVCacheConfig(StrictModel):
    """Quantizer of keys (after RoPE) and values: static per head or group of its channels, or dynamic per token and head."""

    bits: Bits = 16
    symmetric: bool = False
    dynamic: bool = False
    granularity: Literal["per_head", "per_group", "per_tensor", "per_token"] = "per_head"
    group_size: int | None = Field(default=None, ge=1, description="channels of a head that share a range (per_group)")
    centered: bool = Field(default=False, description="round what differs from each channel's mean on the calibration text")
    range: RangeConfig = RangeConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return _fill_part(data, "kv_cache", "per_head")


class SiteOverride(StrictModel):
    """What differs at one site; null means as everywhere else."""

    bits: Bits | None = None
    symmetric: bool | None = None
    granularity: Literal["per_tensor", "per_group", "per_head"] | None = Field(default=None, description="of a static range")
    group_size: int | None = Field(default=None, ge=1)
    range: RangeConfig | None = None
    full_precision_tokens: int | None = Field(default=None, ge=0, description="first tokens of a text kept in full precision")


def _expand_quantization(data: Any) -> Any:
    """A label, or a mapping with a label in it, becomes the mapping it stands for; explicit keys win over the label."""
    if isinstance(data, str):
        return expand_label(data)
    if not isinstance(data, dict) or "label" not in data:
        return data
    label = data["label"]
    if not isinstance(label, str):
        raise ValueError("label is a string such as w4a8kv8-static")
    merged: dict[str, Any] = {key: value for key, value in data.items() if key != "label"}
    for part, settings in expand_label(label).items():
        given = merged.get(part, {})
        merged[part] = {**settings, **given} if isinstance(given, dict) else given
    return merged


class QuantizationConfig(StrictModel):
    """What is quantized, where and how."""

    weight: WeightConfig = WeightConfig()
    activation: ActivationConfig = ActivationConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    sites: SiteSet = "linears_kv"
    full_precision_tokens: int = Field(default=0, ge=0, description="first tokens of a text kept in full precision")
    prefix: PrefixSetting = Field(default=None, description="tokens whose keys and values stand before every text")
    overrides: dict[SitePoint, SiteOverride] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        overrides = data.get("overrides") if isinstance(data, dict) else None
        if not isinstance(overrides, dict):
            return data
        return {**data, "overrides": {site: _fill_override(site, override, data) for site, override in overrides.items()}}

    @property
    def label(self) -> str:
        """The short name of this setting, for example ``w4a8kv8-static``."""
        weight, activation, cache = self.weight, self.activation, self.kv_cache
        return setting_label(
            weight.bits,
            activation.bits,
            cache.bits,
            activation_dynamic=activation.dynamic,
            cache_dynamic=cache.dynamic,
            group_size=weight.group_size,
        )

    @property
    def quantized_sites(self) -> frozenset[SitePoint]:
        """The sites that have a quantizer: those of the set and those that an override gives bits, without those at 16 bits."""
        found = set()
        for site in SITE_SETS["all"]:
            override = self.overrides.get(site)
            bits = None if override is None else override.bits
            if bits is None and site in SITE_SETS[self.sites]:
                bits = (self.kv_cache if site in CACHE_SITES else self.activation).bits
            if bits is not None and bits < 16:
                found.add(site)
        return frozenset(found)

    def has_range(self, kind: str) -> bool:
        """Whether there is a quantizer of ``weight``, ``activation`` or ``kv_cache``, whose range can be trained.

        Of a dynamic one that is the share that it clips.
        """
        if kind == "weight":
            return self.weight.bits < 16
        return any((site in CACHE_SITES) == (kind == "kv_cache") for site in self.quantized_sites)

    @property
    def observes_keys(self) -> bool:
        """Whether ranges or centers of keys or queries, which RoPE has turned, come from text."""
        sites, cache = self.quantized_sites, self.kv_cache
        return ("k_cache" in sites and (cache.centered or not cache.dynamic)) or ("q" in sites and not self.activation.dynamic)

    @property
    def has_ranges(self) -> bool:
        """Whether anything is quantized."""
        return self.weight.bits < 16 or bool(self.quantized_sites)

    @property
    def has_prefix(self) -> bool:
        """Whether keys and values stand before every text: where anything is quantized, if a prefix is given.

        A search (``auto``) is for ranges, and is left out where weights alone are quantized.
        """
        searched = self.prefix == AUTO_PREFIX
        return self.prefix is not None and (bool(self.quantized_sites) if searched else self.has_ranges)

    @property
    def setting(self) -> str:
        """The label and everything else that a table of results must mention."""
        return ", ".join([self.label, *_setting_notes(self)])


QuantizationSetting = Annotated[QuantizationConfig, BeforeValidator(_expand_quantization)]
"""A label such as w4a8kv8-static, or a mapping, with a label in it or not."""


def _setting_notes(quantization: QuantizationConfig) -> Iterator[str]:
    """Everything that no label says and a table of results must mention."""
    if quantization.quantized_sites:
        yield from _part_notes(quantization)
    prefix = quantization.prefix
    if isinstance(prefix, list) and quantization.has_prefix:
        yield f"prefix of {_tokens(len(prefix))}"
    elif quantization.has_prefix:
        yield "automatic prefix" if prefix == AUTO_PREFIX else f"prefix {prefix!r}"
    if quantization.quantized_sites:
        yield from _override_notes(quantization)


def _part_notes(quantization: QuantizationConfig) -> Iterator[str]:
    """Of activations and cache."""
    parts: tuple[Any, ...] = (quantization.activation, quantization.kv_cache)
    if quantization.sites != "linears_kv" and any(part.bits < 16 for part in parts):
        yield f"sites {quantization.sites}"
    for what, part, usual in zip(("activations", "cache"), parts, ("per_tensor", "per_head"), strict=True):
        if part.bits < 16 and not part.dynamic and part.granularity != usual:
            yield f"{what} {_shared(part.granularity, part.group_size)}"
    centered = [what for what, part in zip(("activations", "cache"), parts, strict=True) if part.bits < 16 and part.centered]
    if centered:
        yield f"{' and '.join(centered)} centered"
    threshold = quantization.activation.outlier_threshold
    if threshold is not None and quantization.activation.bits < 16:
        yield f"channels from {threshold:g} in full precision"
    if quantization.full_precision_tokens:
        yield f"first {_tokens(quantization.full_precision_tokens)} in full precision"


def _override_notes(quantization: QuantizationConfig) -> Iterator[str]:
    """Of single sites."""
    for site, override in quantization.overrides.items():
        if override.bits is not None:
            yield f"{site} at {override.bits} bits"
        if site not in quantization.quantized_sites:
            continue
        if override.granularity is not None:
            yield f"{site} {_shared(override.granularity, override.group_size)}"
        if override.full_precision_tokens is not None:
            yield f"first {_tokens(override.full_precision_tokens)} in full precision at {site}"


def _shared(granularity: str, group_size: int | None) -> str:
    groups = f" of {group_size}" if granularity == "per_group" and group_size is not None else ""
    return granularity.replace("_", " ") + groups


def _tokens(number: int) -> str:
    return f"{number} token" + ("" if number == 1 else "s")
