"""Saving a calibrated model: in its own dtype, and with one message where the disk fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import fptquant as fq
from fptquant.stages.calibrate import CalibrationResult
from tests.models.tiny import token_ids
from tests.tiny_folder import save_tiny_folder


def calibrated(folder: Path, dtype: torch.dtype) -> CalibrationResult:
    model, tokenizer = fq.load_model(save_tiny_folder(folder), dtype=dtype)
    return fq.calibrate(model, tokenizer, fq.load_config("smoke"), progress=lambda done, total, text: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_model_comes_back_in_the_dtype_it_had(dtype: torch.dtype, tmp_path: Path) -> None:
    # the config says float32: what counts is the model that was given
    result = calibrated(tmp_path / "model", dtype)
    loaded, _ = fq.load_calibrated(result.save(tmp_path / "out"))
    assert loaded.dtype == dtype
    assert torch.equal(loaded(token_ids()).logits, result.model(token_ids()).logits)


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    result = calibrated(tmp_path / "model", torch.float32)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(fq.UserError, match=r"out could not be written \(No space left on device\); nothing was left there"):
        result.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_whose_rotation_was_learned_comes_back(tmp_path: Path) -> None:
    model, tokenizer = fq.load_model(save_tiny_folder(tmp_path / "model"))
    learned = "transforms.residual_rotation={start: random_hadamard, learn: true, steps: 1}"
    result = fq.calibrate(model, tokenizer, fq.load_config("smoke", learned), progress=lambda done, total, text: None)
    rotation = result.transforms.residual_rotation
    assert rotation is not None
    assert not rotation.is_fast
    loaded, _ = fq.load_calibrated(result.save(tmp_path / "out"))
    assert torch.equal(loaded(token_ids()).logits, result.model(token_ids()).logits)


def test_ranges_per_head_and_per_group_come_back(tmp_path: Path) -> None:
    model, tokenizer = fq.load_model(save_tiny_folder(tmp_path / "model"))
    groups = ["quantization.activation={granularity: per_group, group_size: 8}", "quantization.overrides.o_in.granularity=per_head"]
    config = fq.load_config("smoke", *groups)
    result = fq.calibrate(model, tokenizer, config, progress=lambda done, total, text: None)
    out = result.save(tmp_path / "out")
    assert fq.load_config(out) == config
    loaded, _ = fq.load_calibrated(out)
    assert loaded.model.layers[1].self_attn.o_proj.input_quantizer.scale.shape == (4,)
    assert loaded.model.layers[1].mlp.down_proj.input_quantizer.scale.shape == (12,)
    assert torch.equal(loaded(token_ids()).logits, result.model(token_ids()).logits)
