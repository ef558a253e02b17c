"""Settings that differ from their default and change nothing; none is ignored silently.

Two kinds are told apart. Some depend on settings beside them (``local.lr`` where nothing is optimized by AdamW): in one
file they are a mistake. Others depend on the label of the setting (a range of activations at 16 bits): a method's file
makes its choices for every label, so they are a mistake only where the user gives them as ``key=value``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fptquant.config.labels import AUTO_PREFIX
from fptquant.config.quantization import CACHE_SITES, QuantizationConfig, RangeConfig
from fptquant.config.schema import Config
from fptquant.config.training import (
    TRAINED_TRANSFORMS,
    TRAINING_STAGES,
    BlockTrainingConfig,
    EndToEndConfig,
    OptimizationConfig,
    TransformTrainingConfig,
)

_RANGE_FIELDS = {
    "min_max": frozenset[str](),
    "percentile": frozenset({"percentile"}),
    "mse": frozenset({"candidates", "lowest_ratio"}),
    "lp": frozenset({"p", "candidates", "lowest_ratio"}),
}
"""The fields of a range that each static method reads."""

_CLIP_FIELDS = frozenset({"token_weights", "text", "windows", "window"})
_ROUNDING_FIELDS = {
    "nearest": frozenset({"clip"}),
    "gptq": frozenset(
        {"clip", "search_ranges", "candidates", "descent_sweeps", "token_weights", "act_order", "damping", "static_groups"}
        | {"text", "windows", "window"}
    ),
    "autoround": frozenset({"iterations", "batch", "lr", "learn_clipping", "objective", "text", "windows", "window"}),
}
"""The fields that each rounding method reads."""


@dataclass(frozen=True)
class WithoutEffect:
    """One setting, and why it changes nothing."""

    path: str
    message: str
    default: Any
    by_label: bool
    """Whether another label, with the same file, would give it an effect."""


def find_without_effect(config: Config) -> list[WithoutEffect]:
    """Every setting of a config that is not its default and changes nothing."""
    quantization = config.quantization
    return [
        *_local(config),
        *_norm_scaling(config),
        *_smoothing(config),
        *_query_key_hadamard(config),
        *_rotation(config),
        *_weights(quantization),
        *_part(quantization, "activation"),
        *_part(quantization, "kv_cache"),
        *_overrides(quantization),
        *_tokens(quantization),
        *_training(config),
        *_rounding(config),
        *_text(config),
    ]


def _changed(model: BaseModel, path: str, names: Any, message: str, *, by_label: bool) -> Iterator[WithoutEffect]:
    """A finding for each of the fields ``names`` that is not its default."""
    for name in names:
        default = type(model).model_fields[name].get_default(call_default_factory=True)
        if getattr(model, name) != default:
            yield WithoutEffect(f"{path}.{name}".removeprefix("."), f"has no effect: {message}", default, by_label)


def _local(config: Config) -> Iterator[WithoutEffect]:
    local, used = config.local, config.transforms
    optimized = bool({"query_key_rotation", "value_mixing", "up_scaling"} & set(used.used))
    learned = used.residual_rotation is not None and used.residual_rotation.learn
    reasons: dict[str, str] = {}
    if local.method != "adamw":
        reasons |= dict.fromkeys(("steps", "lr"), "they belong to AdamW; set local.method=adamw or remove it")
    if local.method != "closed_form":
        reasons["value_steps"] = f"local.method = {local.method} takes other steps; set local.method=closed_form or remove it"
    elif used.value_mixing is None:
        reasons["value_steps"] = "there is no T_v; set transforms.value_mixing={} or remove it"
    if used.up_scaling is None:
        reasons["up_p"] = "there is no T_u; set transforms.up_scaling={} or remove it"
    if not optimized and not learned:
        reasons["p"] = "no transform is optimized; remove it"
    if local.method == "none":
        reasons = dict.fromkeys(("p", "steps", "lr", "value_steps", "up_p"), "local.method = none; set another one or remove it")
    elif not optimized:
        reasons |= dict.fromkeys(("steps", "lr", "value_steps", "up_p"), "no transform is optimized; remove it")
    for name, reason in reasons.items():
        yield from _changed(local, "local", [name], reason, by_label=False)


def _norm_scaling(config: Config) -> Iterator[WithoutEffect]:
    stages = [stage for stage in (config.trained_blocks, config.trained) if stage is not None]
    if config.smoothing is None and all(stage.lr.norm_scaling is None for stage in stages):
        message = "nothing sets or trains T_n, which does nothing at its start; set smoothing={} or remove it"
        yield from _changed(config.transforms, "transforms", ["norm_scaling"], message, by_label=False)


def _smoothing(config: Config) -> Iterator[WithoutEffect]:
    if config.smoothing is not None:
        other = "candidates" if config.smoothing.method == "smoothquant" else "alpha"
        message = f"smoothing.method = {config.smoothing.method} does not read it; remove it"
        yield from _changed(config.smoothing, "smoothing", [other], message, by_label=False)
        if config.quantization.weight.bits == 16:
            message = (
                "weights stay in full precision, for whose rounding awq looks for scales; set quantization.weight.bits or remove it"
            )
            yield from _changed(config.smoothing, "smoothing", ["method"], message, by_label=True)


def _query_key_hadamard(config: Config) -> Iterator[WithoutEffect]:
    if not config.quantization.quantized_sites & {"k_cache", "q"}:
        message = "neither keys nor queries are quantized; set quantization.kv_cache.bits or remove it"
        yield from _changed(config.transforms, "transforms", ["query_key_hadamard", "query_key_mixing"], message, by_label=True)


def _rotation(config: Config) -> Iterator[WithoutEffect]:
    rotation, path = config.transforms.residual_rotation, "transforms.residual_rotation"
    if rotation is not None and not rotation.learn:
        yield from _changed(
            rotation, path, ("steps", "lr"), f"T_r is not learned; set {path}.learn=true or remove it", by_label=False
        )


def _range(settings: RangeConfig, path: str, *, dynamic: bool, weight: bool = False) -> Iterator[WithoutEffect]:
    fields = [name for name in RangeConfig.model_fields if name not in ("method", "clip_ratio")]
    unread = [name for name in fields if name not in _RANGE_FIELDS[settings.method]]
    yield from _changed(settings, path, unread, f"{path}.method = {settings.method} does not read it; remove it", by_label=False)
    if dynamic:
        read = ["method", *(name for name in fields if name not in unread)]
        yield from _changed(
            settings, path, read, "dynamic ranges are those of each token; of these settings they read clip_ratio", by_label=True
        )
    else:
        message = f"it is the share of a dynamic range; set {path}.method, or remove it"
        yield from _changed(settings, path, ["clip_ratio"], message, by_label=not weight)


def _weights(quantization: QuantizationConfig) -> Iterator[WithoutEffect]:
    weight, path = quantization.weight, "quantization.weight"
    if weight.bits < 16:
        yield from _range(weight.range, f"{path}.range", dynamic=False, weight=True)
        return
    message = f"weights are in full precision; set {path}.bits or remove it"
    yield from _changed(weight, path, ("symmetric", "granularity", "group_size"), message, by_label=True)
    yield from _changed(weight.range, f"{path}.range", RangeConfig.model_fields, message, by_label=True)


def _part(quantization: QuantizationConfig, part: str) -> Iterator[WithoutEffect]:
    settings, path = getattr(quantization, part), f"quantization.{part}"
    sites = {site for site in quantization.quantized_sites if (site in CACHE_SITES) == (part == "kv_cache")}
    if not sites:
        message = f"nothing of {part} is quantized; set {path}.bits or remove it"
        names = {"symmetric", "dynamic", "centered", "group_size", "outlier_threshold"} & type(settings).model_fields.keys()
        yield from _changed(settings, path, sorted(names), message, by_label=True)
        yield from _changed(settings.range, f"{path}.range", RangeConfig.model_fields, message, by_label=True)
        return
    yield from _range(settings.range, f"{path}.range", dynamic=settings.dynamic)


def _overrides(quantization: QuantizationConfig) -> Iterator[WithoutEffect]:
    for site, override in quantization.overrides.items():
        path = f"quantization.overrides.{site}"
        if override.bits == 16:
            others = [name for name in type(override).model_fields if name != "bits"]
            yield from _changed(override, path, others, f"{path}.bits = 16; remove one of the two", by_label=False)
            continue
        dynamic = (quantization.kv_cache if site in CACHE_SITES else quantization.activation).dynamic
        if dynamic:
            message = "dynamic ranges are those of each token; remove it, or set a static label"
            yield from _changed(override, path, ("granularity", "group_size"), message, by_label=True)
        if override.range is not None:
            yield from _range(override.range, f"{path}.range", dynamic=dynamic)


def _tokens(quantization: QuantizationConfig) -> Iterator[WithoutEffect]:
    if quantization.quantized_sites:
        return
    message = "neither activations nor cache are quantized; set quantization.activation.bits or remove it"
    yield from _changed(quantization, "quantization", ("full_precision_tokens",), message, by_label=True)
    if quantization.prefix == AUTO_PREFIX and quantization.has_ranges:
        message = "a prefix is searched for where activations or cache are quantized; give its text or token ids, or remove it"
    if not quantization.has_prefix:
        yield from _changed(quantization, "quantization", ("prefix",), message, by_label=True)


def _training(config: Config) -> Iterator[WithoutEffect]:
    for key in TRAINING_STAGES:
        settings: OptimizationConfig | None = getattr(config, key)
        if settings is not None:
            yield from _trained(config, settings)
    if not config.quantization.has_ranges:
        message = "nothing is quantized, so nothing is trained; remove it, or set another label"
        yield from _changed(config, "", ["block_training", "range_training"], message, by_label=True)
    elif config.block_training is not None:
        yield from _weights_meanwhile(config, config.block_training, left_out=config.trained_blocks is None)
    if config.training is not None:
        yield from _weights_meanwhile(config, config.training, left_out=config.trained is None)


def _weights_meanwhile(config: Config, settings: TransformTrainingConfig, *, left_out: bool) -> Iterator[WithoutEffect]:
    key = settings.key
    if left_out:
        message = f"nothing is quantized meanwhile, so {settings.title} is left out; remove it, or set {key}.weights=quantized"
        yield from _changed(settings, key, type(settings).model_fields, message, by_label=True)
    elif config.quantization.weight.bits == 16:
        message = "weights are in full precision anyway; remove it, or set quantization.weight.bits"
        yield from _changed(settings, key, ["weights"], message, by_label=True)
    elif settings.weights == "full_precision" and settings.lr.weight_range is not None:
        message = f"{key}.weights = full_precision, whose ranges are set after training; remove one of the two"
        yield from _changed(settings.lr, f"{key}.lr", ["weight_range"], message, by_label=False)


def _trained(config: Config, settings: OptimizationConfig) -> Iterator[WithoutEffect]:
    if isinstance(settings, EndToEndConfig) and settings.objective in ("cross_entropy", "hidden_mse"):
        message = f"the objective {settings.objective} has no temperature; remove it"
        yield from _changed(settings, settings.key, ["temperature"], message, by_label=False)
    of_kinds = {"weight_range": "weight", "bias": "weight", "activation_range": "activation", "kv_cache_range": "kv_cache"}
    for name, kind in of_kinds.items():
        if not config.quantization.has_range(kind) and getattr(settings.lr, name, None) is not None:
            message = f"quantization.{kind} has no range; remove it, or set another label"
            yield from _changed(settings.lr, f"{settings.key}.lr", [name], message, by_label=True)
    for name in TRAINED_TRANSFORMS:
        if getattr(config.transforms, name) is None and getattr(settings.lr, name, None) is not None:
            message = f"transforms.{name} is not used; set transforms.{name}={{}} or remove it"
            yield from _changed(settings.lr, f"{settings.key}.lr", [name], message, by_label=False)
    if isinstance(settings, BlockTrainingConfig):
        message = "T_r belongs to all blocks together; remove it"
        yield from _changed(settings.lr, f"{settings.key}.lr", ["residual_rotation"], message, by_label=False)


def _rounding(config: Config) -> Iterator[WithoutEffect]:
    rounding, weight = config.rounding, config.quantization.weight
    for name in type(rounding).model_fields:
        if rounding.clip and name in _CLIP_FIELDS:
            continue
        readers = [method for method, fields in _ROUNDING_FIELDS.items() if name in fields]
        if name != "method" and rounding.method not in readers:
            message = f"rounding.method = {rounding.method} does not read it; set rounding.method={readers[0]} or remove it"
            yield from _changed(rounding, "rounding", [name], message, by_label=False)
    if not rounding.clip and rounding.method == "nearest":
        return
    if weight.bits == 16:
        message = "weights are in full precision; set quantization.weight.bits or remove it"
        read = ("method", *_ROUNDING_FIELDS[rounding.method])
        yield from _changed(rounding, "rounding", read, message, by_label=True)
        return
    if rounding.method == "gptq" and weight.granularity != "per_group":
        message = f"weights have no groups but {weight.granularity} ranges; set quantization.weight.group_size or remove it"
        yield from _changed(rounding, "rounding", ["static_groups"], message, by_label=True)
    if rounding.method == "gptq" and not rounding.search_ranges:
        message = "no range is searched for; set rounding.search_ranges=true or remove it"
        yield from _changed(rounding, "rounding", ["candidates"], message, by_label=False)


def _text(config: Config) -> Iterator[WithoutEffect]:
    stages = [getattr(config, key) for key in TRAINING_STAGES] + ([config.rounding] if config.rounds else [])
    if not any(stage is not None and stage.text == "auto" for stage in stages):
        message = "no stage learns from it: nothing is trained or rounded for inputs, or each has a text of its own; remove it"
        yield from _changed(config, "", ["text"], message, by_label=True)
