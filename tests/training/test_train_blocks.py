"""Training block by block: every block learns from its own output, and the model that comes of it is an ordinary calibrated one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.training import BlockTrainingConfig
from fptquant.data.training import TrainingData
from fptquant.files import KeptFiles
from fptquant.models.adapter import view_model
from fptquant.models.instrument import instrument, iter_quantizers, kept_modes, range_tensors, set_modes
from fptquant.models.prefix import compute_prefix_
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.stages.calibrate import CalibrationResult
from fptquant.stages.progress import quiet
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from fptquant.training.checkpoint import Checkpoint, save_checkpoint
from fptquant.training.train_blocks import FOLDER, KEPT, train_blocks_
from fptquant.training.transform_student import attach_transforms_, merge_attached_
from fptquant.transforms import ModelTransforms, TransformOptions
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.stages.transformed import fused_model, random_transforms
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOWS, HELD_OUT = token_ids(6, 24, seed=5), token_ids(2, 24, seed=6)
DATA = TrainingData(WINDOWS, HELD_OUT, "random tokens", "digest", 1.0, 0)


def attached(architecture: str, *, prefix: bool = False, spread: bool = False, bits: int = 4) -> tuple[Any, ModelTransforms]:
    """A tiny random model with attached transforms, at their start or random, whose ranges are set and on."""
    model = fused_model(architecture, "hidden-36", dtype=torch.float64).requires_grad_(False)
    options = TransformOptions(
        query_key_rotation=architecture != "Qwen3ForCausalLM", value_mixing="hadamard", up_scaling=True, down_hadamard=True,
        residual_scaling="input",
    )  # fmt: skip
    transforms = random_transforms(model, options)
    for parameter in () if spread else transforms.parameters():
        parameter.data.zero_()
    instrument(model, setting(bits, weight_bits=4, prefix=[3, 4] if prefix else None), residual_scaling="input", down_hadamard=True)
    attach_transforms_(model, transforms)
    if prefix:
        compute_prefix_(model, [3, 4])
    set_weight_ranges_(model)
    set_activation_ranges_(model, WINDOWS)
    return model, transforms


def outputs(model: Any, windows: Tensor) -> list[Tensor]:
    """The true residual behind every block, in a pass of the whole model."""
    found: list[Tensor] = []

    def catch(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        scale = view.decoder.context.running_scale
        found.append(hidden if scale is None else hidden * scale)

    view = view_model(model)
    hooks = [layer.register_forward_hook(catch) for layer in view.layers]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found


def error(model: Any, windows: Tensor) -> list[float]:
    """Of each block's output by passes of the whole model: mean over tokens of squared error over squared size."""
    quantized = outputs(model, windows)
    with kept_modes(model):
        set_modes(model, "off")
        exact = outputs(model, windows)
    pairs = zip(quantized, exact, strict=True)
    return [float(((y - t).square().sum(-1) / t.square().sum(-1)).mean()) for y, t in pairs]


@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_reported_of_blocks_are_errors_of_the_whole_model(architecture: str, prefix: bool) -> None:
    """Learning rates so small that nothing moves: then the streams are those of the model as it was."""
    model, transforms = attached(architecture, prefix=prefix, spread=True)
    expected = error(model, HELD_OUT)
    rates = dict.fromkeys(("query_key_rotation", "value_mixing", "up_scaling"), 1e-30)
    rates |= dict.fromkeys(("weight_range", "activation_range", "kv_cache_range"), 1e-30)
    settings = BlockTrainingConfig.model_validate({"steps": 1, "batch": 2, "lr": rates})
    report = train_blocks_(model, transforms, settings, DATA, seed=0, belongs_to={})
    assert [block["initial"] for block in report["blocks"]] == pytest.approx(expected, rel=1e-9)
    assert report["tokens"] == WINDOWS.numel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_comes_closer_and_the_merged_model_does_the_same(architecture: str) -> None:
    model, transforms = attached(architecture)
    before = error(model, HELD_OUT)
    groups = ["weight_range", "activation_range", "kv_cache_range", "query_key_rotation", "value_mixing", "up_scaling"]
    settings = BlockTrainingConfig.model_validate(
        {"steps": 40, "batch": 3, "evaluate_every": 10, "lr": dict.fromkeys(groups, 0.01)}
    )
    report = train_blocks_(model, transforms, settings, DATA, seed=0, belongs_to={})
    after = error(model, HELD_OUT)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))
    assert [block["best"] for block in report["blocks"]] == pytest.approx(after, rel=1e-6)
    assert set(groups) - set(report["parameters"]) == ({"query_key_rotation"} if architecture == "Qwen3ForCausalLM" else set())
    assert not any(parameter.requires_grad for parameter in transforms.parameters())
    assert all(quantizer.scale is None or not quantizer.scale.requires_grad for _, quantizer in iter_quantizers(model))
    with torch.no_grad():
        attached_logits = model(HELD_OUT).logits
        merge_attached_(model, transforms)
        merged_logits = model(HELD_OUT).logits
        set_modes(model, "off")
        plain = model(HELD_OUT).logits
    # a value in the middle between two steps may go either way
    agree = (attached_logits - merged_logits).abs() < 1e-9 * plain.abs().max()
    assert float(agree.double().mean()) > 0.9
    exact = fused_model(architecture, "hidden-36", dtype=torch.float64)(HELD_OUT).logits
    assert (plain - exact).abs().max() < 1e-5 * exact.abs().max()  # parameters are float32


SHORT = (
    "quantization=w4a8kv8-static", "quantization.prefix=null", "calibration.windows=2", "calibration.window=32",
    "evaluation.window=32",
    "block_training={steps: 4, batch: 2, windows: 4, window: 32, text: topics, held_out_windows: 1, evaluate_every: 2}",
)  # fmt: skip
MORE = (
    "training={steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}",
    "rounding={method: gptq, text: topics, windows: 2, window: 32}",
    "range_training={steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}",
)


def calibrate(*overrides: str, **options: Any) -> CalibrationResult:
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    config = fq.load_config("fptquant-local", *SHORT, *overrides)
    return fq.calibrate(model, tiny_tokenizer(), config, progress=quiet, **options)


def test_it_is_a_stage_of_the_pipeline() -> None:
    result = calibrate()
    assert all(linear.merging is None for linear in result.model.modules() if isinstance(linear, QuantizedLinear))
    assert result.metrics["stages"]["block training"] > 0
    local = calibrate("block_training=null")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(result.model.state_dict()[name], local.model.state_dict()[name])


@pytest.mark.parametrize("learned", [False, True])
def test_static_ranges_that_do_not_learn_are_set_anew_for_what_the_blocks_have_learned(
    learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(model: PreTrainedModel, windows: Tensor, **options: Any) -> None:
        seen.append(windows)
        set_activation_ranges_(model, windows, **options)

    monkeypatch.setattr("fptquant.stages.calibrate.set_activation_ranges_", watched)
    rate = "0.01" if learned else "null"
    result = calibrate(f"block_training.lr.activation_range={rate}", f"block_training.lr.kv_cache_range={rate}")
    assert len(seen) == (1 if learned else 2)
    found = {name: tensor.clone() for name, tensor in range_tensors(result.model).items()}
    set_activation_ranges_(result.model, seen[0])
    again = range_tensors(result.model)
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found) != learned


@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
@pytest.mark.parametrize("more", [(), MORE], ids=["alone", "with-everything"])
@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["kept", "lost"])
@pytest.mark.parametrize("last", [2, 4], ids=["in-a-block", "after-a-block"])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    last: int, seconds: float, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(*more)

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if path.parent == tmp_path / FOLDER / "1" and saved.position.step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr("fptquant.training.train_blocks.KeptFiles", lambda folder: KeptFiles(folder, seconds))
    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate("block_training.checkpoint_seconds=0", *more, folder=tmp_path)
    assert (tmp_path / KEPT / "block-0.safetensors").is_file() == (seconds == 0)
    again = calibrate("block_training.checkpoint_seconds=0", *more, folder=tmp_path, resume=True)
    expected, found = (result.model.state_dict() for result in (whole, again))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = [json.loads(line) for line in (tmp_path / FOLDER / "1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(fq.UserError, match=r"block_training\.lr\.residual_rotation: has no effect: T_r belongs to all blocks"):
        fq.load_config("fptquant-local", "block_training.lr.residual_rotation=0.1")
    with pytest.raises(fq.UserError, match=r"block_training\.lr\.up_scaling: has no effect: transforms\.up_scaling is not used"):
        fq.load_config("rtn", "block_training.lr.up_scaling=0.1")
    with pytest.raises(fq.UserError, match=r"block_training: has no effect: nothing is quantized"):
        fq.load_config("rtn", "quantization=w16a16", "block_training={}")
    with pytest.raises(fq.UserError, match=r"block_training\.window"):
        calibrate("block_training.window=100000")
