"""An instrumented model computes what the plain one did; quantizers sit where the site set says, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fptquant.config.quantization import QuantizationConfig
from fptquant.errors import UserError
from fptquant.models.architectures import view_model
from fptquant.models.decoder_layer import DecoderLayer
from fptquant.models.instrument import get_context, instrument, iter_quantizers, set_modes
from fptquant.models.norm import widen_norms_
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.ops import hadamard
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.sites import BLOCK_POINTS, MODEL_POINTS, POINTS, SITE_SETS
from tests.models.prepare import quantized_model, set_ranges, setting
from tests.models.tiny import ARCHITECTURES, SLIDING, given, tiny_model, token_ids

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def logits(model: PreTrainedModel, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(token_ids() if ids is None else ids, **inputs).logits
    return result


@pytest.mark.parametrize("sites", ["linears_kv", "linears_kv_bmm", "all_except_residual", "all"])
@pytest.mark.parametrize("sliding", [False, True])
def test_quantizers_off_change_nothing(architecture: str, sites: str, sliding: bool) -> None:
    if sliding and architecture not in SLIDING:
        sliding = False
    model = tiny_model(architecture, tie_word_embeddings=True, **(SLIDING[architecture] if sliding else {}))
    keys = set(model.state_dict())
    before = logits(model)
    instrument(model, setting(8, sites=sites, weight_bits=4))
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == keys


def test_sixteen_bits_place_no_quantizer(architecture: str) -> None:
    model = tiny_model(architecture)
    before = logits(model)
    assert instrument(model, setting(16, sites="all")) == {}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("sites", list(SITE_SETS))
def test_site_set_places_exactly_its_points(architecture: str, sites: str) -> None:
    model = tiny_model(architecture)
    quantizers = instrument(model, setting(8, sites=sites, weight_bits=4))
    points = SITE_SETS[sites]
    blocks = {f"layers.{i}.{point}" for i in range(2) for point in points if point in BLOCK_POINTS}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    weights = {f"layers.{i}.{name}.weight" for i in range(2) for name in names}
    assert quantizers.keys() == blocks | weights | {point for point in points if point in MODEL_POINTS}
    layers = [block.layer for block in view_model(model).blocks]
    assert all(isinstance(layer, DecoderLayer) is (sites == "all") for layer in layers)
    called: list[str] = []
    for name, quantizer in quantizers.items():
        quantizer.register_forward_hook(lambda *_, name=name: called.append(name))
    set_modes(model, "observe_range")
    logits(model)
    assert sorted(called) == sorted(quantizers)  # each exactly once in a pass


def test_every_point_changes_the_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    before = logits(model)
    quantizers = instrument(model, setting(3, sites="all", weight_bits=3))
    set_ranges(model, token_ids())
    set_modes(model, "off")
    for name, quantizer in quantizers.items():
        quantizer.mode = "on"
        error = (logits(model) - before).norm() / before.norm()
        assert 1e-3 < error < 1.5, name
        quantizer.mode = "off"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sites", ["linears_kv", "all"])
def test_error_falls_with_the_bits(architecture: str, sites: str, dynamic: bool) -> None:
    before = logits(tiny_model(architecture))
    errors = []
    for bits in (4, 6, 8):
        model = quantized_model(architecture, setting(bits, dynamic=dynamic, weight_bits=bits, sites=sites), ids=token_ids())
        errors.append(float((logits(model) - before).norm() / before.norm()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.1


def reference_model(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with large residuals, norms of unit gain that are exact in float64."""
    model = tiny_model(architecture, dtype=dtype)
    widen_norms_(model)
    view = view_model(model)
    with torch.no_grad():
        view.embedding.weight[::3] *= 3000
        view.embedding.weight[1::3] *= 1e-3
        view.final_norm.weight.fill_(1)
        for block in view.blocks:
            block.input_norm.weight.fill_(1)
            block.post_norm.weight.fill_(1)
            for linear in (block.o_proj, block.down_proj):
                linear.bias = nn.Parameter(0.1 * torch.randn(view.hidden_size).to(dtype))
    return model


@pytest.mark.parametrize("where", ["input", "output"])
def test_residual_scaling_is_exact(architecture: str, where: Any) -> None:
    torch.manual_seed(3)
    reference = reference_model(architecture, torch.float64)
    before = logits(reference)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = copy.deepcopy(reference).to(dtype)
        keys = list(model.state_dict())
        instrument(model, setting(16), residual_scaling=where)
        assert list(model.state_dict()) == keys
        errors[dtype] = float((logits(model).double() - before).norm() / before.norm())
    assert errors[torch.bfloat16] < 0.1
    assert errors[torch.float32] < 5e-6
    assert errors[torch.float64] < 1e-13


def test_residual_scaling_keeps_gains(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.float64)
    widen_norms_(model)
    before = logits(model)
    instrument(model, setting(16), residual_scaling="input")
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)


def test_residual_scaling_normalizes_what_is_carried(architecture: str) -> None:
    model = reference_model(architecture, torch.float32)
    instrument(model, setting(8, sites="all"), residual_scaling="input")
    seen: list[Tensor] = []
    for name, quantizer in iter_quantizers(model):
        if "residual" in name:
            quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    set_modes(model, "observe_range")
    logits(model)
    assert len(seen) == 4
    for residual in seen:  # a normalized residual plus a branch, which may be large only where the residual was small
        assert residual.square().mean(-1).sqrt().median() < 100


@pytest.mark.parametrize("block", [None, 24, 4])
def test_down_hadamard_is_online(architecture: str, block: int | None) -> None:
    model = tiny_model(architecture, dtype=torch.float64)
    before = logits(model)
    for part in view_model(model).blocks:
        weight = part.down_proj.weight
        weight.data.copy_(hadamard(weight.detach(), block_size=block))  # (H W^T)^T = W H^T
    instrument(model, setting(16), down_hadamard=True, down_hadamard_block=block)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


def test_every_site_has_its_own_number_of_kept_tokens(architecture: str) -> None:
    numbers = {"q": 3, "k_cache": 0, "v_cache": 2, "o_in": 4, "softmax_out": 5, "residual_mlp": 1}
    overrides = {site: {"full_precision_tokens": number} for site, number in numbers.items()}
    model = quantized_model(architecture, setting(3, sites="all", full_precision_tokens=6, overrides=overrides))
    untouched: dict[str, int] = {}

    def watch(quantizer: Quantizer, args: tuple[Tensor, ...], output: Tensor) -> None:
        axis = 1 if output.dim() == 3 else 2
        changed = (output != args[0]).transpose(0, axis).flatten(1).any(1)
        untouched[quantizer.name.rpartition(".")[2]] = int(changed.int().argmax())

    for _, quantizer in iter_quantizers(model):
        quantizer.register_forward_hook(watch)
    logits(model)
    assert untouched == {site: numbers.get(site, 6) for site in POINTS}


SHARED: dict[str, Any] = {
    "granularity": "per_group", "group_size": 8,
    "overrides": {
        "softmax_out": {"granularity": "per_head"}, "o_in": {"granularity": "per_head"}, "q": {"granularity": "per_head"},
        "v_out": {"granularity": "per_head"}, "down_in": {"granularity": "per_group", "group_size": 48},
        "mlp_in": {"granularity": "per_tensor"}, "k_cache": {"granularity": "per_group", "group_size": 4},
    },
}  # fmt: skip


def shared_setting(bits: int, **options: Any) -> QuantizationConfig:
    part = {"bits": bits}
    activation = {**part, "granularity": SHARED["granularity"], "group_size": SHARED["group_size"]}
    given = {"activation": activation, "kv_cache": part, "sites": "all", "overrides": SHARED["overrides"], **options}
    return QuantizationConfig.model_validate(given)


def test_ranges_per_head_and_per_group(architecture: str) -> None:
    model = quantized_model(architecture, shared_setting(6, full_precision_tokens=1), residual_scaling="input")
    shapes = {q.name.rpartition(".")[2]: tuple(q.scale.shape) for _, q in iter_quantizers(model)}
    expected = {"softmax_out": (4,), "o_in": (4,), "q": (4,), "v_out": (2,), "down_in": (2,), "mlp_in": (), "k_cache": (8,)}
    expected |= {"v_cache": (2,), "attn_in": (8,), "q_out": (8,), "k_out": (4,), "gate_out": (12,), "up_out": (12,)}
    expected |= {"silu_out": (12,), "o_out": (8,), "down_out": (8,), "residual_attn": (8,), "residual_mlp": (8,)}
    assert shapes == expected | {"embedding_out": (8,), "final_norm_out": (8,)}
    plain, errors = logits(tiny_model(architecture)), []
    for bits in (4, 6, 8):
        errors.append(float((logits(quantized_model(architecture, shared_setting(bits))) - plain).norm()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    ids = token_ids(2, 14)
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :9], **given(cache)), logits(model, ids[:, 9:], **given(cache))]
    assert (torch.cat(parts, dim=1) - whole).norm() < 1e-4 * whole.norm()
    copied = tiny_model(architecture)
    instrument(copied, shared_setting(6, full_precision_tokens=1), residual_scaling="input")
    copied.load_state_dict(model.state_dict())
    set_modes(copied, "on")
    assert torch.equal(logits(copied, ids), whole)


def test_groups_must_divide_the_channels(architecture: str) -> None:
    for site, size, channels in (("down_in", 40, 96), ("k_cache", 32, 16), ("attn_in", 48, 64)):
        model = tiny_model(architecture)
        overrides = {site: {"granularity": "per_group", "group_size": size}}
        with pytest.raises(UserError, match=f"group_size = {size} does not divide the {channels} channels of {site}"):
            instrument(model, setting(8, overrides=overrides))
        assert not hasattr(model.model, "context")


def test_deepcopy_is_independent(architecture: str) -> None:
    quantization = setting(6, sites="all", weight_bits=6, full_precision_tokens=1)
    model = quantized_model(architecture, quantization, residual_scaling="input")
    before = logits(model)
    with torch.enable_grad():
        model(token_ids())
    copied = copy.deepcopy(model)
    assert get_context(copied) is not get_context(model)
    assert all(module.context is get_context(copied) for module in copied.modules() if hasattr(module, "context"))
    shared = {id(q) for _, q in iter_quantizers(model)} & {id(q) for _, q in iter_quantizers(copied)}
    assert not shared
    set_modes(model, "off")
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(copied), before)


def test_state_dict_round_trip(architecture: str) -> None:
    quantization = setting(6, sites="all", weight_bits=4)
    model = quantized_model(architecture, quantization)
    other = tiny_model(architecture, seed=5)
    instrument(other, quantization)
    other.load_state_dict(model.state_dict())
    set_modes(other, "on")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(architecture: str, dtype: torch.dtype) -> None:
    before = logits(tiny_model(architecture)).double()
    for dynamic in (False, True):
        quantization = setting(8, sites="all", weight_bits=8, dynamic=dynamic)
        model = quantized_model(architecture, quantization, options={"dtype": dtype}, residual_scaling="input")
        result = logits(model)
        assert result.dtype == dtype
        assert (result.double() - before).norm() / before.norm() < 0.15


def test_gradients_reach_every_parameter(architecture: str) -> None:
    quantization = setting(8, sites="all", weight_bits=8, full_precision_tokens=1)
    model = quantized_model(architecture, quantization, residual_scaling="input")
    model.train()
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_replays_the_same_pass(architecture: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        quantization = setting(8, sites="all", full_precision_tokens=2)
        model = quantized_model(architecture, quantization, residual_scaling="input").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = token_ids()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_context_is_empty_between_passes(architecture: str) -> None:
    model = quantized_model(architecture, setting(8, full_precision_tokens=2), residual_scaling="input")
    logits(model)
    context = get_context(model)
    assert context.index is context.running_scale is context.residual is None
    with pytest.raises(ValueError, match="input_ids"):
        model()
    assert context.index is None


def test_linears_share_their_parameters(architecture: str) -> None:
    model = tiny_model(architecture)
    weights = [id(parameter) for parameter in model.parameters()]
    instrument(model, setting(8, weight_bits=4))
    assert [id(parameter) for parameter in model.parameters()] == weights
    assert all(isinstance(linear, QuantizedLinear) for block in view_model(model).blocks for _, linear in block.linears())


@pytest.mark.parametrize(
    ("options", "transforms", "message"),
    [
        ({"weight": {"bits": 4, "granularity": "per_group", "group_size": 36}}, {}, "group_size = 36 does not divide"),
        ({}, {"down_hadamard": True, "down_hadamard_block": 7}, "block_size = 7 does not divide"),
    ],
)
def test_errors_change_nothing(architecture: str, options: Any, transforms: Any, message: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(UserError, match=message):
        instrument(model, setting(8, **options) if not options else _with(options), **transforms)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    with pytest.raises(UserError, match="call instrument first"):
        get_context(model)


def test_impossible_hadamard_size_names_possible_ones(architecture: str) -> None:
    model = tiny_model(architecture, intermediate_size=94)
    with pytest.raises(UserError, match=r"94.*(92|96)"):
        instrument(model, setting(8), down_hadamard=True)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def _with(options: dict[str, Any]) -> Any:
    from fptquant.config.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(options)


def test_instrument_twice_is_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    instrument(model, setting(8))
    with pytest.raises(UserError, match="prepared for quantization already"):
        instrument(model, setting(8))
