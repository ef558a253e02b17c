"""Saves a calibrated model and loads it again, in another process, with the same logits.

What is written::

    out/metrics.json, config.yaml, environment.json   what was done, with which settings and versions
    out/merged/                   full-precision weights with the transforms merged (rounded, if GPTQ did): a plain checkpoint
    out/transformed/              instead of merged/ where something is left to do at run time (T_d, T_h, S_n); its config is
                                  called model_config.json so that nothing loads it as a plain model by mistake
    out/quantizers.safetensors    every static scale and zero point
    out/prefix.safetensors        keys and values of the prefix of every block, if there is one
    out/transforms.safetensors    the transforms themselves; what acts online is read from here, the rest is merged already
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.config.loading import dump_config, load_config
from fptquant.diagnostics import diagnostics
from fptquant.errors import UserError
from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.folders import MERGED, TRANSFORMED, find_saved
from fptquant.models.instrument import instrument_for, load_ranges_, range_tensors, set_modes
from fptquant.models.loading import align_weights_
from fptquant.models.prefix import Prefix, model_prefixes, prefix_length
from fptquant.models.quiet import quiet_weight_bars
from fptquant.quantizers.quantizer import Quantizer
from fptquant.reports.run_folder import run_folder, write_json
from fptquant.transforms import ModelTransforms, TransformOptions, build_transforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fptquant.config.schema import Config

QUANTIZERS, TRANSFORMS, PREFIX = "quantizers.safetensors", "transforms.safetensors", "prefix.safetensors"
HIDDEN_CONFIG = "model_config.json"


def _prefix_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Key and value of the prefix of every block."""
    return {
        f"layers.{index}.{part}": value.detach().cpu().contiguous()
        for index, prefix in enumerate(model_prefixes(model))
        for part, value in prefix.named_buffers()
    }


def _plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the library's own class: what the quantizers and the prefix added is left out."""
    added = {
        f"{path}.{part}"
        for path, module in model.named_modules()
        if isinstance(module, Quantizer | Prefix)
        for part, _ in module.named_buffers()
    }
    return {name: value for name, value in model.state_dict().items() if name not in added}


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Errors of the disk as OSError: the safetensors library has a class of its own for them, with the number in its text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@dataclass(frozen=True)
class CalibrationResult:
    """A calibrated model, and how it came about."""

    model: PreTrainedModel = field(repr=False)
    """Full-precision weights with the transforms merged, or what rounding has made of them; quantizers simulate the setting in
    every forward pass."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    config: Config
    """As it was given, with the prefix as token ids."""
    transforms: ModelTransforms = field(repr=False)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Seconds of each stage, and what the stages report."""

    @property
    def fully_mergeable(self) -> bool:
        """Whether the transformed model is a plain model of the library's own class."""
        return self.transforms.fully_mergeable

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes everything that ``fptquant.load_calibrated`` needs, whole or not at all; see `fptquant.models.saving`.

        Raises:
            UserError: if the folder holds another run, cannot be written, or the disk is full.
        """
        from huggingface_hub import save_torch_state_dict
        from safetensors.torch import save_file

        with run_folder(folder, overwrite=overwrite) as partial:
            weights = partial / (MERGED if self.fully_mergeable else TRANSFORMED)
            weights.mkdir()
            with _disk_errors():
                save_torch_state_dict(_plain_state(self.model), weights)
                save_file(range_tensors(self.model), partial / QUANTIZERS)
            save_description(self, partial)
        return Path(folder)


def save_description(result: CalibrationResult, folder: Path) -> None:
    """Writes everything but weights and ranges into the folder of a calibrated model."""
    from safetensors.torch import save_file

    weights = folder / (MERGED if result.fully_mergeable else TRANSFORMED)
    model_config = result.model.config
    model_config.architectures = [type(result.model).__name__]
    model_config.dtype = result.model.dtype
    model_config.save_pretrained(weights)
    if not result.fully_mergeable:
        (weights / "config.json").rename(weights / HIDDEN_CONFIG)
    if result.model.generation_config is not None:
        result.model.generation_config.save_pretrained(weights)
    result.tokenizer.save_pretrained(weights)
    with _disk_errors():
        save_file({name: value.contiguous() for name, value in result.transforms.state_dict().items()}, folder / TRANSFORMS)
        if prefix_length(result.model):
            save_file(_prefix_tensors(result.model), folder / PREFIX)
    (folder / "config.yaml").write_text(dump_config(result.config), encoding="utf-8")
    write_json(folder / "environment.json", diagnostics())
    write_json(folder / "metrics.json", {**result.metrics, "transforms": result.transforms.describe()})


def _weights_folder(folder: Path) -> Path:
    for name in (MERGED, TRANSFORMED):
        if (folder / name).is_dir():
            return folder / name
    raise UserError(f"{folder} holds no calibrated model ({MERGED}/ or {TRANSFORMED}/ is missing); give a folder that save() wrote")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); calibrate and save again") from None


def load_transforms(model: PreTrainedModel, config: Config, folder: Path) -> ModelTransforms:
    """The transforms of the calibrated model of a folder, of which the weights hold all but what acts online.

    Args:
        model: it, or the full-precision one that it comes from.

    Raises:
        UserError: if the file is missing or damaged, or does not fit the model.
    """
    path = folder / TRANSFORMS
    transforms = build_transforms(model_sizes(view_model(model)), TransformOptions.of(config.transforms), seed=config.seed)
    try:
        transforms.load_state_dict(_load_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this model ({error}); calibrate and save again") from None
    return transforms.requires_grad_(False)


def _load_prefix_(model: PreTrainedModel, path: Path, length: int) -> None:
    """Fills in the prefix of every block; the file must fit the model exactly."""
    tensors, view = _load_tensors(path), view_model(model)
    for index, prefix in enumerate(model_prefixes(model)):
        for part in ("key", "value"):
            found = tensors.pop(f"layers.{index}.{part}", None)
            if found is None or found.shape != (view.num_kv_heads, length, view.head_dim):
                raise UserError(f"{path} has no {part} of the prefix that fits layer {index}; calibrate and save again")
            setattr(prefix, part, found.to(model.device))
    if tensors:
        raise UserError(f"{path} has more than this model's prefix, for example {next(iter(tensors))}; calibrate and save again")


def _load_weights(weights: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain model, in the dtype it was saved in, and tokenizer of a weights folder, whatever its config is called."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config_file = weights / ("config.json" if weights.name == MERGED else HIDDEN_CONFIG)
    try:
        model_config = AutoConfig.for_model(**json.loads(config_file.read_text(encoding="utf-8")))
        with quiet_weight_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(weights, config=model_config, dtype="auto", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(weights)
    except Exception as error:
        raise UserError(f"the model in {weights} is incomplete or damaged ({error}); calibrate and save again") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{weights} lacks {sorted(info['missing_keys'])[0]}; calibrate and save again")
    return model, tokenizer


def load_calibrated(folder: str | Path, *, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The (model, tokenizer) that `CalibrationResult.save` or `fptquant run` wrote, with the logits it had when it was saved.

    The config it was calibrated with is ``fptquant.load_config(folder)``.

    Raises:
        UserError: if neither the folder nor its ``model`` holds a calibrated model, or a file of it is missing or damaged.
    """
    folder = find_saved(folder)
    weights = _weights_folder(folder)
    config = load_config(folder / "config.yaml")
    model, tokenizer = _load_weights(weights)
    torch.nn.Module.to(model, device)
    align_weights_(model)
    model.train(False)
    model.requires_grad_(False)
    instrument_for(model, config, load_transforms(model, config, folder))
    load_ranges_(model, _load_tensors(folder / QUANTIZERS), folder / QUANTIZERS)
    if config.quantization.prefix is not None:
        _load_prefix_(model, folder / PREFIX, len(config.quantization.prefix))
    set_modes(model, "on")
    return model, tokenizer
