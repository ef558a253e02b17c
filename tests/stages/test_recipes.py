"""Every shipped recipe from a model to a saved one, in two kinds of settings, with as little work as each stage allows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.loading import shipped_configs
from fptquant.config.schema import Config
from fptquant.data.text import Text
from fptquant.evaluation.cost import runtime_cost
from fptquant.models.instrument import set_modes
from fptquant.models.prefix import prefix_off
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.stages.progress import quiet
from tests.models.tiny import tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

METHODS = sorted(name for name, path in shipped_configs().items() if path.parent.name == "methods")
SETTINGS = {"w4a16": "none", "w4a4kv4-dynamic": "dynamic", "w4a8kv8-static": "static", "w4a4kv4-static": "static"}
"""Each with what it has of ranges for activations and cache."""
CELLS = [(method, list(SETTINGS)[(index + step) % 4]) for index, method in enumerate(METHODS) for step in (0, 2)]
"""Each recipe in a static setting and another one: all of them would take twice as long."""
QUAROT, SPINQUANT, FPTQUANT = {"T_d", "T_o", "T_h"}, {"T_d", "T_h"}, {"T_d", "S_n"}
ONLINE = {
    "quarot": QUAROT, "quarot-gptq": QUAROT, "prefixquant": QUAROT, "spinquant": SPINQUANT, "spinquant-gptq": SPINQUANT,
    "duquant": {"D"}, "flatquant": {"P", "P_h"}, "fptquant": FPTQUANT, "fptquant-gptq": FPTQUANT, "fptquant-autoround": FPTQUANT,
    "fptquant-local": FPTQUANT, "fptquant-local-gptq": FPTQUANT, "fptquant-local-autoround": FPTQUANT,
}  # fmt: skip
"""What a recipe leaves to do at run time by its page, nothing if it is not here."""
PREFIX = [3, 4]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file to learn from; it shares no passage with what is evaluated."""
    file = tmp_path_factory.mktemp("text") / "learn.txt"
    file.write_text("\n\n".join(f"Sentence number {number} to learn from." for number in range(60)))
    return str(file)


def config(method: str, setting: str, text: str, *more: str) -> Config:
    """A recipe with one step, one window, one iteration of everything that it has."""
    plain = fq.load_config(method, *more)
    small = [
        *more,
        f"quantization={setting}",
        f"text={text}",
        f"calibration.text={text}",
        "calibration.windows=1",
        "calibration.window=24",
    ]
    if SETTINGS[setting] == "static" and plain.quantization.prefix is not None:
        small.append(f"quantization.prefix={PREFIX}")
    for stage in ("block_training", "training", "range_training"):
        if getattr(plain, stage) is not None:
            short = {"steps": 1, "batch": 1, "window": 24, "held_out_windows": 1}
            small += [f"{stage}.{key}={value}" for key, value in short.items()]
    if plain.block_training is not None:
        small.append("block_training.windows=1")
    if plain.rounds:
        small += ["rounding.windows=1", "rounding.window=24"]
    if plain.rounding.method == "autoround":
        small += ["rounding.iterations=1", "rounding.batch=1"]
    if plain.local.method != "none":
        small.append("local.value_steps=1")
    if plain.transforms.block_rotation is not None:
        small.append("transforms.block_rotation.steps=2")
    return fq.load_config(method, *small, several=True)


@cache
def plain_model() -> PreTrainedModel:
    """Grouped heads, random weights and gains."""
    return tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)


def costs_of(method: str, setting: str, chosen: Config) -> set[str]:
    """Names of what is added at run time."""
    centered = {"center"} if method.startswith("fptquant") and setting != "w4a16" else set()
    prefix = {"prefix"} if isinstance(chosen.quantization.prefix, list) else set()
    return ONLINE.get(method, set()) | centered | prefix


@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
@pytest.mark.parametrize(("method", "setting"), CELLS)
@torch.no_grad()
def test_a_recipe_gives_a_model_that_is_saved_and_loaded(method: str, setting: str, text: str, tmp_path: Path) -> None:
    tokens = token_ids(1, 20)
    model, tokenizer, chosen = plain_model(), tiny_tokenizer(), config(method, setting, text)
    expected = model(tokens).logits
    with torch.enable_grad():
        result = fq.calibrate(model, tokenizer, chosen, progress=quiet)
    quantized = result.model(tokens).logits
    perplexity = fq.evaluate(
        result.model, tokenizer, text=Text("", "Other words, read at the end. " * 3), windows=1, window=24
    ).perplexity
    assert 1 < perplexity < float("inf")
    cost = runtime_cost(result.model, result.config)
    assert (set(cost.added), cost.scales) == (costs_of(method, setting, chosen), SETTINGS[setting])
    assert result.fully_mergeable == (method not in ONLINE)
    result.save(tmp_path / "saved")
    assert torch.equal(fq.load_calibrated(tmp_path / "saved")[0](tokens).logits, quantized)
    assert (quantized - expected).abs().max() > 1e-3 * expected.abs().max()
    if chosen.rounding.method == "nearest" and not trains_weights(chosen):  # the weights are still there
        assert_plain_without_quantizers(result, tokens, expected)


@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
@pytest.mark.parametrize("rounding", ["gptq", "autoround"])
@pytest.mark.parametrize("method", [name for name in METHODS if fq.load_config(name).rounding.method == "nearest"])
def test_every_method_can_round_its_weights_by_gptq_and_by_autoround(method: str, rounding: str, text: str, tmp_path: Path) -> None:
    """The weights that are left lie on the grids of their quantizers, and are what is saved."""
    chosen = config(method, "w4a4kv4-static", text, "rounding.clip=false", f"rounding.method={rounding}")
    result = fq.calibrate(plain_model(), tiny_tokenizer(), chosen, progress=quiet)
    linears = [module for module in result.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 7 * plain_model().config.num_hidden_layers
    for linear in linears:
        torch.testing.assert_close(linear.quantized_weight(), linear.weight, rtol=1e-5, atol=1e-7)
        assert linear.weight_quantizer is not None
        assert linear.weight.unique().numel() <= 16 * linear.weight.shape[0]
    report = result.metrics["rounding"]
    if rounding == "gptq":
        assert len(report["linears"]) == len(linears)
    else:
        assert len(report["blocks"]) == plain_model().config.num_hidden_layers
    tokens = token_ids(1, 20)
    result.save(tmp_path / "saved")
    with torch.no_grad():
        loaded = fq.load_calibrated(tmp_path / "saved")[0](tokens).logits
        assert torch.equal(loaded, result.model(tokens).logits)


def trains_weights(chosen: Config) -> bool:
    return chosen.block_training is not None and chosen.block_training.lr.weight is not None


@torch.no_grad()
def assert_plain_without_quantizers(result: fq.CalibrationResult, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    set_modes(result.model, "off")
    with prefix_off(result.model):
        assert (result.model(tokens).logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
def test_prefixquant_changes_the_function_by_its_weights_alone(text: str) -> None:
    chosen = config("prefixquant", "w4a4kv4-static", text)
    assert trains_weights(chosen)
    assert chosen.block_training is not None
    rates = chosen.block_training.lr.model_copy(update={"weight": None})
    frozen = chosen.model_copy(update={"block_training": chosen.block_training.model_copy(update={"lr": rates})})
    model, tokens = plain_model(), token_ids(1, 20)
    expected = model(tokens).logits.detach()
    assert_plain_without_quantizers(fq.calibrate(model, tiny_tokenizer(), frozen, progress=quiet), tokens, expected)
