"""What a config says of the stages that train on text: budgets, learning rates, objectives."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fptquant.config.strict import StrictModel
from fptquant.config.transforms import TransformsConfig


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


class RoundedLearningRates(RangeLearningRates):
    """Those of range training, which may add to the outputs of linears what makes up for the mean error."""

    bias: float | None = Field(default=None, gt=0, description="of one bias for each output of a linear with a quantized weight")


class BlockLearningRates(LearningRates):
    """Those of block training, which may change the weights, too: what it leaves is another model than the one it began with."""

    weight: float | None = Field(default=None, gt=0)


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


class TransformTrainingConfig(OptimizationConfig):
    """What the stages have in common that train transforms, too."""

    lr: LearningRates = LearningRates()
    weights: Literal["quantized", "full_precision"] = Field(
        default="quantized", description="what the student's linears compute with; ranges of the latter are set after training"
    )


class BlockTrainingConfig(TransformTrainingConfig):
    """Training of transforms, ranges and, where asked, weights block by block: each gives what its full-precision self gives."""

    key: ClassVar[str] = "block_training"
    title: ClassVar[str] = "block training"

    steps: int = Field(default=64, ge=1, description="of each block")
    batch: int = Field(default=4, ge=1, description="windows per step, over all processes and micro batches")
    windows: int = Field(default=32, ge=1, description="different windows, whose hidden states are kept")
    objective: Literal["relative_mse", "mse"] = Field(
        default="relative_mse", description="the error of the block's output, of each token in proportion to its own size, or not"
    )
    lr: BlockLearningRates = BlockLearningRates()

    @property
    def wanted_windows(self) -> int:
        return self.windows


class TrainingConfig(TransformTrainingConfig, EndToEndConfig):
    """End-to-end training of transforms and ranges."""

    key: ClassVar[str] = "training"
    title: ClassVar[str] = "end-to-end training"


class RangeTrainingConfig(EndToEndConfig):
    """End-to-end training of ranges, and of biases where asked, once weights are rounded: these keep their integers."""

    key: ClassVar[str] = "range_training"
    title: ClassVar[str] = "range training"

    lr: RoundedLearningRates = RoundedLearningRates()


WITHOUT_INFLUENCE = frozenset({"checkpoint_seconds", "tensorboard", "shard_weights"})
"""Keys of the stages that train (`TRAINING_STAGES`) that do not change the result: they may change when a run goes on."""


TRAINING_STAGES = ("block_training", "training", "range_training")
"""Keys of a config, in the order of the stages."""
