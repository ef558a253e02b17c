"""Weights that were rounded for good can be measured as others: against what they were, one at a time, and all off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.schema import Config, RoundingConfig
from fptquant.evaluation.evaluate import evaluate_windows
from fptquant.evaluation.metrics import sqnr_db
from fptquant.evaluation.sensitivity import EVERYTHING, NOTHING, scan_sensitivity
from fptquant.evaluation.sqnr import quantizer_sqnr
from fptquant.evaluation.teacher import TeacherCache
from fptquant.evaluation.unrounded import unround_, unrounded_weights_
from fptquant.models.instrument import quantized_linears, quantizers_off
from fptquant.models.saving import CalibrationResult
from tests.models.tiny import tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOWS = token_ids(2, 24, seed=5)
SMALL = ["quantization=w4a8kv8-static", "calibration.windows=2", "calibration.window=48"]
GPTQ = ["rounding={method: gptq, windows: 2, window: 40}"]
AUTOROUND = ["rounding={method: autoround, windows: 2, window: 40, iterations: 5, batch: 2}"]
TRAINING = ["training={steps: 1, window: 32, held_out_windows: 1}", "training.lr.up_scaling=0.05"]
ROTATION = ["training.steps=1", "training.window=32", "training.held_out_windows=1", "training.lr.residual_rotation=0.05"]
BLOCKS = ["block_training={steps: 1, windows: 1, window: 32, batch: 1, held_out_windows: 1}"]
RANGES = ["range_training={steps: 1, window: 32, held_out_windows: 1}", "range_training.lr.weight_range=0.05"]


@pytest.fixture(scope="module", autouse=True)
def _short_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cutting the built-in texts takes longer than everything else."""
    folder = tmp_path_factory.mktemp("texts")
    for part in ("own", "evaluation"):
        (folder / f"{part}.txt").write_text("\n\n".join(f"{part} {number} of the words." for number in range(400)))
    SMALL[3:] = [f"text={folder}/own.txt", f"calibration.text={folder}/own.txt", f"evaluation.text={folder}/evaluation.txt"]
    yield
    del SMALL[3:]


def full_precision() -> PreTrainedModel:
    return tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, tie_word_embeddings=True)


def calibrate(config: Config) -> CalibrationResult:
    return fq.calibrate(full_precision(), tiny_tokenizer(), config, progress=lambda done, total, description: None)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {quantizer.name: linear.weight.detach() for linear, quantizer in quantized_linears(model)}


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("gptq", GPTQ),
        ("awq", GPTQ),
        ("fptquant-local", GPTQ),
        ("fptquant-local", AUTOROUND),
        ("fptquant-local", RANGES),
        ("fptquant-local", [*TRAINING, *GPTQ, *RANGES]),
        ("flatquant", [*BLOCKS, *GPTQ]),
        ("spinquant", [*ROTATION, *GPTQ]),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
def test_they_are_those_that_rounding_began_with(tmp_path: Path, method: str, changed: list[str]) -> None:
    config = fq.load_config(method, *SMALL, *changed)
    assert config.keeps_rounded
    calibrate(config).save(tmp_path / "rounded")
    nearest = config.model_copy(update={"rounding": RoundingConfig(), "range_training": None})
    assert not nearest.keeps_rounded
    expected = weights(calibrate(nearest).model)

    found = unrounded_weights_(full_precision(), tmp_path / "rounded", config)
    assert found.keys() == expected.keys()
    last_bits = 2e-6 if method == "spinquant" else 0.0  # its T_r was merged in two steps
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=0, atol=last_bits), name

    model, _ = fq.load_calibrated(tmp_path / "rounded")
    logits, rounded = model(WINDOWS).logits, {linear: linear.quantized_weight() for linear, _ in quantized_linears(model)}
    unround_(model, found)
    assert torch.equal(model(WINDOWS).logits, logits)
    sqnr = quantizer_sqnr(model, WINDOWS)
    for linear, quantizer in quantized_linears(model):
        assert sqnr[quantizer.name] == pytest.approx(sqnr_db(expected[quantizer.name], rounded[linear]), abs=last_bits)
        assert 5 < sqnr[quantizer.name] < 40
    with quantizers_off(model), torch.no_grad():
        error = (model(WINDOWS).logits - full_precision()(WINDOWS).logits).abs().max()
    assert float(error) < 1e-4


def test_each_is_scanned_alone(tmp_path: Path) -> None:
    config = fq.load_config("fptquant-local", *SMALL, *GPTQ)
    calibrate(config).save(tmp_path / "rounded")
    reference = TeacherCache.from_model(full_precision(), WINDOWS, text_name="random")
    model, other = (fq.load_calibrated(tmp_path / "rounded")[0] for _ in range(2))
    whole = evaluate_windows(model, WINDOWS, text_name="random", reference=reference)
    unrounded = unrounded_weights_(full_precision(), tmp_path / "rounded", config)
    unround_(model, unrounded)
    scan = {each.site: each.evaluation for each in scan_sensitivity(model, WINDOWS, reference=reference)}
    assert scan[NOTHING].jsd == pytest.approx(0, abs=1e-9)
    assert (scan[EVERYTHING].perplexity, scan[EVERYTHING].jsd) == (whole.perplexity, whole.jsd)
    for linear, quantizer in quantized_linears(other):  # rounded down_proj among weights as they were
        if not quantizer.name.endswith("down_proj.weight"):
            linear.weight.data = unrounded[quantizer.name]
    with quantizers_off(other):
        alone = evaluate_windows(other, WINDOWS, text_name="random", reference=reference)
    assert scan["down_proj.weight"].jsd == alone.jsd
    assert 0 < (alone.jsd or 0) < (scan["all weights"].jsd or 0) < (whole.jsd or 0)
