"""Training as a stage of the pipeline: with weights in full precision, whose ranges are set from what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fptquant as fq
from fptquant.data.windows import own_position
from fptquant.errors import UserError
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.saving import CalibrationResult
from fptquant.stages.progress import quiet
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:the held-out divergence", "ignore:(end-to-end|range) training did not lower", "ignore:the held-out loss"
)
SHORT = (
    "training.steps=3", "training.window=32", "training.text=topics", "training.held_out_windows=1", "training.evaluate_every=1",
    "evaluation.window=32", "calibration.windows=2", "calibration.window=32", "quantization.prefix=null",
)  # fmt: skip


def calibrate(*overrides: str, folder: Path | None = None) -> CalibrationResult:
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    config = fq.load_config("spinquant", *SHORT, "training.weights=full_precision", *overrides)
    return fq.calibrate(model, tiny_tokenizer(), config, folder=folder, progress=quiet)


def test_rotations_are_learned_with_weights_in_full_precision_and_ranges_set_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    forward = QuantizedLinear.quantized_weight

    def look(self: QuantizedLinear) -> torch.Tensor:
        weight = forward(self)
        if self.merging is not None and not self.context.full_precision:
            seen.add(bool(len(weight.detach()[0].unique()) <= 16))
        return weight

    with monkeypatch.context() as patched:
        patched.setattr(QuantizedLinear, "quantized_weight", look)
        result = calibrate()
    assert seen == {False}
    linears = [module for module in result.model.modules() if isinstance(module, QuantizedLinear)]
    for linear in linears:
        quantizer = linear.weight_quantizer
        assert quantizer is not None
        assert quantizer.mode == "on"
        assert quantizer.scale is not None
        found = quantizer.scale.clone()
        quantizer.set_range_from(linear.weight)
        assert torch.equal(quantizer.scale, found)
        assert len(linear.quantized_weight()[0].unique()) <= 16
    assert result.metrics["training"]["largest_condition_number"] == pytest.approx(1, abs=1e-4)


def test_it_differs_from_training_with_quantized_weights_and_gptq_may_follow() -> None:
    weights = {
        kind: calibrate(f"training.weights={kind}", "training.lr.weight_range=null").model.state_dict()
        for kind in ("full_precision", "quantized")
    }
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(weights["full_precision"][name], weights["quantized"][name])
    rounded = calibrate("rounding={method: gptq, text: topics, windows: 2, window: 32}").model
    linears = [module for module in rounded.modules() if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(linear.quantized_weight(), linear.weight) for linear in linears)


def test_a_rate_for_ranges_that_are_not_trained_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.lr\.weight_range: has no effect: training\.weights = full_precision"):
        fq.load_config("spinquant-gptq", "training.lr.weight_range=0.01")
    with pytest.raises(UserError, match=r"training\.weights: has no effect"):
        fq.load_config("fptquant", "quantization=w16a8", "training.weights=full_precision")


def test_nothing_is_trained_while_nothing_is_quantized() -> None:
    """With weights in full precision and 16 bits for the rest, student and teacher are one."""
    rounding = "rounding={method: gptq, text: topics, windows: 2, window: 32}"
    plain = ["quantization=w4a16", rounding]
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    kept = [override for override in SHORT if not override.startswith(("quantization", "training"))]
    file = fq.load_config("spinquant-gptq", *kept, "quantization=w4a16", rounding)
    result = fq.calibrate(model, tiny_tokenizer(), file, progress=quiet)
    assert "training" not in result.metrics
    assert all(linear.merging is None for linear in result.model.modules() if isinstance(linear, QuantizedLinear))
    with pytest.raises(UserError, match=r"training\.weights: has no effect: nothing is quantized meanwhile"):
        fq.load_config("spinquant", *plain, "training.weights=full_precision")
    with pytest.raises(UserError, match=r"training\.steps: has no effect: nothing is quantized meanwhile"):
        fq.load_config("fptquant-gptq", "quantization=w4a16", "training.steps=3")


def test_windows_are_spread_where_those_of_calibration_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def look(window: torch.Tensor, context: int | None) -> int:
        asked.append(context)
        return own_position(window, context)

    monkeypatch.setattr("fptquant.training.student.own_position", look)
    calibrate()
    assert set(asked) == {None}
    asked.clear()
    ranges = "{steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}"
    calibrate("calibration.context=100", f"range_training={ranges}")
    assert set(asked) == {100}
    assert len(asked) > (3 + 2) * 2
