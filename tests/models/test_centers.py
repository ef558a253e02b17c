"""Centers: what is subtracted before rounding is in the biases of linears afterwards, and softmax does not see that of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.models.architectures import view_model
from fptquant.models.instrument import instrument, iter_quantizers
from fptquant.models.prefix import compute_prefix_
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.quantizers.quantizer import Quantizer
from fptquant.stages.progress import quiet
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOWS = token_ids(5, 24, seed=5)


def centered(
    architecture: str, *, dynamic: bool = False, prefix: bool = False, part: dict[str, Any] | None = None, **options: Any
) -> PreTrainedModel:
    """A calibrated model of float64 with centers at inputs of linears and at caches."""
    model = tiny_model(architecture, dtype=torch.float64)
    both = {"bits": 4, "dynamic": dynamic, "centered": True, **(part or {})}
    quantization = setting(weight_bits=4, activation=both, kv_cache=both, prefix=[3, 4] if prefix else None, **options)
    instrument(model, quantization, residual_scaling="input", down_hadamard=True)
    if prefix:
        compute_prefix_(model, [3, 4])
    set_weight_ranges_(model)
    set_activation_ranges_(model, WINDOWS)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_center_is_the_mean_of_each_channel_in_full_precision(architecture: str, dynamic: bool) -> None:
    model = centered(architecture, dynamic=dynamic, sites="all")
    found = {name: quantizer.center for name, quantizer in iter_quantizers(model) if quantizer.center is not None}
    sites = ("attn_in", "k_cache", "v_cache", "o_in", "mlp_in", "down_in")
    assert sorted(found) == sorted(f"layers.{index}.{site}" for index in range(2) for site in sites)
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    quantizers = {name: quantizer for name, quantizer in iter_quantizers(model) if name in found}
    for name, quantizer in quantizers.items():
        quantizer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
    for _, quantizer in iter_quantizers(model):
        quantizer.mode = "off"
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    for name, center in found.items():
        values = torch.cat(seen[name])
        expected = values.mean((0, 2))[:, None] if values.dim() == 4 else values.mean((0, 1))
        assert torch.allclose(center.double(), expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_biases_and_softmax_make_up_for_what_is_not_added_again(architecture: str, dynamic: bool) -> None:
    """Rounded values without their centers: linears have W c in their biases, attention outputs that of values, keys do without."""
    model = centered(architecture, dynamic=dynamic)
    expected = logits(model)
    for block in view_model(model).blocks:
        for name, linear in block.linears():
            assert isinstance(linear, QuantizedLinear)
            norm = block.input_norm if name in ("q_proj", "k_proj", "v_proj") else block.post_norm
            quantizer = linear.input_quantizer if name in ("o_proj", "down_proj") else norm.output_quantizer
            assert isinstance(quantizer, Quantizer)
            shift = linear.quantized_weight() @ quantizer.center.double()
            linear.register_forward_hook(lambda module, args, output, shift=shift: output + shift)
        values: Any = block.attention.value_quantizer
        every_head = values.center.repeat_interleave(block.o_proj.in_features // values.center.numel(), 0).flatten().double()
        inverse = block.o_proj.register_forward_pre_hook(lambda module, args, center=every_head: (args[0] + center,))
        assert inverse is not None
    sites = [quantizer for _, quantizer in iter_quantizers(model) if quantizer.center is not None]
    assert len(sites) == 2 * 6
    for quantizer in sites:
        quantizer.register_forward_hook(lambda module, args, output: output - module.center.double())
    assert (logits(model) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_keys_of_a_prefix_lose_the_same_constant() -> None:
    """A prefix is not rounded and takes no part in the mean; where other keys stay without their center, its keys must lose it."""
    model = centered("LlamaForCausalLM", prefix=True)
    expected = logits(model)
    keys = {name: quantizer for name, quantizer in iter_quantizers(model, "kv_cache") if name.endswith("k_cache")}
    for quantizer in keys.values():
        quantizer.register_forward_hook(lambda module, args, output: output - module.center.double())
    alone = logits(model)
    for block, quantizer in zip(view_model(model).blocks, keys.values(), strict=True):
        block.attention.prefix.key -= quantizer.center  # type: ignore[operator, union-attr]
    assert (logits(model) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (alone - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_centers_pay_where_channels_have_means(dynamic: bool) -> None:
    """Biases of keys and values far from 0: with centers the error of the logits is a fraction."""
    errors = []
    for part in ({"centered": True}, {"centered": False}):
        model = tiny_model("Qwen2ForCausalLM", dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        for block in view_model(model).blocks:
            for name in ("k_proj", "v_proj"):
                bias = block.linear(name).bias
                bias.data = 20 * torch.randn(bias.shape, generator=generator, dtype=torch.float64)
        exact = logits(model)
        both = {"bits": 4, "dynamic": dynamic, **part}
        instrument(model, setting(16, kv_cache=both))
        set_activation_ranges_(model, WINDOWS)
        errors.append(float((logits(model) - exact).norm() / exact.norm()))
    assert errors[0] < 0.6 * errors[1]


def test_a_run_saves_its_centers(tmp_path: Path) -> None:
    overrides = [
        "quantization=w4a4kv4-dynamic", "quantization.activation.centered=true", "quantization.kv_cache.centered=true",
        "quantization.prefix=null", "calibration.windows=2", "calibration.window=32", "evaluation.window=32",
    ]  # fmt: skip
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    config = fq.load_config("fptquant-local", *overrides)
    result = fq.calibrate(model, tiny_tokenizer(), config, progress=quiet)
    assert result.config.quantization.setting == "w4a4kv4-dynamic, activations and cache centered"
    loaded, _ = fq.load_calibrated(result.save(tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, result.model(token_ids()).logits)
    centers = {name: quantizer.center for name, quantizer in iter_quantizers(loaded) if quantizer.center is not None}
    assert len(centers) == 2 * 6
    narrow = loaded.to(torch.bfloat16)
    assert all(quantizer.center.dtype == torch.float32 for _, quantizer in iter_quantizers(narrow) if quantizer.center is not None)


def test_a_center_needs_calibration_text_and_something_to_round() -> None:
    with pytest.raises(fq.UserError, match=r"quantization\.kv_cache\.centered: has no effect"):
        fq.load_config("rtn", "quantization=w4a8-dynamic", "quantization.kv_cache.centered=true")
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(4, dynamic=True, kv_cache={"bits": 4, "dynamic": True, "centered": True}))
    with pytest.raises(fq.UserError, match=r"quantizer layers\.0\.k_cache saw no value"):
        set_activation_ranges_(model, WINDOWS[:0])
