"""A run that trains and goes on finds nothing again that it knew before training, and ends with the same bits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.models.instrument import range_tensors
from fptquant.models.saving import CalibrationResult
from fptquant.stages import calibrate as pipeline
from fptquant.stages import find_prefix
from fptquant.stages.prepared import PREPARED
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

STAGES = ["find_prefix", "learn_rotation_", "optimize_local_", "set_weight_ranges_", "set_activation_ranges_"]


def model_of(seed: int = 0) -> PreTrainedModel:
    return tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, seed=seed)


def config(folder: Path, *overrides: str) -> Config:
    rng = random.Random(0)
    for name in ("train", "calibrate", "evaluate"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name}{rng.randint(0, 9999)}" for _ in range(300)))
    return fq.load_config(
        "fptquant",
        "quantization=w4a4kv4-static",
        "quantization.prefix=auto",
        "transforms.residual_rotation.learn=true",
        "transforms.residual_rotation.steps=2",
        "local.value_steps=2",
        f"calibration={{text: {folder / 'calibrate.txt'}, windows: 2, window: 32}}",
        f"training={{text: {folder / 'train.txt'}, steps: 3, window: 24, held_out_windows: 1, checkpoint_seconds: 0}}",
        f"evaluation.text={folder / 'evaluate.txt'}",
        *overrides,
    )


def run(chosen: Config, folder: Path, *, resume: bool = False, stop: int | None = None, seed: int = 0) -> CalibrationResult:
    """Calibrates; Ctrl-C comes when ``stop`` steps of training are done."""
    folder.mkdir(exist_ok=True)

    def progress(done: int, total: int, description: str) -> None:
        if description.startswith("end-to-end") and done == stop:
            raise KeyboardInterrupt

    return fq.calibrate(model_of(seed), tiny_tokenizer(), chosen, in_place=True, folder=folder, resume=resume, progress=progress)


@pytest.fixture(autouse=True)
def _massive_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_prefix, "MASSIVE", 1.0)
    monkeypatch.setattr(find_prefix, "MASSIVE_RATIO", 5.0)


def test_no_stage_is_repeated_and_the_bits_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config(tmp_path)
    whole = run(chosen, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path / "killed", stop=1)
    for stage in STAGES:
        monkeypatch.setattr(find_prefix if stage == "find_prefix" else pipeline, stage, None)
    resumed = run(chosen, tmp_path / "killed", resume=True)
    assert whole.config.quantization.prefix
    assert resumed.config == whole.config
    for expected, found in (
        (whole.model.state_dict(), resumed.model.state_dict()),
        (range_tensors(whole.model), range_tensors(resumed.model)),
        (whole.transforms.state_dict(), resumed.transforms.state_dict()),
    ):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    for key in ("prefix", "local", "residual_rotation"):
        assert _without_times(resumed.metrics[key]) == _without_times(whole.metrics[key]), key
    assert resumed.metrics["stages"].keys() == whole.metrics["stages"].keys()


def _without_times(report: object) -> object:
    if isinstance(report, dict):
        return {key: _without_times(value) for key, value in report.items() if key != "seconds"}
    return list(report) if isinstance(report, tuple) else report


def test_another_run_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    chosen, folder = config(tmp_path), tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(chosen, folder, stop=0)
    with pytest.raises(fq.UserError, match=r"belongs to another run \(weights: "):
        run(chosen, folder, resume=True, seed=1)
    with pytest.raises(fq.UserError, match=r"belongs to another run \(config.local.value_steps: 2, now 3\)"):
        run(config(tmp_path, "local.value_steps=3"), folder, resume=True)
    (folder / PREPARED).write_bytes(b"\0" * 100)
    with pytest.raises(fq.UserError, match=r"checkpoint-prepared.safetensors is damaged .* --overwrite"):
        run(chosen, folder, resume=True)
