"""The training stage of the pipeline: its text, its student, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptquant.config.schema import Config
from fptquant.data.text import load_text
from fptquant.data.training import TrainingData, training_windows
from fptquant.data.windows import check_window
from fptquant.errors import UserError
from fptquant.models.instrument import set_modes
from fptquant.stages.parallel import over_processes
from fptquant.stages.progress import Progress, quiet
from fptquant.stages.set_ranges import set_weight_ranges_
from fptquant.stages.student import Student
from fptquant.stages.train_end_to_end import check_settings, train_end_to_end_
from fptquant.transforms import ModelTransforms, ValueMixing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_INFLUENCE = {"training", "rounding", "evaluation", "output", "device", "seed"}
"""Parts of a config on which training does not depend, or which it compares itself."""


def check_training(model: PreTrainedModel, config: Config) -> None:
    """Refuses what training could not do, before any text is fetched.

    Raises:
        UserError: if a window is longer than the model's context, or as
            `fptquant.stages.train_end_to_end.check_settings`.
    """
    if config.training is not None:
        check_window(model.config, config.training.window, "training.window")
        check_settings(config.training)


def training_data(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, *, progress: Progress = quiet
) -> TrainingData | None:
    """The windows of the whole run, free of passages of the evaluation text; None for a config without training.

    Raises:
        UserError: if the text is too short or cannot be had, or a window is longer than the model's context.
    """
    training = config.training
    if training is None:
        return None
    check_training(model, config)
    return training_windows(
        tokenizer,
        training.text,
        windows=training.steps * training.batch,
        window=training.window,
        held_out=training.held_out_windows,
        seed=config.seed,
        distinct=training.distinct_windows,
        model=model,
        excluded=[load_text(config.evaluation.text, "evaluation")],
        progress=progress,
    )


def fingerprint(config: Config, weights: str) -> dict[str, Any]:
    """What a run depends on besides the settings of training, its seed and its texts; plain values.

    Args:
        weights: a digest of the full-precision model before anything was merged: merging has last bits of its own on every
            machine, on which a checkpoint does not depend.
    """
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NO_INFLUENCE}
    return {"config": settings, "weights": weights}


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

    The ranges are set and on, the transforms attached (`fptquant.stages.student.attach_transforms_`). Where weights are in full
    precision meanwhile, their ranges are set at the end, from the merged ones.

    Args:
        weights: as in `fingerprint`.
        folder, resume: as in `fptquant.stages.train_end_to_end.train_end_to_end_`.

    Raises:
        UserError: if nothing is left to train, or as `train_end_to_end_`.
    """
    assert config.training is not None
    if config.training.weights == "full_precision":
        set_modes(model, "off", "weight")
    student = Student(model, transforms, config.training)
    if not student.parameter_groups():
        raise UserError(
            "training: nothing is left to train; the config uses no transform and no static range that has a learning rate "
            "(training.lr)"
        )
    with over_processes(student) as forward:
        report = train_end_to_end_(
            student,
            data.train,
            data.held_out,
            config.training,
            seed=config.seed,
            folder=folder,
            resume=resume,
            progress=progress,
            fingerprint=fingerprint(config, weights),
            forward=forward,
        )
    student.finish_()
    if config.training.weights == "full_precision":
        set_weight_ranges_(model, progress=progress)
    mixings = [module for module in transforms.modules() if isinstance(module, ValueMixing)]
    return {
        **report.as_dict(),
        "text": data.source,
        "epochs": data.epochs,
        "dropped_windows": data.dropped,
        "largest_condition_number": max((float(m.condition_numbers().max()) for m in mixings), default=1.0),
    }
