"""The schema of a method's YAML file: frozen models that refuse unknown keys.

Field names are the YAML keys. Single fields are checked here; settings that contradict each other are found by
`fptquant.config.contradictions`, so that `fptquant.config.loading` can report everything at once.
Parts of their own: `fptquant.config.quantization`, `fptquant.config.transforms`, `fptquant.config.training`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from fptquant.config.quantization import QuantizationConfig, QuantizationSetting
from fptquant.config.strict import StrictModel
from fptquant.config.training import (
    BlockTrainingConfig,
    OptimizationConfig,
    RangeTrainingConfig,
    TrainingConfig,
    TransformTrainingConfig,
)
from fptquant.config.transforms import LocalConfig, SmoothingConfig, TransformsConfig


def _check_windows(windows: Any) -> Any:
    """One message instead of one for each kind of value."""
    if windows != "all" and (not isinstance(windows, int) or isinstance(windows, bool) or windows < 1):
        raise ValueError(f"{windows!r} is no number of windows; write at least 1, or all")
    return windows


Windows = Annotated[int | Literal["all"], BeforeValidator(_check_windows)]
"""A number of windows, or ``all`` that the text has."""


class RoundingConfig(StrictModel):
    """How weights are rounded, once transforms are merged and ranges set; nearest without ``clip`` needs no text."""

    method: Literal["nearest", "gptq", "autoround"] = "nearest"
    act_order: bool = Field(default=False, description="columns of large inputs first (gptq)")
    damping: float = Field(default=0.01, gt=0, description="share of the Hessian's mean diagonal that is added to it (gptq)")
    static_groups: bool = Field(default=True, description="keep the group ranges that were set before rounding (gptq)")
    clip: bool = Field(default=False, description="narrow ranges so that the layers' outputs stay closest (nearest, gptq)")
    search_ranges: bool = Field(default=False, description="choose each row's range by the loss that rounding leaves (gptq)")
    candidates: int = Field(default=33, ge=2, description="multiples from 0.8 to 1.2 that search_ranges tries (gptq)")
    descent_sweeps: int = Field(default=0, ge=0, description="passes that improve rounded weights one column at a time (gptq)")
    token_weights: Literal["auto", "equal", "fisher"] = Field(
        default="equal",
        description="fisher: tokens count by the gradients at their outputs; auto: that where weights alone are quantized, "
        "equal elsewhere (clip, gptq)",
    )
    iterations: int = Field(default=200, ge=1, description="signed gradient steps of each block (autoround)")
    batch: int = Field(default=8, ge=1, description="windows of each iteration, at most all (autoround)")
    lr: float | None = Field(default=None, gt=0, description="first step, which falls to 0; null: 1 / iterations (autoround)")
    learn_clipping: bool = Field(default=True, description="learn the ends of the weights' ranges, too (autoround)")
    objective: Literal["relative_mse", "mse"] = Field(
        default="mse",
        description="the error of a block's output, of each token in proportion to its own size, or not (autoround)",
    )
    text: str = Field(default="auto", min_length=1, description="as for training (clip, gptq, autoround)")
    windows: int = Field(default=32, ge=1, description="calibration windows (clip, gptq, autoround)")
    window: int = Field(default=512, ge=2, description="tokens of a window (clip, gptq, autoround)")


class CalibrationConfig(StrictModel):
    """Text from which static activation ranges are set.

    ``context: auto`` stays only where it changes something, at static ranges or centers of keys; how many positions it means is
    known with the model (`fptquant.stages.positions`).
    """

    text: str = Field(default="topics", min_length=1)
    windows: int = Field(default=16, ge=1)
    window: int = Field(default=512, ge=2)
    context: Annotated[int, Field(ge=2)] | Literal["auto"] | None = Field(
        default=None,
        description="positions over which these windows, and those of training, are spread; null: all begin at 0; "
        "auto: 2,048, or the model's context if that is shorter, where keys have static ranges or centers",
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if isinstance(self.context, int) and self.context < self.window:
            raise ValueError(f"context = {self.context} is shorter than window = {self.window}; a context holds a window at least")
        return self

    @property
    def positions(self) -> int | None:
        """``context``, once the model is known."""
        assert self.context != "auto"
        return self.context

    def first_position(self, window: int) -> int:
        """Where a window begins, counted from 0: they are spread evenly, and the last one ends with the context."""
        steps, positions = self.windows - 1, self.positions
        return 0 if positions is None or steps == 0 else window * (positions - self.window) // steps


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
    quantization: QuantizationSetting = QuantizationConfig()
    rounding: RoundingConfig = RoundingConfig()
    range_training: RangeTrainingConfig | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: str = Field(default="runs/{name}", min_length=1, description="may contain {name} and {setting}")

    @field_validator("rounding")
    @classmethod
    def _token_weights_of_the_setting(cls, rounding: RoundingConfig, info: ValidationInfo) -> RoundingConfig:
        quantization = info.data.get("quantization")
        if rounding.token_weights != "auto" or quantization is None:
            return rounding
        return rounding.model_copy(update={"token_weights": "equal" if quantization.quantized_sites else "fisher"})

    @field_validator("calibration")
    @classmethod
    def _context_where_it_matters(cls, calibration: CalibrationConfig, info: ValidationInfo) -> CalibrationConfig:
        quantization = info.data.get("quantization")
        if calibration.context != "auto" or quantization is None or quantization.observes_keys:
            return calibration
        return calibration.model_copy(update={"context": None})

    def text_of(self, stage: OptimizationConfig | RoundingConfig) -> str:
        """What a stage learns from: its own text, or that of the config."""
        return self.text if stage.text == "auto" else stage.text

    @property
    def trained(self) -> TrainingConfig | None:
        """End-to-end training, unless nothing is quantized meanwhile: then student and teacher are the same."""
        training = self.training
        return None if training is None or self._left_alone(training) else training

    @property
    def trained_blocks(self) -> BlockTrainingConfig | None:
        """Block training, unless nothing is quantized, or nothing meanwhile."""
        blocks = self.block_training
        return None if blocks is None or self._left_alone(blocks) or not self.quantization.has_ranges else blocks

    def _left_alone(self, stage: TransformTrainingConfig) -> bool:
        """Whether a stage keeps all that is quantized, weights, in full precision."""
        return stage.weights == "full_precision" and not self.quantization.quantized_sites

    @property
    def outdated_ranges(self) -> list[Literal["activation", "kv_cache"]]:
        """Kinds of static quantizers whose inputs block training changes, but not their ranges."""
        blocks, quantized = self.trained_blocks, self.quantization
        if blocks is None:
            return []
        kept: dict[Literal["activation", "kv_cache"], bool] = {
            "activation": blocks.lr.activation_range is None and not quantized.activation.dynamic,
            "kv_cache": blocks.lr.kv_cache_range is None and not quantized.kv_cache.dynamic,
        }
        return [kind for kind, outdated in kept.items() if outdated and quantized.has_range(kind)]

    @property
    def outdated_weight_ranges(self) -> bool:
        """Whether block training leaves weights in full precision; unless training does, too, after which ranges are set anyway."""
        blocks, training = self.trained_blocks, self.trained
        after = None if training is None else training.weights
        return blocks is not None and blocks.weights == "full_precision" and after != "full_precision"

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
    def keeps_rounded(self) -> bool:
        """Whether the weights of the calibrated model lie on their grids, instead of being rounded to nearest in every pass."""
        stays = self.rounding.method != "nearest" or self.trained_ranges is not None
        return stays and self.quantization.weight.bits < 16

    @property
    def output_folder(self) -> str:
        """``output`` with its placeholders filled in."""
        return self.output.replace("{name}", self.name).replace("{setting}", self.quantization.label)
