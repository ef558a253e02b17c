"""Saving a calibrated model: in its own dtype, and with one message where the disk fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import fptquant as fq
from fptquant.models.saving import CalibrationResult
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


LEARNED_ROTATIONS = {
    "end to end": ["training.steps=1", "training.window=32", "training.held_out_windows=1", "training.text=topics"],
    "locally": ["training=null", "local.method=closed_form", "local.value_steps=2", "transforms.residual_rotation.learn=true"],
}


@pytest.mark.parametrize("learned", LEARNED_ROTATIONS)
@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
def test_a_learned_residual_rotation_comes_back(learned: str, tmp_path: Path) -> None:
    """It is a dense matrix where the start was signs of a Hadamard transform."""
    model, tokenizer = fq.load_model(save_tiny_folder(tmp_path / "model"))
    small = ["quantization=w4a8kv8-dynamic", "quantization.prefix=null", *LEARNED_ROTATIONS[learned]]
    config = fq.load_config("spinquant", *small)
    result = fq.calibrate(model, tokenizer, config, progress=lambda done, total, text: None)
    loaded, _ = fq.load_calibrated(result.save(tmp_path / "out"))
    assert torch.equal(loaded(token_ids()).logits, result.model(token_ids()).logits)
