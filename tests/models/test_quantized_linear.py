"""The quantized linear computes its formula: Hadamard, scale of S_n, quantizers, bias, in that order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fptquant.config.loading import load_config
from fptquant.models.context import ForwardContext
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.ops import hadamard
from fptquant.quantizers.grid import IntegerGrid, PerChannel, PerTensor
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.sites import point_specs, weight_spec
from fptquant.transforms import DownHadamard


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 6, bias=bias, dtype=torch.float64)


def quantizer(bits: int) -> Quantizer:
    made = Quantizer(IntegerGrid(bits, symmetric=False), PerTensor(), dynamic=True)
    made.mode = "on"
    return made


def test_plain_is_the_same_function_of_the_same_parameters() -> None:
    plain = linear()
    made = QuantizedLinear(plain, ForwardContext())
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    assert made.weight is plain.weight
    assert made.bias is plain.bias
    assert torch.equal(made(x), plain(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("where", ["input", "output"])
def test_scale_divides_the_row(bias: bool, where: str) -> None:
    plain, context = linear(bias=bias), ForwardContext()
    made = QuantizedLinear(plain, context)
    made.scaled = "input" if where == "input" else "output"
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    assert torch.equal(made(x), plain(x))  # no running scale outside of a pass
    context.running_scale = 1 + 100 * torch.rand(2, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(made(x), plain(x) / context.running_scale, rtol=1e-12, atol=1e-12)


def test_order_of_the_steps() -> None:
    plain, context = linear(), ForwardContext()
    made = QuantizedLinear(plain, context)
    made.online, made.scaled = (DownHadamard(24, 12),), "input"
    made.input_quantizer, made.output_quantizer = quantizer(4), quantizer(5)
    made.weight_quantizer = Quantizer(IntegerGrid(3), PerChannel(0))
    made.weight_quantizer.set_range_from(plain.weight)
    made.weight_quantizer.mode = "on"
    context.running_scale = torch.tensor([[[2.0], [300.0]]], dtype=torch.float64)
    x = torch.randn(1, 2, 24, dtype=torch.float64)
    prepared = made.input_quantizer(hadamard(x / context.running_scale, block_size=12))
    torch.testing.assert_close(made.prepare_input(x), prepared, rtol=1e-12, atol=1e-12)
    y = F.linear(prepared, made.weight_quantizer(plain.weight)) + plain.bias / context.running_scale
    torch.testing.assert_close(made(x), made.output_quantizer(y), rtol=1e-12, atol=1e-12)


def test_kept_tokens_skip_both_quantizers() -> None:
    plain, context = linear(), ForwardContext()
    made = QuantizedLinear(plain, context)
    made.input_quantizer, made.output_quantizer = quantizer(2), quantizer(2)
    made.input_quantizer.full_precision_tokens = made.output_quantizer.full_precision_tokens = 1
    context.begin(torch.arange(2)[None])
    x = torch.randn(1, 2, 24, dtype=torch.float64)
    result = made(x)
    torch.testing.assert_close(result[:, 0], plain(x)[:, 0])
    assert (result[:, 1] - plain(x)[:, 1]).abs().max() > 1e-2


def int8(rows: Tensor, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Integers of each row, and its scale: the largest value is 127 steps, but for the stretch."""
    scale = stretch * rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale).round().long(), scale


def llm_int8(x: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """LLM.int8 in integers: X_O W_O + scales times the integer product of the rest, W_O being rounded, too (ADR 0009)."""
    outliers = (x.abs() >= threshold).any(0)
    w, w_scale = int8(weight)
    rest, x_scale = int8(x.masked_fill(outliers, 0), 1 + 2**0.5 / 4096)
    product = (rest[:, ~outliers] @ w[:, ~outliers].T) * x_scale * w_scale.T
    return x[:, outliers] @ (w * w_scale)[:, outliers].T + product + bias


@torch.no_grad()
def test_outlier_channels_are_multiplied_in_full_precision_and_all_others_in_int8() -> None:
    plain, quantization = linear(), load_config("llm-int8").quantization
    made, spec = QuantizedLinear(plain, ForwardContext()), weight_spec(quantization)
    assert spec is not None
    made.input_quantizer, made.weight_quantizer = point_specs(quantization, 4)["down_in"].build("down_in"), spec.build("weight")
    made.weight_quantizer.set_range_from(plain.weight)
    made.input_quantizer.mode = made.weight_quantizer.mode = "on"
    x = torch.randn(2, 5, 24, dtype=torch.float64).clamp(-5.9, 5.9)
    x[0, 2, 3], x[1, 4, 9], x[1, 0, 9], x[0, 0, 20] = 6.0, -60.0, 5.0, 5.99  # channels 3 and 9, decided by all tokens together
    tokens, threshold = x.flatten(0, 1), 6.0
    y = made(x).flatten(0, 1)
    torch.testing.assert_close(y, llm_int8(tokens, plain.weight, plain.bias, threshold), rtol=1e-12, atol=1e-12)
    exact = plain(tokens)
    undivided = llm_int8(tokens, plain.weight, plain.bias, float("inf"))
    assert float((y - exact).norm()) < 0.7 * float((undivided - exact).norm())
    made.weight_quantizer.mode = "off"  # then only the other channels' values are rounded
    alone = torch.zeros_like(x)
    alone[..., [3, 9]] = x[..., [3, 9]]
    torch.testing.assert_close(made(x) - plain(x), made(x - alone) - plain(x - alone), rtol=0, atol=1e-12)


def test_narrow_dtypes_stay_narrow() -> None:
    plain, context = linear().bfloat16(), ForwardContext()
    for where in ("input", "output"):
        made = QuantizedLinear(plain, context)
        made.scaled = "input" if where == "input" else "output"
        context.running_scale = torch.full((1, 2, 1), 3.0)
        assert made(torch.randn(1, 2, 24).bfloat16()).dtype == torch.bfloat16
