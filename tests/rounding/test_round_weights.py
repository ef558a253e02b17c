"""Rounding as a stage of the pipeline: what it reports, what is saved, and that a killed run goes on block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.files import KeptFiles
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.saving import CalibrationResult
from fptquant.quantizers.autoround import LearnedRounding
from fptquant.reports.progress import Progress
from fptquant.rounding import round_gptq
from fptquant.rounding.round_blocks import DESCRIPTION
from fptquant.rounding.round_weights import FOLDER, damping_note
from tests.models.tiny import tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

BLOCKS = 3


TEXTS: list[str] = []
"""Settings that name short texts: cutting the built-in ones takes longer than everything else."""


@pytest.fixture(scope="module", autouse=True)
def _short_texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("texts")
    for part in ("rounding", "calibration", "evaluation"):
        words = (f"{part} {number} of the words." for number in range(400))
        (folder / f"{part}.txt").write_text("\n\n".join(words))
        TEXTS.append(f"{part}.text={folder / part}.txt")
    yield
    TEXTS.clear()


def config(*overrides: str) -> Config:
    small = ["calibration.windows=2", "calibration.window=48", "local.value_steps=5"]
    rounding = ["rounding.method=gptq", "rounding.windows=3", "rounding.window=40"]
    return fq.load_config("fptquant-local", *small, *rounding, *TEXTS, *overrides)


def calibrate(
    chosen: Config, folder: Path | None = None, *, stop_after: int | None = None, resume: bool = False
) -> CalibrationResult:
    """A tiny model; stopped as if by Ctrl-C once so many units (GPTQ's blocks, AutoRound's iterations) are done."""

    def progress(done: int, total: int, description: str) -> None:
        if description == DESCRIPTION and done == stop_after:
            raise KeyboardInterrupt

    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, num_hidden_layers=BLOCKS)
    return fq.calibrate(model, tiny_tokenizer(), chosen, folder=folder, resume=resume, progress=progress)


def without_seconds(report: Any) -> Any:
    if not isinstance(report, dict):
        return report
    return {key: without_seconds(value) for key, value in report.items() if key != "seconds"}


def assert_same(first: CalibrationResult, second: CalibrationResult) -> None:
    assert without_seconds(first.metrics["rounding"]) == without_seconds(second.metrics["rounding"])
    expected, found = first.model.state_dict(), second.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_search_and_the_descent_of_a_config_lower_every_loss_of_the_first_inputs() -> None:
    """Of the linears that read the same inputs in all three: q, k and v of the first block."""
    losses = []
    for more in ([], ["rounding.search_ranges=true"], ["rounding.search_ranges=true", "rounding.descent_sweeps=20"]):
        linears = calibrate(config(*more)).metrics["rounding"]["linears"]
        losses.append([linears[f"layers.0.{name}"]["loss"] for name in ("q_proj", "k_proj", "v_proj")])
    for more, less in itertools.pairwise(losses):
        assert all(new < old for new, old in zip(less, more, strict=True))
    few = calibrate(config("rounding.search_ranges=true", "rounding.candidates=2")).metrics["rounding"]["linears"]
    assert few["layers.0.q_proj"]["loss"] > losses[1][0]


def test_blocks_that_were_rounded_without_a_descent_are_not_taken_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fptquant.rounding.round_weights.KeptFiles", lambda folder: KeptFiles(folder, 0.0))
    with pytest.raises(KeyboardInterrupt):
        calibrate(config(), tmp_path, stop_after=2)
    again = calibrate(config("rounding.descent_sweeps=20"), tmp_path, resume=True)
    assert_same(again, calibrate(config("rounding.descent_sweeps=20")))


def test_the_weights_are_rounded_reported_and_saved(tmp_path: Path) -> None:
    result, tokens = calibrate(config()), token_ids(1, 30)
    linears = [module for module in result.model.modules() if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(linear.quantized_weight(), linear.weight) for linear in linears)
    report = result.metrics["rounding"]
    assert len(report["linears"]) == len(linears) == 7 * BLOCKS
    assert (report["method"], report["tokens"], report["damped_further"]) == ("gptq", 120, [])
    assert result.metrics["stages"]["rounding"] > 0
    result.save(tmp_path / "out")
    loaded, _ = fq.load_calibrated(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)


def test_a_hessian_that_is_damped_further_is_told_of() -> None:
    """Eight tokens span 8 of 64 columns: with next to no damping the Hessian has no factor."""
    chosen = config("rounding.windows=1", "rounding.window=8", "rounding.damping=1e-30")
    written = StringIO()
    with Progress(Console(file=written, width=200)) as progress:
        model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, num_hidden_layers=BLOCKS)
        result = fq.calibrate(model, tiny_tokenizer(), chosen, progress=progress)
    report = result.metrics["rounding"]
    further = {name: entry["damping"] for name, entry in report["linears"].items() if entry["damping"] > 1e-30}
    assert list(further) == report["damped_further"]
    assert len(further) > 5
    assert all(1e-20 < damping < 1e-4 for damping in further.values())  # where the last bits of float32 products begin to see it
    linears = [module for module in result.model.modules() if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(linear.quantized_weight(), linear.weight) for linear in linears)
    (line,) = (line for line in written.getvalue().splitlines() if line.startswith("GPTQ:"))
    assert line == damping_note(report, chosen)
    worst = max(further, key=lambda name: further[name])
    assert f"the Hessians of {len(further)} of 21 linears were not positive definite with 1e-30" in line
    assert f"damped further: {worst} {further[worst]:g}, " in line
    assert f" and {len(further) - 5} more; give more text" in line
    with pytest.warns(RuntimeWarning, match="GPTQ: the Hessians of"):  # a progress that says nothing
        calibrate(chosen)


def test_weights_of_tokens_change_what_is_rounded_and_clipped() -> None:
    for overrides in ([], ["rounding.clip=true", "rounding.method=nearest"]):
        plain, weighted = calibrate(config(*overrides)), calibrate(config(*overrides, "rounding.token_weights=fisher"))
        assert plain.metrics["rounding"]["linears"].keys() == weighted.metrics["rounding"]["linears"].keys()
        weights = (result.model.get_submodule("model.layers.1.mlp.up_proj").quantized_weight() for result in (plain, weighted))
        assert not torch.equal(*weights)


def test_weights_in_full_precision_are_left_alone() -> None:
    nearest = fq.load_config("fptquant-local", "quantization=w16a8-static", "calibration.windows=2", "calibration.window=48")
    chosen = nearest.model_copy(update={"rounding": config().rounding})
    result = calibrate(chosen)
    assert "rounding" not in result.metrics
    expected = calibrate(nearest).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in result.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:the held-out divergence", "ignore:end-to-end training did not lower")
def test_it_follows_training() -> None:
    training = "training={steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}"
    result = calibrate(config(training, "training.lr.weight_range=0.05"))
    linears = [module for module in result.model.modules() if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(linear.quantized_weight(), linear.weight) for linear in linears)
    trained = calibrate(
        config(training, "training.lr.weight_range=0.05", "rounding={method: nearest, text: auto, windows: 32, window: 512}")
    )
    for linear, other in zip(linears, (m for m in trained.model.modules() if isinstance(m, QuantizedLinear)), strict=True):
        assert torch.equal(linear.weight_quantizer.scale, other.weight_quantizer.scale)
        assert not torch.equal(linear.quantized_weight(), other.quantized_weight())


def test_a_window_longer_than_the_context_is_refused_before_any_work() -> None:
    with pytest.raises(fq.UserError, match=r"rounding\.window = 4,096 is longer"):
        calibrate(config("rounding.window=4096"))


@pytest.mark.parametrize(
    "options",
    [[], ["quantization=w4a8kv8-static-g16", "rounding.static_groups=false"], ["rounding.token_weights=fisher"]],
    ids=["channels", "groups", "fisher"],
)
def test_a_run_that_stops_goes_on_with_the_blocks_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    chosen, whole = config(*options), calibrate(config(*options))
    monkeypatch.setattr("fptquant.rounding.round_weights.KeptFiles", partial(KeptFiles, seconds=0))
    with pytest.raises(KeyboardInterrupt):
        calibrate(chosen, tmp_path, stop_after=2)
    weights = ["token-weights.safetensors"] * (chosen.rounding.token_weights == "fisher")
    kept = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert kept == ["block-0.safetensors", "block-1.safetensors", *weights]
    rounded: list[str] = []
    once = round_gptq.gptq_round

    def count(weight, quantizer, *rest):  # type: ignore[no-untyped-def]
        rounded.append(quantizer.name)
        return once(weight, quantizer, *rest)

    monkeypatch.setattr(round_gptq, "gptq_round", count)
    result = calibrate(chosen, tmp_path, resume=True)
    assert_same(whole, result)
    assert result.metrics["stages"]["rounding"] >= result.metrics["rounding"]["seconds"]
    assert len(rounded) == 7
    assert all(name.startswith("layers.2.") for name in rounded)
    rounded.clear()
    assert_same(whole, calibrate(chosen, tmp_path))  # it was not asked to go on
    assert len(rounded) == 7 * BLOCKS


AUTOROUND = ["rounding.method=autoround", "rounding.iterations=10", "rounding.batch=2"]


def test_autoround_is_reported_saved_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the third block, with two iterations of it done."""
    chosen, told = config(*AUTOROUND), []
    whole = calibrate(chosen)
    report, tokens = whole.metrics["rounding"], token_ids(1, 30)
    assert list(report["blocks"]) == ["layers.0", "layers.1", "layers.2"]
    assert all(0 < block["learned"] < block["nearest"] for block in report["blocks"].values())
    assert report["seconds"] == pytest.approx(sum(block["seconds"] for block in report["blocks"].values()))
    whole.save(tmp_path / "out")
    loaded, _ = fq.load_calibrated(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, whole.model(tokens).logits)

    monkeypatch.setattr("fptquant.rounding.round_weights.KeptFiles", partial(KeptFiles, seconds=0))
    with pytest.raises(KeyboardInterrupt):
        calibrate(chosen, tmp_path, stop_after=2 * 10 + 2)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["block-0.safetensors", "block-1.safetensors"]
    once = LearnedRounding.step_
    monkeypatch.setattr(LearnedRounding, "step_", lambda self, rate: (told.append(rate), once(self, rate)))
    result = calibrate(chosen, tmp_path, resume=True)
    assert_same(whole, result)
    assert told == pytest.approx([0.01 * (10 - step) for step in range(10) for _ in range(7)])


@pytest.mark.parametrize("changed", [["rounding.windows=4"], ["quantization=w4a8kv8-dynamic"], ["seed=1"], AUTOROUND], ids=str)
def test_blocks_of_another_run_are_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str]) -> None:
    """Of another text, of other quantizers, whose weights and ranges may be the same, or of other transforms."""
    monkeypatch.setattr("fptquant.rounding.round_weights.KeptFiles", partial(KeptFiles, seconds=0))
    monkeypatch.setattr("fptquant.stages.calibrate.load_prepared", lambda *unused: None)
    calibrate(config("quantization=w4a4kv4-dynamic"), tmp_path)
    chosen = config("quantization=w4a4kv4-dynamic", *changed)
    assert_same(calibrate(chosen), calibrate(chosen, tmp_path, resume=True))


def test_a_text_that_is_too_short_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" ".join(f"word {number} of the text" for number in range(40)))
    report = calibrate(config("quantization=w4a16", f"rounding.text={tmp_path / 'short.txt'}", "rounding.windows=1000")).metrics[
        "rounding"
    ]
    assert 0 < report["tokens"] < 40_000
    assert report["tokens"] % 40 == 0


def test_stages_without_a_text_of_their_own_learn_from_that_of_the_config(tmp_path: Path) -> None:
    text = tmp_path / "common.txt"
    text.write_text("\n\n".join(f"something in common {number} and more." for number in range(400)))
    training = ["range_training={steps: 1, window: 40, held_out_windows: 1}"]
    result = calibrate(config("rounding.text=auto", f"text={text}", *training))
    assert result.metrics["rounding"]["text"] == result.metrics["range_training"]["text"] == "common.txt"
    assert calibrate(config(f"text={text}", *training)).metrics["rounding"]["text"] == "rounding.txt"
