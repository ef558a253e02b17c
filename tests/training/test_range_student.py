"""Ranges trained after rounding: the integers of the weights stay, the teacher computes with what was there before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fptquant as fq
from fptquant.config.training import RangeTrainingConfig
from fptquant.models.instrument import instrument, iter_quantizers, load_ranges_, range_tensors, set_modes
from fptquant.models.prefix import compute_prefix_
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.saving import CalibrationResult
from fptquant.quantizers.gptq import GPTQOptions
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.stages.progress import quiet
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from fptquant.training.checkpoint import CHECKPOINT, Checkpoint, save_checkpoint
from fptquant.training.range_student import RangeStudent, weights_by_name
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer
from tests.training.learning import share_of_divergence

pytestmark = pytest.mark.filterwarnings(
    "ignore:the held-out divergence", "ignore:range training did not lower", "ignore:end-to-end"
)
WINDOWS = token_ids(5, 24, seed=5)
ONLINE: dict[str, Any] = {"residual_scaling": "input", "down_hadamard": True, "down_hadamard_block": 4, "out_hadamard": True}
WEIGHTS: dict[str, dict[str, Any]] = {
    "symmetric": {"bits": 4},
    "asymmetric": {"bits": 3, "symmetric": False},
    "groups": {"bits": 3, "symmetric": False, "granularity": "per_group", "group_size": 8},
    "per_tensor": {"bits": 8, "symmetric": False, "granularity": "per_tensor"},
}


def make(
    architecture: str = "LlamaForCausalLM",
    weight: dict[str, Any] | None = None,
    *,
    gptq: bool = True,
    prefix: bool = False,
    dtype: torch.dtype = torch.float64,
    activation_bits: int = 4,
    **rates: float | None,
) -> tuple[RangeStudent, Tensor]:
    """A student on a tiny random model that was rounded, and the logits of the model before."""
    model = tiny_model(architecture, dtype=dtype, hidden_size=32, intermediate_size=40, head_dim=8).requires_grad_(False)
    instrument(model, setting(activation_bits, weight=weight or WEIGHTS["asymmetric"], prefix=[3, 4] if prefix else None), **ONLINE)
    with torch.no_grad():
        expected = model(token_ids()).logits
    if prefix:
        compute_prefix_(model, [3, 4])
    set_weight_ranges_(model)
    set_activation_ranges_(model, WINDOWS)
    unrounded = weights_by_name(model)
    if gptq:
        round_gptq_(model, WINDOWS, GPTQOptions())
    return RangeStudent(model, unrounded, RangeTrainingConfig.model_validate({"lr": rates})), expected


def integers(student: RangeStudent) -> dict[str, Tensor]:
    """q - z of every weight."""
    found = {}
    for linear in student.model.modules():
        if isinstance(linear, QuantizedLinear) and linear.weight_quantizer is not None:
            scale = linear.weight_quantizer.scale
            assert scale is not None
            rows = linear.weight.detach().double().reshape(scale.numel(), -1) / scale.detach().double().reshape(-1, 1)
            assert (rows - rows.round()).abs().max() < (1e-4 if linear.weight.dtype != torch.bfloat16 else 0.5)
            found[linear.weight_quantizer.name] = rows.round()
    return found


@torch.no_grad()
def disturb_(student: RangeStudent, size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    for group in student.parameter_groups().values():
        for _, parameter in group:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_teacher_is_the_model_before_rounding_and_the_student_begins_as_the_rounded_one(
    architecture: str, prefix: bool
) -> None:
    student, expected = make(architecture, prefix=prefix, bias=0.002)
    head = student.view.lm_head
    with torch.no_grad():
        teacher = head(student._teacher_hidden(token_ids()))
        begins = head(student._student_hidden(token_ids()))
        student.finish_()
        rounded = student.model(token_ids()).logits
    assert torch.equal(teacher, expected)
    assert (begins - rounded).abs().max() < 1e-12 * rounded.abs().max()
    assert (rounded - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_integers_stay_whatever_happens_to_the_scales(kind: str, dtype: torch.dtype) -> None:
    student, _ = make(weight=WEIGHTS[kind], dtype=dtype, bias=0.002)
    before = integers(student)
    disturb_(student, 0.3)
    with torch.no_grad():
        trained = student.view.lm_head(student._student_hidden(token_ids()))
    student.finish_()
    after = integers(student)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for linear in (module for module in student.model.modules() if isinstance(module, QuantizedLinear)):
        assert linear.rescaling is None
        assert torch.equal(linear.quantized_weight(), linear.weight) or dtype == torch.bfloat16
    if dtype != torch.bfloat16:
        with torch.no_grad():
            finished = student.model(token_ids()).logits
        # a value in the middle between two steps may go either way where last bits differ
        agree = (finished - trained).abs() < (1e-10 if dtype == torch.float64 else 1e-4) * trained.abs().max()
        assert float(agree.double().mean()) > 0.95


def test_weights_that_nothing_has_rounded_are_rounded_to_nearest() -> None:
    student, _ = make(gptq=False)
    unrounded = {name: rescaling.unrounded for name, rescaling in rescalings(student).items()}
    student.finish_()
    for linear in (module for module in student.model.modules() if isinstance(module, QuantizedLinear)):
        quantizer = linear.weight_quantizer
        assert quantizer is not None
        assert torch.equal(linear.weight, quantizer(unrounded[quantizer.name]))


def rescalings(student: RangeStudent) -> dict[str, Any]:
    linears = [module for module in student.model.modules() if isinstance(module, QuantizedLinear)]
    return {linear.weight_quantizer.name: linear.rescaling for linear in linears if linear.weight_quantizer is not None}


@pytest.mark.parametrize("group", ["weight_range", "bias"])
@pytest.mark.parametrize("kind", ["symmetric", "groups"])
def test_gradients_of_weight_scales_and_biases_are_those_of_the_loss(kind: str, group: str) -> None:
    """Without other quantizers the loss is smooth in them: its differences say what the gradients must be."""
    rates = {"weight_range": None, "activation_range": None, "kv_cache_range": None, group: 0.002}
    student, _ = make(weight=WEIGHTS[kind], **rates)
    set_modes(student.model, "off", "activation")
    set_modes(student.model, "off", "kv_cache")
    student(token_ids()).backward()
    (members,) = student.parameter_groups().values()
    step, generator = 1e-4, torch.Generator().manual_seed(3)
    for _, parameter in members[:: max(1, len(members) // 5)]:
        direction = torch.randn(parameter.shape, generator=generator)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                losses.append(float(student(token_ids())))
                parameter.zero_()
        expected = (losses[0] - losses[1]) / (2 * step)
        assert parameter.grad is not None
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=2e-3, abs=1e-8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_biases_make_up_for_what_is_added_to_every_output(architecture: str) -> None:
    """S_n divides them as it divides what the layer itself adds: a bias given to both is one and the same."""
    student, _ = make(architecture, weight={"bits": 8}, activation_bits=16, bias=0.002)
    linears = [module for module in student.model.modules() if isinstance(module, QuantizedLinear)]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        begins = student._student_hidden(token_ids())
        for linear, trained in zip(linears, student._trained_biases, strict=True):
            shift = 0.1 * torch.randn(linear.out_features, generator=generator, dtype=torch.float64)
            linear.bias = torch.nn.Parameter(shift if linear.bias is None else linear.bias + shift)
            trained.share.copy_(-shift / trained.unit)
        assert (student._student_hidden(token_ids()) - begins).abs().max() < 1e-12 * begins.abs().max()
        for trained in student._trained_biases:
            trained.share.zero_()
        assert (student._student_hidden(token_ids()) - begins).abs().max() > 0.01 * begins.abs().max()


def test_biases_alone_bring_the_student_closer() -> None:
    rates = {"weight_range": None, "activation_range": None, "kv_cache_range": None}
    student, _ = make(dtype=torch.float32, bias=0.02, **rates)
    assert list(student.parameter_groups()) == ["bias"]
    assert share_of_divergence(student) < 0.95
    student.finish_()
    for linear in (module for module in student.model.modules() if isinstance(module, QuantizedLinear)):
        assert linear.weight_quantizer is not None
        assert linear.weight_quantizer.bias is not None
        assert not linear.weight_quantizer.bias.requires_grad
    with pytest.raises(fq.UserError, match="does not use, for example layers"):
        load_ranges_(student.model, range_tensors(student.model) | {"layers.0.q_proj.weight.biases": torch.zeros(1)}, "x")


def test_training_lowers_the_loss_and_only_what_has_a_rate_moves() -> None:
    student, _ = make(dtype=torch.float32, kv_cache_range=None)
    groups = student.parameter_groups()
    assert list(groups) == ["weight_range", "activation_range"]
    assert not any(name.endswith("shift") for name, _ in groups["weight_range"])
    assert any(name.endswith("shift") for name, _ in groups["activation_range"])
    caches = {name: quantizer.scale for name, quantizer in iter_quantizers(student.model, "kv_cache")}
    assert share_of_divergence(student) < 0.85
    student.finish_()
    assert all(caches[name] is quantizer.scale for name, quantizer in iter_quantizers(student.model, "kv_cache"))


SHORT = (
    "quantization=w4a8kv8-static", "range_training.steps=4", "range_training.window=32", "range_training.text=topics",
    "range_training.held_out_windows=1", "range_training.evaluate_every=1", "range_training.checkpoint_seconds=0",
    "range_training.lr.bias=0.01",
    "rounding={method: gptq, text: topics, windows: 2, window: 32}",
    "evaluation.window=32", "calibration.windows=2", "calibration.window=32", "quantization.prefix=null",
)  # fmt: skip
TRAINED = (
    "training.steps=2", "training.window=32", "training.text=topics", "training.held_out_windows=1", "training.evaluate_every=1",
)  # fmt: skip


def calibrate(*overrides: str, method: str = "fptquant-local", **options: Any) -> CalibrationResult:
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    config = fq.load_config(method, *SHORT, *overrides)
    return fq.calibrate(model, tiny_tokenizer(), config, progress=quiet, **options)


@pytest.mark.parametrize("trained", [(), TRAINED], ids=["local", "end-to-end"])
def test_a_run_that_is_killed_while_ranges_are_trained_goes_on_with_the_same_bits(
    trained: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(*trained)

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if path.parent.name == "range_training" and saved.position.step == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "killed"
    folder.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(*trained, folder=folder)
    assert (folder / "range_training" / CHECKPOINT).is_file()
    again = calibrate(*trained, folder=folder, resume=True)
    expected, found = (result.model.state_dict() for result in (whole, again))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    report = again.metrics["range_training"]
    assert (report["steps"], sorted(report["parameters"])) == (4, ["activation_range", "bias", "kv_cache_range", "weight_range"])
    ranges, found_ranges = (range_tensors(result.model) for result in (whole, again))
    assert all(torch.equal(ranges[name], found_ranges[name]) for name in ranges)
    assert again.metrics["stages"]["range training"] >= report["seconds"] > 0
    with pytest.raises(fq.UserError, match="belongs to another run"):
        calibrate(*trained, "rounding.damping=0.1", folder=folder, resume=True)


def test_it_is_saved_with_its_ranges(tmp_path: Path) -> None:
    result = calibrate()
    folder = result.save(tmp_path / "model")
    assert any(name.endswith("_proj.weight.bias") for name in range_tensors(result.model))
    model, _ = fq.load_calibrated(folder)
    ids = token_ids(2, 24, seed=1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, result.model(ids).logits)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(fq.UserError, match=r"range_training: has no effect: nothing is quantized"):
        fq.load_config("rtn", "quantization=w16a16", "range_training={}")
    off = "range_training.lr={weight_range: null, activation_range: null, kv_cache_range: null}"
    with pytest.raises(fq.UserError, match="nothing would be trained; give a learning rate to one of these: weight_range"):
        fq.load_config("rtn", off)
    with pytest.raises(fq.UserError, match=r"range_training\.lr\.kv_cache_range: has no effect"):
        fq.load_config("rtn", "quantization=w4a16", "range_training.lr.kv_cache_range=0.1")
    with pytest.raises(fq.UserError, match=r"range_training\.lr\.bias: has no effect"):
        fq.load_config("rtn", "quantization=w16a8", "range_training.lr.bias=0.1")
    with pytest.raises(fq.UserError, match=r"training\.lr\.bias"):
        fq.load_config("fptquant", "training.lr.bias=0.1")
    with pytest.raises(fq.UserError, match=r"range_training\.lr\.value_mixing"):
        fq.load_config("fptquant", "range_training.lr.value_mixing=0.1")
    with pytest.raises(fq.UserError, match=r"range_training\.window"):
        calibrate("range_training.window=100000")
