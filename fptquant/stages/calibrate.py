"""The pipeline: a full-precision model and a config in, a calibrated model out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from fptquant.config.labels import AUTO_PREFIX
from fptquant.config.schema import Config
from fptquant.config.training import TRAINING_STAGES
from fptquant.config.transforms import BlockRotationConfig, SmoothingConfig
from fptquant.data.text import Text, load_text
from fptquant.data.training import TrainingData
from fptquant.data.windows import check_window, token_windows
from fptquant.files import WORTH_KEEPING
from fptquant.fingerprint import tensors_digest, weights_digest
from fptquant.float32_products import fast_float32_products
from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.instrument import check_instrument, instrument_for, load_ranges_, range_tensors, set_modes
from fptquant.models.loading import check_finite_weights
from fptquant.models.prefix import compute_prefix_
from fptquant.models.saving import CalibrationResult
from fptquant.quantizers.sites import weight_spec
from fptquant.reports.progress import Progress
from fptquant.rounding.round_weights import round_, rounding_data
from fptquant.stages.awq import find_scales_
from fptquant.stages.distributed import is_main, on_main
from fptquant.stages.find_prefix import check_prefix, resolve_prefix, with_prefix
from fptquant.stages.find_rotations import find_rotations_
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.learn_rotation import learn_rotation_
from fptquant.stages.merge_transforms import merge_blocks_, rotate_residual_, scale_norms_
from fptquant.stages.optimize_local import optimize_local_
from fptquant.stages.positions import with_positions
from fptquant.stages.prepared import PREPARED, Prepared, load_prepared, save_prepared
from fptquant.stages.progress import Progress as ProgressCallback
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from fptquant.stages.smooth import smooth_
from fptquant.stages.untie import untie_
from fptquant.training.range_student import weights_by_name
from fptquant.training.train import BEFORE_BLOCK_TRAINING, BEFORE_TRAINING, fingerprint, train_, train_ranges_, training_data
from fptquant.training.train_blocks import train_blocks_
from fptquant.training.transform_student import attach_transforms_, merge_attached_
from fptquant.transforms import ModelSizes, ModelTransforms, TransformOptions, build_transforms, check_transforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_model(model: PreTrainedModel, config: Config) -> None:
    """Finds what a config asks of a model that cannot be, before any work is done.

    Raises:
        UserError: if the architecture is not supported, a transform does not preserve the model's function, a Hadamard or
            group size is impossible, the model is calibrated already, or it cannot read its windows at other positions.
    """
    check_transforms(model_sizes(view_model(model)), TransformOptions.of(config.transforms))
    check_instrument(model, config.quantization)
    with_positions(model, config)


def needs_calibration_text(config: Config) -> bool:
    """Whether calibration text is read: for static ranges, for centers, to smooth activations, or to search for a prefix."""
    quantization = config.quantization
    if config.smoothing is not None or config.transforms.block_rotation is not None:
        return True
    if quantization.prefix == AUTO_PREFIX and quantization.has_prefix:
        return True
    overridden = any(override.bits not in (None, 16) for override in quantization.overrides.values())
    reading = [part for part in (quantization.activation, quantization.kv_cache) if not part.dynamic or part.centered]
    return any(part.bits < 16 for part in reading) or bool(reading and overridden)


def calibration_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, text: str | Text | None = None
) -> Tensor:
    """The calibration windows [windows, window] of a config, int64; none if no range needs them.

    Raises:
        UserError: if the text is shorter than asked, or the window longer than the model's context.
    """
    if not needs_calibration_text(config):
        return torch.empty((0, config.calibration.window), dtype=torch.int64)
    check_window(model.config, config.calibration.window, "the calibration window")
    wanted = config.calibration.text if text is None else text
    loaded = load_text(wanted, "calibration") if isinstance(wanted, str) else wanted
    return token_windows(tokenizer, loaded, config.calibration.windows, config.calibration.window, seed=config.seed)


@dataclass(frozen=True)
class _Texts:
    """What the stages of a config read; None for a stage that it does not have."""

    windows: Tensor
    """As `calibration_windows`."""
    block_training: TrainingData | None
    training: TrainingData | None
    rounding: TrainingData | None
    range_training: TrainingData | None


class _Stages:
    """Runs stages one after the other and notes how long each took, on top of the seconds that it begins with."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = dict(seconds)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def lasting(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs a stage that goes on after a kill, and returns its report, whose seconds are those of all parts of the run."""
        with self(name):
            report = work()
        self.seconds[name] = max(self.seconds[name], report["seconds"])
        return report


def _transform_(
    model: PreTrainedModel,
    config: Config,
    sizes: ModelSizes,
    windows: Tensor,
    earlier: Prepared | None,
    stage: _Stages,
    progress: ProgressCallback,
) -> tuple[ModelTransforms, dict[str, Any]]:
    """Untying, norm fusion, T_r, smoothing, local optimization and merging; returns the transforms and what the stages report.

    Transforms of blocks are not merged where they are trained: they are after that. What was found earlier is not found again.
    """
    report: dict[str, Any] = {}
    options = TransformOptions.of(config.transforms)
    transforms = build_transforms(sizes, options, seed=config.seed).to(model.device)
    if earlier is not None:
        transforms.load_state_dict(earlier.transforms)
    if config.norm_gains == "fused":
        with stage("fuse norms"):
            untie_(model)
            fuse_norms_(model)
    rotation = transforms.residual_rotation
    if rotation is not None and config.transforms.residual_rotation is not None:
        settings = config.transforms.residual_rotation
        if settings.learn and earlier is None:
            with stage("learn the residual rotation"):
                learned = learn_rotation_(
                    model, rotation, p=config.local.p, steps=settings.steps, lr=settings.lr, progress=progress
                )
                report["residual_rotation"] = learned.as_dict()
        with stage("merge the residual rotation"):
            rotate_residual_(model, rotation, progress)
    if config.smoothing is not None and earlier is None:
        with stage("smoothing"):
            report["smoothing"] = _smooth_(model, transforms, config, config.smoothing, windows, progress)
    if not config.attaches:
        scale_norms_(model, transforms)
    if config.local.method != "none" and earlier is None:
        with stage("local optimization"):
            local = optimize_local_(
                model,
                transforms,
                method=config.local.method,
                p=config.local.p,
                steps=config.local.steps,
                lr=config.local.lr,
                value_steps=config.local.value_steps,
                up_p=config.local.up_p,
                progress=progress,
            )
            report["local"] = local.as_dict()
    if config.transforms.block_rotation is not None and earlier is None:
        with stage("rotations of blocks"):
            _find_rotations_(model, transforms, config, config.transforms.block_rotation, windows, progress)
    if not config.attaches:
        with stage("merge the transforms"):
            merge_blocks_(model, transforms, progress=progress)
    return transforms, report


def _prefix_ids(config: Config) -> Sequence[int]:
    prefix = config.quantization.prefix
    return prefix if isinstance(prefix, list) else ()


def _find_rotations_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    config: Config,
    settings: BlockRotationConfig,
    windows: Tensor,
    progress: ProgressCallback,
) -> None:
    find_rotations_(
        model,
        transforms,
        windows,
        steps=settings.steps,
        seed=config.seed,
        prefix=_prefix_ids(config),
        left_out=config.quantization.full_precision_tokens,
        norms_scaled=not config.attaches,
        progress=progress,
    )


def _smooth_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    config: Config,
    settings: SmoothingConfig,
    windows: Tensor,
    progress: ProgressCallback,
) -> dict[str, Any]:
    quantization = config.quantization
    prefix = _prefix_ids(config)
    weight = weight_spec(quantization)
    if settings.method == "awq":
        if weight is None:
            return {}
        grid, granularity, candidates = weight.grid, weight.granularity, settings.candidates
        return find_scales_(
            model, transforms, windows, grid=grid, granularity=granularity, candidates=candidates, prefix=prefix, progress=progress
        )
    left_out = quantization.full_precision_tokens
    return smooth_(model, transforms, windows, alpha=settings.alpha, prefix=prefix, left_out=left_out, progress=progress)


@fast_float32_products
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    text: str | Text | None = None,
    found_prefix: list[int] | Literal["auto"] | None = "auto",
    in_place: bool = False,
    folder: Path | None = None,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> CalibrationResult:
    """Calibrates a model as a config says: merges its transforms, sets its ranges, simulates its quantizers.

    Stages: fuse norm gains, T_r, with ``config.smoothing`` the scales of channels (calibration text), local optimization (no data),
    weight ranges, activation ranges (calibration text), training of transforms and ranges with ``config.block_training`` block by
    block and with ``config.training`` end to end, merging (before the ranges where nothing is trained); with ``config.rounding``
    other than to nearest, rounding of the merged weights (text); with ``config.range_training`` training of ranges alone, while
    the weights keep their integers.
    The model is copied first, so that it can serve as the full-precision reference; ``in_place`` saves that memory.

    Args:
        text: calibration text instead of ``config.calibration.text``.
        found_prefix: what the search of ``prefix: auto`` has found before on this model and text; ``auto``: it is searched for.
        folder: where training keeps its checkpoint and metrics.jsonl, and the stages before it what they have found; nowhere by
            default.
        resume: go on from what is kept in ``folder``.
        progress: called as ``progress(done, total, description)``; a progress bar by default.

    Raises:
        UserError: for anything that could not work, before any work is done: an unsupported architecture, a transform that does not
            preserve this model's function, an impossible Hadamard size, an impossible group size, NaN or
            infinity in the weights, a calibrated model, too little text, a window longer than the context.

    Example:
        >>> result = calibrate(model, tokenizer, load_config("fptquant-local"))  # doctest: +SKIP
    """
    sizes = model_sizes(view_model(model))
    check_model(model, config)
    check_finite_weights(model)
    config = with_positions(model, config)
    windows = calibration_windows(model, tokenizer, config, text)
    check_prefix(model, tokenizer, config, {"calibration.window": windows.shape[1]})
    with nullcontext(progress) if progress is not None else Progress() as bars:
        texts = on_main(  # fetched or sampled once
            lambda: _Texts(
                windows,
                training_data(model, tokenizer, config, config.trained_blocks, progress=bars),
                training_data(model, tokenizer, config, config.trained, progress=bars),
                rounding_data(model, tokenizer, config, progress=bars),
                training_data(model, tokenizer, config, config.trained_ranges, progress=bars),
            )
        )
        calibrated = model if in_place else copy.deepcopy(model)
        return _calibrate_(calibrated, tokenizer, config, sizes, texts, found_prefix, folder, resume, bars)


def _calibrate_(
    calibrated: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    sizes: ModelSizes,
    texts: _Texts,
    found_prefix: list[int] | Literal["auto"] | None,
    folder: Path | None,
    resume: bool,
    progress: ProgressCallback,
) -> CalibrationResult:
    torch.manual_seed(config.seed)
    start = time.perf_counter()
    calibrated.train(False)
    calibrated.requires_grad_(False)
    # before anything is merged: merged weights differ in the last bits from machine to machine
    trains = any(getattr(config, key) is not None for key in TRAINING_STAGES)
    weights = weights_digest(calibrated.named_parameters()) if trains or folder is not None else ""
    file = None if folder is None else folder / PREPARED
    # of the config as it was given, whoever has searched for its prefix
    belongs_to = {
        **fingerprint(config, weights, BEFORE_BLOCK_TRAINING),
        "seed": config.seed,
        "windows": tensors_digest(texts.windows),
    }
    earlier = on_main(lambda: load_prepared(file, belongs_to)) if file is not None and resume else None
    stage = _Stages({} if earlier is None else earlier.seconds)
    if config.quantization.prefix == AUTO_PREFIX and found_prefix != AUTO_PREFIX:
        config = with_prefix(config, found_prefix)
    config, transforms, report = _prepare_(calibrated, tokenizer, config, sizes, texts.windows, earlier, stage, progress)
    long = config.attaches or sum(stage.seconds.values()) >= WORTH_KEEPING
    if file is not None and earlier is None and long and is_main():
        prefix = cast("list[int] | None", config.quantization.prefix)
        found = Prepared(transforms.state_dict(), range_tensors(calibrated), prefix, report, stage.seconds)
        save_prepared(file, found, belongs_to)
    report |= _finish_(calibrated, transforms, config, texts, weights, str(belongs_to), stage, folder, resume, progress)
    seconds = max(time.perf_counter() - start, sum(stage.seconds.values()))
    metrics = {"seconds": seconds, "stages": stage.seconds, "calibration_tokens": texts.windows.numel(), **report}
    metrics["largest_condition_numbers"] = transforms.largest_condition_numbers()
    return CalibrationResult(calibrated, tokenizer, config, transforms, metrics)


def _finish_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    config: Config,
    texts: _Texts,
    weights: str,
    belongs_to: str,
    stage: _Stages,
    folder: Path | None,
    resume: bool,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Block training, training, rounding and range training, those that the config has; returns their reports."""
    report: dict[str, Any] = {}
    kept: dict[str, Any] = {"folder": folder, "resume": resume, "progress": progress}
    blocks, training, rounding, range_training = texts.block_training, texts.training, texts.rounding, texts.range_training
    settings = config.trained_blocks
    if blocks is not None and settings is not None:
        mark = fingerprint(config, weights, BEFORE_TRAINING)
        report["block_training"] = stage.lasting(
            "block training",
            lambda: train_blocks_(
                model,
                transforms,
                settings,
                blocks,
                seed=config.seed,
                belongs_to=mark,
                positions=config.calibration.positions,
                **kept,
            ),
        )
        if training is None:
            merge_attached_(model, transforms)
        if config.outdated_weight_ranges:
            with stage("weight ranges, anew"):
                set_weight_ranges_(model, progress=progress)
        if training is None and config.outdated_ranges:
            with stage("activation ranges, anew"):
                kinds, places = config.outdated_ranges, config.calibration.first_position
                set_activation_ranges_(model, texts.windows, kinds=kinds, first_position=places, progress=progress)
    if training is not None:
        report["training"] = stage.lasting(
            "end-to-end training", lambda: train_(model, transforms, config, training, weights=weights, **kept)
        )
    unrounded = {} if range_training is None else weights_by_name(model)
    if rounding is not None:
        report["rounding"] = stage.lasting("rounding", lambda: round_(model, config, rounding, belongs_to=belongs_to, **kept))
    if range_training is not None:
        report["range_training"] = stage.lasting(
            "range training", lambda: train_ranges_(model, unrounded, config, range_training, weights=weights, **kept)
        )
    return report


def _prepare_(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    sizes: ModelSizes,
    windows: Tensor,
    earlier: Prepared | None,
    stage: _Stages,
    progress: ProgressCallback,
) -> tuple[Config, ModelTransforms, dict[str, Any]]:
    """All stages before training; what was found earlier is put in place. Returns the config with the prefix as token ids, the
    transforms, and what the stages report.
    """
    prefix_report: dict[str, Any] = {}
    if earlier is None:
        with stage("find the prefix"):
            config, prefix_report = resolve_prefix(model, tokenizer, config, windows, progress=progress)
    else:
        config = with_prefix(config, earlier.prefix)
    transforms, report = _transform_(model, config, sizes, windows, earlier, stage, progress)
    transforms.requires_grad_(False)  # what trains some of them says so
    instrument_for(model, config, transforms)
    if config.attaches:
        attach_transforms_(model, transforms)
    if isinstance(config.quantization.prefix, list):
        compute_prefix_(model, config.quantization.prefix)
    if earlier is not None:
        load_ranges_(model, earlier.ranges, PREPARED)
        set_modes(model, "on")
        return config, transforms, earlier.report
    with stage("weight ranges"):
        set_weight_ranges_(model, progress=progress)
    with stage("activation ranges"):
        set_activation_ranges_(model, windows, first_position=config.calibration.first_position, progress=progress)
    return config, transforms, report | prefix_report
