"""The schema of a method's YAML file: frozen models that refuse unknown keys.

Field names are the YAML keys. Single fields are checked here; settings that contradict each other are found by
`fptquant.config.contradictions`, so that `fptquant.config.loading` can report everything at once.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fptquant.config.labels import expand_label, setting_label, setting_notes

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


def _check_windows(windows: Any) -> Any:
    """One message instead of one for each kind of value."""
    if windows != "all" and (not isinstance(windows, int) or isinstance(windows, bool) or windows < 1):
        raise ValueError(f"{windows!r} is no number of windows; write at least 1, or all")
    return windows


Windows = Annotated[int | Literal["all"], BeforeValidator(_check_windows)]
"""A number of windows, or ``all`` that the text has."""

Start = Literal["identity", "hadamard", "random_hadamard", "random_orthogonal"]
"""Matrices from which a rotation or mixing starts; a random one is drawn from ``seed``."""


class StrictModel(BaseModel):
    """Base of every part of a config: frozen, without unknown keys, without silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class RangeConfig(StrictModel):
    """How a static quantizer finds its range; fields as in `fptquant.quantizers.ranges.RangeMethod`."""

    method: Literal["min_max", "percentile", "mse", "lp"] = "min_max"
    p: float = Field(default=2.4, ge=2, le=4, description="exponent of sum |x - fake_quant(x)|^p (lp)")
    percentile: float = Field(default=99.99, gt=50, le=100, description="share of values inside the range (percentile)")
    candidates: int = Field(default=80, ge=2, le=1000, description="clipping ratios that are tried (mse, lp)")
    lowest_ratio: float = Field(default=0.3, gt=0, lt=1, description="smallest clipping ratio that is tried (mse, lp)")
    clip_ratio: float = Field(default=1.0, gt=0, le=1, description="share of each token's range that is covered (dynamic)")


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


class ActivationConfig(StrictModel):
    """Quantizer of the activations: static per tensor, group of channels or head, or dynamic per token."""

    bits: Bits = 16
    symmetric: bool = False
    dynamic: bool = False
    granularity: Literal["per_tensor", "per_group", "per_head", "per_token"] = "per_tensor"
    group_size: int | None = Field(default=None, ge=1, description="neighboring channels that share a range (per_group)")
    outlier_threshold: float | None = Field(
        default=None, gt=0, description="channels in which any token of a pass is as large stay in full precision (LLM.int8: 6)"
    )
    range: RangeConfig = RangeConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_granularity(cls, data: Any) -> Any:
        return _fill_granularity(data, "per_tensor")


class KVCacheConfig(StrictModel):
    """Quantizer of keys (after RoPE) and values: static per head or group of its channels, or dynamic per token and head."""

    bits: Bits = 16
    symmetric: bool = False
    dynamic: bool = False
    granularity: Literal["per_head", "per_group", "per_tensor", "per_token"] = "per_head"
    group_size: int | None = Field(default=None, ge=1, description="channels of a head that share a range (per_group)")
    range: RangeConfig = RangeConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_granularity(cls, data: Any) -> Any:
        return _fill_granularity(data, "per_head")


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
    overrides: dict[SitePoint, SiteOverride] = {}

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
    def has_ranges(self) -> bool:
        """Whether anything is quantized."""
        return self.weight.bits < 16 or bool(self.quantized_sites)

    @property
    def setting(self) -> str:
        """The label and everything else that a table of results must mention."""
        return ", ".join([self.label, *setting_notes(self)])


def _switch(data: Any) -> Any:
    """``true`` means with the defaults, ``false`` means not used, so that one override switches a transform."""
    if data is True:
        return {}
    return None if data is False else data


class QueryKeyRotationConfig(StrictModel):
    """T_k: rotation and scale of every RoPE pair of keys, undone in the queries."""

    constraint: Literal["none", "scale"] = Field(default="none", description="scale: pairs are not rotated")


class NormScalingConfig(StrictModel):
    """T_n: a scale per channel of the norms' outputs, undone in the linears that read them; set by ``smoothing``, or trained."""


class ValueMixingConfig(StrictModel):
    """T_v: a matrix per key/value head on the values, undone in the output projection."""

    start: Start = "hadamard"
    constraint: Literal["none", "orthogonal", "diagonal"] = "none"


class UpScalingConfig(StrictModel):
    """T_u: a scale per channel of the up projection, undone in the down projection."""


class ResidualRotationConfig(StrictModel):
    """T_r: an orthogonal matrix on the residual."""

    start: Start = "random_hadamard"
    learn: bool = False
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=0.01, gt=0)


class DownHadamardConfig(StrictModel):
    """T_d: an online block Hadamard transform on the input of the down projection."""

    block_size: int | None = Field(default=None, ge=1, description="null: the whole intermediate size")


class OutHadamardConfig(StrictModel):
    """T_o: an online Hadamard transform across the heads, on the input of the output projection."""


class KroneckerConfig(StrictModel):
    """P_a, P_ug, P_o, P_d: online Kronecker products of two learned matrices on the inputs of all linears."""

    start: Start = Field(default="random_orthogonal", description="of each factor; orthogonal where there is no Hadamard matrix")


class BlockRotationConfig(StrictModel):
    """D_a, D_ug, D_o, D_d: online rotations of blocks of channels, found from the calibration text, a permutation between two."""

    block_size: int = Field(default=128, ge=2, description="largest size of a block, which divides the channels")
    steps: int = Field(default=256, ge=1, description="turns that are tried for each block; the best number of them is kept")


class QueryKeyMixingConfig(StrictModel):
    """P_h: an online learned matrix on the heads of the keys after RoPE, undone in the queries."""

    start: Start = "random_orthogonal"


class QueryKeyHadamardConfig(StrictModel):
    """T_h: an online Hadamard transform of queries and keys after RoPE, for caches of few bits."""


class ResidualScalingConfig(StrictModel):
    """S_n: the residual is kept normalized and its running scale carried along."""

    where: Literal["input", "output"] = "input"


class TransformsConfig(StrictModel):
    """Which function-preserving transforms are used; absent or null means not used."""

    norm_scaling: Annotated[NormScalingConfig | None, BeforeValidator(_switch)] = None
    query_key_rotation: Annotated[QueryKeyRotationConfig | None, BeforeValidator(_switch)] = None
    value_mixing: Annotated[ValueMixingConfig | None, BeforeValidator(_switch)] = None
    up_scaling: Annotated[UpScalingConfig | None, BeforeValidator(_switch)] = None
    residual_rotation: Annotated[ResidualRotationConfig | None, BeforeValidator(_switch)] = None
    down_hadamard: Annotated[DownHadamardConfig | None, BeforeValidator(_switch)] = None
    residual_scaling: Annotated[ResidualScalingConfig | None, BeforeValidator(_switch)] = None
    out_hadamard: Annotated[OutHadamardConfig | None, BeforeValidator(_switch)] = None
    query_key_hadamard: Annotated[QueryKeyHadamardConfig | None, BeforeValidator(_switch)] = None
    kronecker: Annotated[KroneckerConfig | None, BeforeValidator(_switch)] = None
    query_key_mixing: Annotated[QueryKeyMixingConfig | None, BeforeValidator(_switch)] = None
    block_rotation: Annotated[BlockRotationConfig | None, BeforeValidator(_switch)] = None

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the transforms in use."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class SmoothingConfig(StrictModel):
    """Scales of T_n, T_u and a diagonal T_v from the activations of the calibration text."""

    method: Literal["smoothquant", "awq"] = Field(
        default="smoothquant", description="what is made small: the largest activations, or the error of rounded weights"
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="share of an outlier that moves into the weights (smoothquant)")
    candidates: int = Field(default=20, ge=2, le=1000, description="exponents of the mean activation that are tried (awq)")


class LocalConfig(StrictModel):
    """Local optimization: the L_p norm of the merged weights over T_k, T_v and T_u, without data."""

    method: Literal["closed_form", "adamw", "none"] = "closed_form"
    p: float = Field(default=4.0, ge=2, le=8)
    steps: int = Field(default=200, ge=1, description="AdamW steps per block for T_k and T_u")
    lr: float = Field(default=0.01, gt=0)
    value_steps: int = Field(default=100, ge=0, description="steps for T_v, which has no closed form")
    up_p: float | None = Field(default=None, ge=2, le=8, description="exponent for T_u; null: 2 where T_d follows, else p")


class RangeLearningRates(StrictModel):
    """Peak learning rate of each group of ranges, which are trained as logarithms; null means not trained.

    Of dynamic ranges the share that they clip is trained.
    """

    weight_range: float | None = Field(default=0.002, gt=0)
    activation_range: float | None = Field(default=0.002, gt=0)
    kv_cache_range: float | None = Field(default=0.002, gt=0)


class LearningRates(RangeLearningRates):
    """Peak learning rate of each group of ranges and transforms; null means not trained."""

    query_key_rotation: float | None = Field(default=0.002, gt=0)
    value_mixing: float | None = Field(default=0.002, gt=0)
    up_scaling: float | None = Field(default=0.002, gt=0)
    kronecker: float | None = Field(default=0.002, gt=0)
    query_key_mixing: float | None = Field(default=0.002, gt=0)
    norm_scaling: float | None = Field(default=0.002, gt=0)
    residual_rotation: float | None = Field(default=None, gt=0)


TRAINED_TRANSFORMS = tuple(sorted(LearningRates.model_fields.keys() & TransformsConfig.model_fields.keys() - {"residual_rotation"}))
"""Transforms of a block that can be trained, by their names in ``transforms`` and in ``lr``."""


class OptimizationConfig(StrictModel):
    """What all stages have in common that train on text, step by step."""

    key: ClassVar[str]
    """Where its settings stand in a config."""
    title: ClassVar[str]
    """Its name in messages."""

    steps: int = Field(default=64, ge=1)
    batch: int = Field(default=1, ge=1, description="windows per step, over all processes and micro batches")
    micro_batch: int | None = Field(default=None, ge=1, description="most windows at once in a process; null: all of its share")
    window: int = Field(default=512, ge=2)
    text: str = Field(default="auto", min_length=1)
    held_out_windows: int = Field(default=4, ge=1, description="windows of the same text that decide which state is best")
    evaluate_every: int = Field(default=16, ge=1, description="steps between two looks at the held-out windows")
    lr: RangeLearningRates = RangeLearningRates()
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the learning rates rise")
    final_lr: float = Field(default=0.1, ge=0, le=1, description="share of the learning rates that the cosine ends with")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="memory of AdamW's mean gradient")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="memory of AdamW's mean squared gradient")
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest norm of the gradients together; null: any")
    autocast: Literal["none", "bfloat16"] = "none"
    checkpoint_seconds: float = Field(default=60.0, ge=0, description="seconds of work between two checkpoints")
    tensorboard: bool = False

    @property
    def wanted_windows(self) -> int:
        """Windows of a whole run."""
        return self.steps * self.batch


class EndToEndConfig(OptimizationConfig):
    """What the stages have in common in which the quantized student learns to match its own full-precision teacher."""

    objective: Literal["jsd", "forward_kl", "reverse_kl", "cross_entropy", "hidden_mse"] = "jsd"
    temperature: float = Field(default=1.0, gt=0)
    distinct_windows: int | None = Field(
        default=None,
        ge=1,
        description="different windows at most, which then repeat; null: as many as the text has, 128 if the model writes it",
    )
    activation_checkpointing: bool = False
    shard_weights: bool | None = Field(
        default=None, description="spread frozen weights over the processes of torchrun; null: on GPUs only"
    )


class BlockTrainingConfig(OptimizationConfig):
    """Training of transforms and ranges block by block: each learns to give what its full-precision self gives."""

    key: ClassVar[str] = "block_training"
    title: ClassVar[str] = "block training"

    steps: int = Field(default=64, ge=1, description="of each block")
    batch: int = Field(default=4, ge=1, description="windows per step, over all processes and micro batches")
    windows: int = Field(default=32, ge=1, description="different windows, whose hidden states are kept")
    objective: Literal["relative_mse", "mse"] = Field(
        default="relative_mse", description="the error of the block's output, of each token in proportion to its own size, or not"
    )
    lr: LearningRates = LearningRates()

    @property
    def wanted_windows(self) -> int:
        return self.windows


class TrainingConfig(EndToEndConfig):
    """End-to-end training of transforms and ranges."""

    key: ClassVar[str] = "training"
    title: ClassVar[str] = "end-to-end training"

    lr: LearningRates = LearningRates()
    weights: Literal["quantized", "full_precision"] = Field(
        default="quantized", description="what the student's linears compute with; ranges of the latter are set after training"
    )


class RangeTrainingConfig(EndToEndConfig):
    """End-to-end training of ranges alone, once weights are rounded: they keep their integers, whose scales are learned."""

    key: ClassVar[str] = "range_training"
    title: ClassVar[str] = "range training"


WITHOUT_INFLUENCE = frozenset({"checkpoint_seconds", "tensorboard", "shard_weights"})
"""Keys of the stages that train (`TRAINING_STAGES`) that do not change the result: they may change when a run goes on."""


TRAINING_STAGES = ("block_training", "training", "range_training")
"""Keys of a config, in the order of the stages."""


class RoundingConfig(StrictModel):
    """How weights are rounded, once transforms are merged and ranges set; nearest without ``clip`` needs no text."""

    method: Literal["nearest", "gptq", "autoround"] = "nearest"
    act_order: bool = Field(default=False, description="columns of large inputs first (gptq)")
    damping: float = Field(default=0.01, gt=0, description="share of the Hessian's mean diagonal that is added to it (gptq)")
    static_groups: bool = Field(default=True, description="keep the group ranges that were set before rounding (gptq)")
    clip: bool = Field(default=False, description="narrow ranges so that the layers' outputs stay closest (nearest, gptq)")
    iterations: int = Field(default=200, ge=1, description="signed gradient steps of each block (autoround)")
    batch: int = Field(default=8, ge=1, description="windows of each iteration, at most all (autoround)")
    lr: float | None = Field(default=None, gt=0, description="first step, which falls to 0; null: 1 / iterations (autoround)")
    learn_clipping: bool = Field(default=True, description="learn the ends of the weights' ranges, too (autoround)")
    text: str = Field(default="auto", min_length=1, description="as for training (clip, gptq, autoround)")
    windows: int = Field(default=32, ge=1, description="calibration windows (clip, gptq, autoround)")
    window: int = Field(default=512, ge=2, description="tokens of a window (clip, gptq, autoround)")


class CalibrationConfig(StrictModel):
    """Text from which static activation ranges are set."""

    text: str = Field(default="topics", min_length=1)
    windows: int = Field(default=16, ge=1)
    window: int = Field(default=512, ge=2)


class ZeroShotConfig(StrictModel):
    """Tasks that lm-eval scores, without examples before a question."""

    tasks: str = Field(
        min_length=1, description="names that lm-eval knows, NAME=FILE.jsonl, or a folder of NAME.jsonl; several with commas"
    )
    limit: int | None = Field(default=None, ge=1, description="first examples of each task; null: all")
    batch_size: int = Field(default=16, ge=1, description="texts that are read at once")


class EvaluationConfig(StrictModel):
    """Text on which perplexity and agreement are measured, and zero-shot tasks."""

    text: str = Field(default="auto", min_length=1)
    windows: Windows = Field(default=8, description="the first ones, or all")
    window: int = Field(default=1024, ge=2)
    zero_shot: ZeroShotConfig | None = None


DType = Literal["float32", "float64", "bfloat16", "float16"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Config(StrictModel):
    """One method on one model: everything that decides the result of a run."""

    name: Name
    model: str = Field(default="smollm2-135m", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: DType = "float32"
    device: Device = "auto"
    text: str = Field(default="auto", min_length=1, description="what stages learn from whose own text is auto: rounding, training")
    norm_gains: Literal["fused", "kept"] = "fused"
    transforms: TransformsConfig = TransformsConfig()
    smoothing: SmoothingConfig | None = None
    local: LocalConfig = LocalConfig()
    block_training: BlockTrainingConfig | None = None
    training: TrainingConfig | None = None
    rounding: RoundingConfig = RoundingConfig()
    range_training: RangeTrainingConfig | None = None
    quantization: Annotated[QuantizationConfig, BeforeValidator(_expand_quantization)] = QuantizationConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: str = Field(default="runs/{name}", min_length=1, description="may contain {name} and {setting}")

    def text_of(self, stage: OptimizationConfig | RoundingConfig) -> str:
        """What a stage learns from: its own text, or that of the config."""
        return self.text if stage.text == "auto" else stage.text

    @property
    def trained(self) -> TrainingConfig | None:
        """End-to-end training, unless nothing is quantized meanwhile: then student and teacher are the same."""
        training = self.training
        if training is None or training.weights == "quantized" or self.quantization.quantized_sites:
            return training
        return None

    @property
    def trained_blocks(self) -> BlockTrainingConfig | None:
        """Block training, unless nothing is quantized."""
        return self.block_training if self.quantization.has_ranges else None

    @property
    def outdated_ranges(self) -> bool:
        """Whether block training changes what static quantizers of activations and cache read, but not their ranges."""
        blocks, quantized = self.trained_blocks, self.quantization
        if blocks is None or blocks.lr.activation_range is not None or blocks.lr.kv_cache_range is not None:
            return False
        return bool(quantized.quantized_sites) and not (quantized.activation.dynamic and quantized.kv_cache.dynamic)

    @property
    def trained_ranges(self) -> RangeTrainingConfig | None:
        """Range training, unless nothing is quantized."""
        return self.range_training if self.quantization.has_ranges else None

    @property
    def attaches(self) -> bool:
        """Whether transforms are trained, and merged only after that."""
        return self.trained_blocks is not None or self.trained is not None

    @property
    def rounds(self) -> bool:
        """Whether weights or their ranges are chosen for inputs, by more than taking the nearest number of their grid."""
        return (self.rounding.method != "nearest" or self.rounding.clip) and self.quantization.weight.bits < 16

    @property
    def output_folder(self) -> str:
        """``output`` with its placeholders filled in."""
        return self.output.replace("{name}", self.name).replace("{setting}", self.quantization.label)
