"""The training stages of the pipeline: their texts, their students, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fptquant.config.schema import Config
from fptquant.config.training import TRAINING_STAGES, OptimizationConfig
from fptquant.data.text import load_text
from fptquant.data.training import TrainingData, training_windows
from fptquant.data.windows import check_window
from fptquant.errors import UserError
from fptquant.models.instrument import set_modes
from fptquant.stages.distributed import on_main
from fptquant.stages.progress import Progress, quiet
from fptquant.stages.set_ranges import set_weight_ranges_
from fptquant.training.parallel import over_processes
from fptquant.training.range_student import RangeStudent
from fptquant.training.student import EndToEndStudent
from fptquant.training.train_end_to_end import check_settings, train_end_to_end_
from fptquant.training.transform_student import TransformStudent
from fptquant.transforms import ModelTransforms, ValueMixing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWN = {"evaluation", "output", "device", "seed"}
"""Parts of a config on which no training depends, or which it compares itself."""
RANGE_FOLDER = "range_training"
"""Where the checkpoint and the metrics.jsonl of range training lie, inside the run folder: they have the names of training's."""


def check_training(model: PreTrainedModel, config: Config) -> None:
    """Refuses what training could not do, before any text is fetched.

    Raises:
        UserError: if a window is longer than the model's context, or as
            `fptquant.training.train_end_to_end.check_settings`.
    """
    for key in TRAINING_STAGES:
        settings: OptimizationConfig | None = getattr(config, key)
        if settings is not None:
            check_window(model.config, settings.window, f"{settings.key}.window")
            check_settings(settings)


def training_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    settings: OptimizationConfig | None,
    *,
    progress: Progress = quiet,
) -> TrainingData | None:
    """The windows that a training of a config takes, free of passages of the evaluation text; None without settings.

    Raises:
        UserError: if the text is too short or cannot be had, or a window is longer than the model's context.
    """
    if settings is None:
        return None
    check_training(model, config)
    return training_windows(
        tokenizer,
        config.text_of(settings),
        windows=settings.wanted_windows,
        window=settings.window,
        held_out=settings.held_out_windows,
        seed=config.seed,
        distinct=getattr(settings, "distinct_windows", None),
        model=model,
        excluded=[load_text(config.evaluation.text, "evaluation")],
        progress=progress,
    )


def fingerprint(config: Config, weights: str, left_out: frozenset[str]) -> dict[str, Any]:
    """What a stage depends on besides its own settings, its seed and its texts; plain values.

    Args:
        weights: a digest of the full-precision model before anything was merged: merging has last bits of its own on every
            machine, on which a checkpoint does not depend.
        left_out: keys of the config that belong to the stage itself and to those after it.
    """
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _OWN | left_out}
    return {"config": settings, "weights": weights}


BEFORE_RANGE_TRAINING = frozenset({"range_training"})
BEFORE_TRAINING = BEFORE_RANGE_TRAINING | {"rounding", "training"}
BEFORE_BLOCK_TRAINING = BEFORE_TRAINING | {"block_training"}
"""What `fingerprint` leaves out for a stage that trains; the last for the stages before it, too."""


def train_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    config: Config,
    data: TrainingData,
    *,
    weights: str,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Trains transforms and ranges of an instrumented model end to end, and merges the best state; returns the report.

    The ranges are set and on, the transforms attached (`fptquant.training.transform_student.attach_transforms_`). Where weights are
    in full precision meanwhile, their ranges are set at the end, from the merged ones.

    Args:
        weights: as in `fingerprint`.
        folder, resume: as in `fptquant.training.train_end_to_end.train_end_to_end_`.

    Raises:
        UserError: if nothing is left to train, or as `train_end_to_end_`.
    """
    assert config.training is not None
    full_precision = config.training.weights == "full_precision"
    if full_precision:
        set_modes(model, "off", "weight")
    student = TransformStudent(model, transforms, config.training, positions=config.calibration.positions)
    belongs_to = fingerprint(config, weights, BEFORE_TRAINING)
    report = _train_(student, data, config.seed, belongs_to, folder=folder, resume=resume, progress=progress)
    if full_precision:
        set_weight_ranges_(model, progress=progress)
    mixings = [module for module in transforms.modules() if isinstance(module, ValueMixing)]
    return {**report, "largest_condition_number": max((float(m.condition_numbers().max()) for m in mixings), default=1.0)}


def train_ranges_(
    model: PreTrainedModel,
    unrounded: Mapping[str, Tensor],
    config: Config,
    data: TrainingData,
    *,
    weights: str,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Trains the ranges of a calibrated model end to end while the integers of its weights stay; returns the report.

    Args:
        unrounded: as in `fptquant.training.range_student.RangeStudent`.
        weights: as in `fingerprint`.
        folder: the run folder; checkpoint and metrics.jsonl lie in its folder ``range_training``. Nowhere by default.
        resume: as in `fptquant.training.train_end_to_end.train_end_to_end_`.

    Raises:
        UserError: if nothing is left to train, or as `train_end_to_end_`.
    """
    assert config.range_training is not None
    student = RangeStudent(model, unrounded, config.range_training, positions=config.calibration.positions)
    belongs_to = fingerprint(config, weights, BEFORE_RANGE_TRAINING)
    own = None if folder is None else folder / RANGE_FOLDER
    if own is not None:
        on_main(lambda: own.mkdir(exist_ok=True))
    return _train_(student, data, config.seed, belongs_to, folder=own, resume=resume, progress=progress)


def _train_(
    student: EndToEndStudent,
    data: TrainingData,
    seed: int,
    belongs_to: dict[str, Any],
    *,
    folder: Path | None,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Trains a student and finishes it in its best state; returns the report."""
    settings = student.settings
    if not student.parameter_groups():
        raise UserError(
            f"{settings.key}: nothing is left to train; the config uses nothing that has a learning rate ({settings.key}.lr)"
        )
    with over_processes(student) as forward:
        report = train_end_to_end_(
            student,
            data.train,
            data.held_out,
            settings,
            seed=seed,
            folder=folder,
            resume=resume,
            progress=progress,
            fingerprint=belongs_to,
            forward=forward,
        )
    student.finish_()
    return {**report.as_dict(), "text": data.source, "epochs": data.epochs, "dropped_windows": data.dropped}
