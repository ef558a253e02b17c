"""float32 products by oneDNN: the same numbers but for rounding, in forward and backward passes, where asked for."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

import fptquant as fq
from fptquant import float32_products as products
from fptquant.evaluation.evaluate import evaluate_windows
from tests.models.tiny import tiny_model

ROUNDING = 1e-5
"""Of the largest value: sums of a few hundred products in float32."""

needs_onednn = pytest.mark.skipif(not products._offered(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has oneDNN asked for; the shapes of the inputs that it is given."""
    monkeypatch.setenv(products.CHOICE, "onednn")
    seen: list[tuple[int, ...]] = []
    linear = products._linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append((*x.shape, weight.shape[0]))
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "_linear", spy)
    return seen


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= ROUNDING * expected.abs().max())


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@needs_onednn
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_of_strided_matrices(onednn: list[tuple[int, ...]], with_bias: bool) -> None:
    a, b, bias = tensors((200, 96), (96, 130), (130,))
    expected = a.double() @ b.double() + (bias.double() if with_bias else 0)
    transposed = a.t().contiguous().t()
    for left in (a, transposed):
        for right in (b, b.t().contiguous().t()):
            assert close(products.product(left, right, bias if with_bias else None), expected)
    assert onednn == [(200, 96, 130)] * 4


@needs_onednn
def test_parts_of_matrices_take_no_detour(onednn: list[tuple[int, ...]]) -> None:
    """Columns of a larger matrix, as Hessians are summed: oneDNN itself needs a thousand times as long for them."""
    (whole,) = tensors((1024, 512))
    left, right = whole[:, 256:].t(), whole[:, 128:]

    def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        begin = time.perf_counter()
        products.product(a, b)
        return time.perf_counter() - begin

    assert close(products.product(left, right), left.double() @ right.double())
    dense = min(seconds(left.contiguous(), right.contiguous()) for _ in range(5))
    assert min(seconds(left, right) for _ in range(5)) < 20 * dense
    assert len(onednn) == 11


@needs_onednn
def test_small_and_double_products_stay_with_torch(onednn: list[tuple[int, ...]]) -> None:
    a, b = tensors((16, 16), (16, 16))
    assert torch.equal(products.product(a, b), a @ b)
    c, d = tensors((200, 96), (96, 130), dtype=torch.float64)
    assert torch.equal(products.product(c, d), c @ d)
    out = torch.empty(16, 16)
    assert products.product(a, b, out=out).data_ptr() == out.data_ptr()
    assert onednn == []


@needs_onednn
@pytest.mark.parametrize("with_bias", [False, True])
def test_backward_passes_use_it(onednn: list[tuple[int, ...]], with_bias: bool) -> None:
    x, weight, bias, dy = tensors((2, 100, 96), (130, 96), (130,), (2, 100, 130))

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight, bias)]
        y = F.linear(leaves[0], leaves[1], leaves[2] if with_bias else None)
        y.backward(dy.to(dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    found, expected = products.fast_float32_products(gradients)(torch.float32), gradients(torch.float64)
    assert len(found) == len(expected) == (4 if with_bias else 3)
    assert all(close(*pair) for pair in zip(found, expected, strict=True))
    assert sorted(onednn) == sorted([(200, 96, 130), (200, 130, 96), (130, 200, 96)])


@needs_onednn
def test_inference_mode_uses_it(onednn: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors((2, 100, 96), (130, 96), (130,))
    with torch.inference_mode():
        found = products.fast_float32_products(lambda: [F.linear(x, weight, bias), x @ weight.t()])()
    expected = x.double() @ weight.double().t()
    assert close(found[0], expected + bias.double())
    assert close(found[1], expected)
    assert onednn == [(200, 96, 130)] * 2


@needs_onednn
def test_only_within(onednn: list[tuple[int, ...]]) -> None:
    x, weight = tensors((200, 96), (130, 96))

    @products.fast_float32_products
    def inner() -> None:
        F.linear(x, weight)

    @products.fast_float32_products
    def outer() -> None:
        inner()
        F.linear(x, weight)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert len(onednn) == 2
    F.linear(x, weight)
    assert len(onednn) == 2
    inner()
    assert len(onednn) == 3


@needs_onednn
def test_a_calibrated_model_evaluates_alike(onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LlamaForCausalLM")
    tokens = torch.arange(96).reshape(1, -1) % model.config.vocab_size
    monkeypatch.setattr(products, "_SMALLEST", 1)
    there = evaluate_windows(model, tokens, text_name="counting")
    assert len(onednn) > 7 * model.config.num_hidden_layers
    monkeypatch.setenv(products.CHOICE, "torch")
    before = len(onednn)
    here = evaluate_windows(model, tokens, text_name="counting")
    assert len(onednn) == before
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-5)


def test_the_choice_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.CHOICE, "mkl")
    with pytest.raises(fq.UserError, match=r"FPTQUANT_FLOAT32_PRODUCTS = 'mkl' must be auto, onednn or torch"):
        products.float32_products()
    monkeypatch.setenv(products.CHOICE, "torch")
    assert products.float32_products() == "torch"
    monkeypatch.delenv(products.CHOICE)
    monkeypatch.setattr(products, "_faster", lambda: False)
    assert products.float32_products() == "torch"


@needs_onednn
@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_default_is_what_is_faster(monkeypatch: pytest.MonkeyPatch, amd: bool, capability: str, gpu: bool) -> None:
    monkeypatch.delenv(products.CHOICE, raising=False)
    monkeypatch.setattr(products, "cpu_field", {"vendor_id": "AuthenticAMD" if amd else "GenuineIntel"}.get)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(products, "_faster", products._faster.__wrapped__)
    assert (products.float32_products() == "oneDNN") == (amd and capability == "AVX512" and not gpu)
