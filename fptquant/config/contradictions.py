"""Settings that are each possible but contradict one another; nothing is ignored silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fptquant.config.quantization import CACHE_SITES, HEAD_SITES, SITE_SETS, QuantizationConfig
from fptquant.config.schema import Config
from fptquant.config.training import TRAINED_TRANSFORMS, TRAINING_STAGES, OptimizationConfig, TransformTrainingConfig


@dataclass(frozen=True)
class Contradiction:
    """Two or more settings that cannot hold together; the first path is where the message is shown."""

    paths: tuple[str, ...]
    message: str


def find_contradictions(config: Config) -> list[Contradiction]:
    """All contradictions of a config whose fields are valid one by one."""
    return [
        *_norms_and_residual(config),
        *_online(config),
        *_optimization(config),
        *_smoothing(config),
        *_weights(config.quantization),
        *_granularities(config.quantization),
        *_shared_ranges(config.quantization),
        *_sites(config.quantization),
        *_tokens(config),
        *_training(config),
        *_rounding(config),
        *_learned_texts(config),
    ]


def _norms_and_residual(config: Config) -> Iterator[Contradiction]:
    if config.norm_gains == "fused":
        return
    for name in ("residual_rotation", "residual_scaling"):
        if getattr(config.transforms, name) is not None:
            path = f"transforms.{name}"
            yield Contradiction(
                ("norm_gains", path),
                f"kept is not possible with {path}, which needs the gains of the norms folded away; set norm_gains=fused",
            )
    if config.training is not None and config.training.lr.residual_rotation is not None:
        yield Contradiction(
            ("norm_gains", "training.lr.residual_rotation"),
            "kept is not possible with training.lr.residual_rotation: T_r needs norms without gains; set norm_gains=fused",
        )


def _online(config: Config) -> Iterator[Contradiction]:
    if config.transforms.query_key_mixing is not None and config.transforms.query_key_hadamard is not None:
        yield Contradiction(
            ("transforms.query_key_mixing", "transforms.query_key_hadamard"),
            "both would transform queries and keys online, one after the other; leave one out",
        )
    used = set(config.transforms.used)
    everywhere = sorted({"kronecker", "block_rotation"} & used)
    if len(everywhere) == 2:
        yield Contradiction(
            ("transforms.kronecker", "transforms.block_rotation"),
            "both would transform the inputs of all linears online, one after the other; leave one out",
        )
    for name, site in (("down_hadamard", "down_in"), ("out_hadamard", "o_in")):
        if everywhere and name in used:
            yield Contradiction(
                (f"transforms.{everywhere[0]}", f"transforms.{name}"),
                f"both would transform {site} online, one after the other; leave out transforms.{name}",
            )


def _optimization(config: Config) -> Iterator[Contradiction]:
    local, transforms = config.local, config.transforms
    if local.method == "closed_form" and local.p != 4:
        yield Contradiction(
            ("local.p", "local.method"),
            f"closed forms exist for p = 4, not for p = {local.p:g}; set local.p=4 or local.method=adamw",
        )
    pairs, mixing = transforms.query_key_rotation, transforms.value_mixing
    constrained = {"query_key_rotation": pairs is not None and pairs.constraint == "scale"}
    constrained["value_mixing"] = mixing is not None and mixing.constraint == "diagonal"
    for name in (name for name, there in constrained.items() if there and local.method != "none"):
        yield Contradiction(
            (f"transforms.{name}.constraint", "local.method"),
            f"local.method = {local.method} finds transforms without it; set local.method=none or remove the constraint",
        )
    if mixing is not None and mixing.constraint == "diagonal" and mixing.start != "identity":
        yield Contradiction(
            ("transforms.value_mixing.start", "transforms.value_mixing.constraint"),
            f"{mixing.start} is no diagonal matrix; set transforms.value_mixing.start=identity",
        )
    rotation = transforms.residual_rotation
    if rotation is not None and rotation.learn and local.method == "none":
        yield Contradiction(
            ("transforms.residual_rotation.learn", "local.method"),
            "true contradicts local.method = none (nothing is optimized); set one of the two otherwise",
        )


def _smoothing(config: Config) -> Iterator[Contradiction]:
    transforms, training = config.transforms, config.training
    if transforms.norm_scaling is not None and training is not None and training.lr.residual_rotation is not None:
        yield Contradiction(
            ("transforms.norm_scaling", "training.lr.residual_rotation"),
            "T_r cannot be trained through norms that have gains; set training.lr.residual_rotation=null or leave T_n out",
        )
    if config.smoothing is None:
        return
    set_by_both = [name for name in ("value_mixing", "up_scaling") if getattr(transforms, name) is not None]
    if config.local.method != "none" and set_by_both:
        yield Contradiction(
            ("smoothing", "local.method"),
            f"it sets {' and '.join(set_by_both)}, and so does local.method = {config.local.method}; set local.method=none or "
            "smoothing=null",
        )
    if transforms.norm_scaling is None and not set_by_both:
        yield Contradiction(
            ("smoothing", "transforms"),
            "there is nothing that it could set; use transforms.norm_scaling, transforms.up_scaling or transforms.value_mixing",
        )
    online = [name for name in ("down_hadamard", "out_hadamard", "kronecker", "block_rotation") if name in transforms.used]
    if config.smoothing.method == "awq" and online:
        yield Contradiction(
            ("smoothing.method", f"transforms.{online[0]}"),
            f"awq looks for scales that nothing follows, but {' and '.join(online)} mixes the scaled channels; leave one out",
        )
    mixing = transforms.value_mixing
    if mixing is not None and mixing.constraint == "orthogonal":
        yield Contradiction(
            ("smoothing", "transforms.value_mixing.constraint"),
            "scales are no orthogonal matrix; set transforms.value_mixing.constraint=none",
        )
    if mixing is not None and mixing.start != "identity":
        yield Contradiction(
            ("smoothing", "transforms.value_mixing.start"),
            f"it makes T_v a diagonal matrix instead of its start, {mixing.start}; set transforms.value_mixing.start=identity",
        )


def _weights(quantization: QuantizationConfig) -> Iterator[Contradiction]:
    yield from _group_size("quantization.weight", quantization.weight.granularity, quantization.weight.group_size)


def _granularities(quantization: QuantizationConfig) -> Iterator[Contradiction]:
    for part, static in (("activation", "per_tensor"), ("kv_cache", "per_head")):
        settings = getattr(quantization, part)
        paths = (f"quantization.{part}.granularity", f"quantization.{part}.dynamic")
        if settings.dynamic and settings.granularity != "per_token":
            yield Contradiction(
                paths,
                f"{settings.granularity} contradicts dynamic = true, which is per token; set one otherwise",
            )
        if not settings.dynamic and settings.granularity == "per_token":
            yield Contradiction(
                paths,
                f"per_token contradicts dynamic = false (a fixed range has no tokens); set {static} or dynamic=true",
            )
        yield from _group_size(f"quantization.{part}", settings.granularity, settings.group_size)


def _group_size(path: str, granularity: str, group_size: int | None) -> Iterator[Contradiction]:
    paths = (f"{path}.group_size", f"{path}.granularity")
    if granularity == "per_group" and group_size is None:
        yield Contradiction(paths, f"per_group needs a group size; set {path}.group_size=64, for example")
    if granularity != "per_group" and group_size is not None:
        yield Contradiction(
            paths,
            f"{group_size} has no meaning with granularity = {granularity}; set {path}.granularity=per_group or remove group_size",
        )


def _shared_ranges(quantization: QuantizationConfig) -> Iterator[Contradiction]:
    """Static ranges per head or group, of the sites that have a quantizer."""
    for site in sorted(quantization.quantized_sites):
        part = "kv_cache" if site in CACHE_SITES else "activation"
        base, override = getattr(quantization, part), quantization.overrides.get(site)
        own = None if override is None else override.granularity
        if base.dynamic:
            continue
        granularity = own or base.granularity
        path = f"quantization.{part}" if own is None else f"quantization.overrides.{site}"
        if override is not None and (own is not None or override.group_size is not None):
            inherited = base.group_size if granularity == "per_group" else None
            size = inherited if override.group_size is None else override.group_size
            yield from _group_size(f"quantization.overrides.{site}", granularity, size)
        if granularity == "per_head" and site not in HEAD_SITES:
            yield Contradiction(
                (f"{path}.granularity",),
                f"{site} has no heads; set quantization.overrides.{site}.granularity=per_tensor or per_group",
            )
        if granularity == "per_group" and site == "softmax_out":
            yield Contradiction(
                (f"{path}.granularity",), "the channels of softmax_out are tokens; set per_head or per_tensor there"
            )


def _sites(quantization: QuantizationConfig) -> Iterator[Contradiction]:
    members = SITE_SETS[quantization.sites]
    for site, override in quantization.overrides.items():
        path = f"quantization.overrides.{site}"
        if site not in members and override.bits is None:
            fitting = next(name for name, points in SITE_SETS.items() if site in points)
            yield Contradiction(
                (path, "quantization.sites"),
                f"{site} is not quantized by sites = {quantization.sites}; set {path}.bits or sites={fitting}",
            )
            continue
        part = "kv_cache" if site in CACHE_SITES else "activation"
        if override.bits is None and getattr(quantization, part).bits == 16:
            yield Contradiction(
                (path, f"quantization.{part}.bits"),
                f"has no effect: {site} is in full precision; set {path}.bits or quantization.{part}.bits",
            )


def _tokens(config: Config) -> Iterator[Contradiction]:
    quantization = config.quantization
    kept = {"quantization.full_precision_tokens": quantization.full_precision_tokens}
    for site, override in quantization.overrides.items():
        kept[f"quantization.overrides.{site}.full_precision_tokens"] = override.full_precision_tokens or 0
    parts = {"calibration": True, "evaluation": True, "rounding": config.rounds}
    parts |= {key: getattr(config, key) is not None for key in TRAINING_STAGES}
    for part in (name for name, used in parts.items() if used):
        window = getattr(config, part).window
        for path, tokens in kept.items():
            if tokens < window:
                continue
            yield Contradiction(
                (path, f"{part}.window"),
                f"{tokens} tokens in full precision leave nothing to quantize in {part}.window = {window} tokens",
            )


def _rounding(config: Config) -> Iterator[Contradiction]:
    rounding = config.rounding
    for name in ("clip", "search_ranges"):
        if getattr(rounding, name) and not rounding.static_groups:
            yield Contradiction(
                (f"rounding.{name}", "rounding.static_groups"),
                "true changes the ranges that were set before, and static_groups = false sets them anew; set one of them otherwise",
            )
    if rounding.method == "autoround" and rounding.batch > rounding.windows:
        yield Contradiction(
            ("rounding.batch", "rounding.windows"),
            f"{rounding.batch} windows cannot be drawn from rounding.windows = {rounding.windows}; set one of them otherwise",
        )
    if rounding.act_order and not rounding.static_groups:
        yield Contradiction(
            ("rounding.act_order", "rounding.static_groups"),
            "true takes columns of all groups in turn, and static_groups = false sets the range of a group when its first column "
            "is reached; set one of them otherwise",
        )


def _learned_texts(config: Config) -> Iterator[Contradiction]:
    stages = {key: getattr(config, key) for key in ("rounding", *TRAINING_STAGES)}
    sources = {"text": config.text, **{f"{key}.text": stage.text for key, stage in stages.items() if stage is not None}}
    for path, source in sources.items():
        if "add_bos_token=" in source:
            yield Contradiction((path,), "add_bos_token has no effect, because windows to learn from never hold one; leave it out")


def _training(config: Config) -> Iterator[Contradiction]:
    """A learning rate without its transform or range is a default that does not apply; none at all is a mistake."""
    quantization = config.quantization
    ranges = {f"{kind}_range": quantization.has_range(kind) for kind in ("weight", "activation", "kv_cache")}
    transforms = {name: getattr(config.transforms, name) is not None for name in TRAINED_TRANSFORMS}
    why = "the config uses no transform and no range"
    if config.trained_blocks is not None:
        there = transforms | _learned_ranges(config.trained_blocks, ranges) | {"weight": True}
        yield from _trained(config.trained_blocks, there, why)
        yield from _trained_weights(config)
    if config.training is not None:
        there = transforms | _learned_ranges(config.training, ranges) | {"residual_rotation": config.norm_gains == "fused"}
        yield from _trained(config.training, there, why)
    if config.trained_ranges is not None:
        yield from _trained(config.trained_ranges, ranges | {"bias": ranges["weight_range"]}, "the config uses no range")


def _trained_weights(config: Config) -> Iterator[Contradiction]:
    assert config.block_training is not None
    path = "block_training.lr.weight"
    if config.block_training.lr.weight is None:
        return
    if config.dtype not in ("float32", "float64"):
        yield Contradiction(
            (path, "dtype"), f"steps of such a size are lost in {config.dtype} weights; set dtype=float32 or remove {path}"
        )
    for key in ("training", "range_training"):
        if getattr(config, key) is not None:
            yield Contradiction(
                (path, key),
                f"the teacher of {key} is the model without quantizers, which is no longer the one to match once weights have been "
                f"trained; set {key}=null or remove {path}",
            )


def _learned_ranges(settings: TransformTrainingConfig, ranges: dict[str, bool]) -> dict[str, bool]:
    return ranges | {"weight_range": ranges["weight_range"] and settings.weights == "quantized"}


def _trained(settings: OptimizationConfig, there: Mapping[str, bool], why_nothing: str) -> Iterator[Contradiction]:
    """Refuses training that has no parameters; ``there`` says of each group of learning rates whether something belongs to it."""
    if any(exists and getattr(settings.lr, group) is not None for group, exists in there.items()):
        return
    present = [group for group, exists in there.items() if exists]
    yield Contradiction(
        (f"{settings.key}.lr",),
        f"nothing would be trained; give a learning rate to one of these: {', '.join(present)}"
        if present
        else f"nothing can be trained: {why_nothing}",
    )
