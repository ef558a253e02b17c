"""The quantizer module: modes, two-pass range setting, kept tokens, buffers that survive conversion and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops.reference_ranges import SCALE_STRETCH
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor, PerToken
from fptquant.quantizers.quantizer import Quantizer, drop_kept
from fptquant.quantizers.ranges import RangeMethod

METHODS = [RangeMethod("min_max"), RangeMethod("mse"), RangeMethod("lp", p=3.0), RangeMethod("percentile")]
U4, S4 = IntegerGrid(4, symmetric=False), IntegerGrid(4)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5 + i, 8, generator=generator) * (1 + i) for i in range(count)]


def set_from_batches(quantizer: Quantizer, data: list[Tensor], kept: list[Tensor] | None = None) -> None:
    for mode in ("observe_range", "observe_errors"):
        quantizer.mode = "observe_range" if mode == "observe_range" else "observe_errors"
        for i, x in enumerate(data):
            assert quantizer(x, None if kept is None else kept[i]) is x
    quantizer.finish_ranges()


@pytest.mark.parametrize("grid", [U4, S4])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_batches_give_the_range_of_all_at_once(method: RangeMethod, granularity: Granularity, grid: IntegerGrid) -> None:
    quantizer = Quantizer(grid, granularity, range_method=method)
    set_from_batches(quantizer, batches())
    whole = Quantizer(grid, granularity, range_method=method)
    whole.set_range_from(torch.cat(batches(), dim=2))
    assert quantizer.scale is not None
    assert quantizer.zero_point is not None
    torch.testing.assert_close(quantizer.scale, whole.scale * SCALE_STRETCH)
    torch.testing.assert_close(quantizer.zero_point, whole.zero_point)
    assert quantizer.scale.shape == (() if isinstance(granularity, PerTensor) else (3,))


@pytest.mark.parametrize("grid", [U4, S4])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(4), PerToken()])
def test_on_is_fake_quant(granularity: Granularity, grid: IntegerGrid) -> None:
    x = batches()[0][0]
    quantizer = Quantizer(grid, granularity)
    quantizer.set_range_from(x)
    quantizer.mode = "on"
    assert quantizer.scale is not None
    expected = ops.fake_quant(x, quantizer.scale, quantizer.zero_point, grid=grid, granularity=granularity)
    assert torch.equal(quantizer(x), expected)
    assert not torch.equal(quantizer(x), x)
    quantizer.mode = "off"
    assert quantizer(x) is x


@pytest.mark.parametrize("grid", [U4, S4])
def test_dynamic_takes_the_range_of_each_token(grid: IntegerGrid) -> None:
    x = batches()[0]
    quantizer = Quantizer(grid, PerTensor(), dynamic=True)
    assert quantizer.has_range
    assert not quantizer.needs_errors
    quantizer.mode = "on"
    scale, zero_point = ops.choose_qparams(x, grid=grid)
    assert torch.equal(quantizer(x), ops.fake_quant(x, scale, zero_point, grid=grid, granularity=PerToken()))
    alone = quantizer(x[:1, :1, :1])
    assert torch.equal(alone, quantizer(x)[:1, :1, :1])
    quantizer.mode = "observe_range"
    assert quantizer(x) is x
    quantizer.finish_ranges()
    assert dict(quantizer.named_buffers()) == {}


def test_kept_tokens_pass_and_leave_the_range_alone() -> None:
    x = torch.randn(2, 4, 8)
    x[:, 0] *= 1000
    kept = torch.tensor([[True, False, False, False]])[:, :, None]
    quantizer, plain = Quantizer(U4, PerTensor()), Quantizer(U4, PerTensor())
    set_from_batches(quantizer, [x], [kept])
    plain.set_range_from(x[:, 1:])
    assert plain.scale is not None
    plain.scale = plain.scale * SCALE_STRETCH
    torch.testing.assert_close(quantizer.scale, plain.scale)
    quantizer.mode = plain.mode = "on"
    y = quantizer(x, kept)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[:, 1:], plain(x[:, 1:]))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_probabilities_are_not_decided_by_the_last_bit(symmetric: bool, bits: int) -> None:
    quantizer = Quantizer(IntegerGrid(bits, symmetric), PerTensor())
    set_from_batches(quantizer, [torch.tensor([[0.0, 1.0], [0.3, 0.7]])])
    quantizer.mode = "on"
    below, above = quantizer(torch.tensor([0.5 - 2**-22, 0.5 + 2**-22])).tolist()
    assert below == above


def test_drop_kept_keeps_heads_in_their_place() -> None:
    x = torch.randn(2, 3, 4, 8)
    kept = torch.tensor([[True, True, False, False], [True, False, False, False]])[:, None, :, None]
    left = drop_kept(x, kept)
    assert left.shape == (5, 3, 1, 8)
    for head in range(3):
        expected = torch.cat([x[0, head, 2:], x[1, head, 1:]])
        assert torch.equal(left[:, head, 0], expected)
    same_for_all = torch.tensor([[True, False, False, False]])[:, None, :, None]
    assert torch.equal(drop_kept(x, same_for_all), x[:, :, 1:])
    assert drop_kept(x[:1, :, :1], torch.ones(1, 1, 1, 1, dtype=torch.bool)).numel() == 0
    assert torch.equal(drop_kept(x[:, :, :1], torch.zeros(1, 1, 1, 1, dtype=torch.bool)), x[:, :, :1])


def test_a_batch_of_kept_tokens_alone_is_not_observed() -> None:
    quantizer = Quantizer(U4, PerTensor(), name="layers.0.down_in")
    quantizer.mode = "observe_range"
    x = torch.randn(1, 2, 8)
    quantizer(x, torch.ones(1, 2, 1, dtype=torch.bool))
    with pytest.raises(UserError, match=r"layers\.0\.down_in saw no value"):
        quantizer.finish_ranges()


def test_gradients() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    kept = torch.tensor([[True], [False], [False]])
    quantizer = Quantizer(U4, PerTensor())
    quantizer.set_range_from(x * 0.5)
    quantizer.mode = "on"
    assert quantizer.scale is not None
    quantizer.scale.requires_grad_()
    quantizer(x, kept).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.ones(8))
    assert set(x.grad[1:].unique().tolist()) == {0.0, 1.0}
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.abs() > 0


def test_errors_name_the_quantizer() -> None:
    quantizer = Quantizer(U4, PerTensor(), range_method=RangeMethod("mse"), name="layers.1.o_in")
    quantizer.mode = "on"
    with pytest.raises(UserError, match=r"layers\.1\.o_in: no range"):
        quantizer(torch.ones(2))
    quantizer.mode = "observe_errors"
    with pytest.raises(UserError, match=r"layers\.1\.o_in: observe_errors needs"):
        quantizer(torch.ones(2))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
@pytest.mark.parametrize("heads", [True, False])
def test_a_group_of_channels_has_the_range_of_its_tokens(method: RangeMethod, heads: bool) -> None:
    data = [x * torch.arange(1, 9) for x in batches()]  # channels of different sizes
    if not heads:
        data = [x[:, 0] for x in data]
    kept = [torch.zeros((2, 1, x.shape[-2], 1) if heads else (2, x.shape[-2], 1), dtype=torch.bool) for x in data]
    for mask in kept:
        mask[:, ..., 0, :] = True
    quantizer = Quantizer(U4, PerTensor(), range_method=method, group_size=4)
    set_from_batches(quantizer, data, kept)
    groups = [
        torch.cat([(x[:, head] if heads else x)[:, 1:, 4 * group : 4 * group + 4].reshape(-1) for x in data])
        for head in (range(3) if heads else range(1))
        for group in range(2)
    ]
    assert quantizer.scale is not None
    assert quantizer.scale.shape == (len(groups),)
    for index, values in enumerate(groups):
        alone = Quantizer(U4, PerTensor(), range_method=method)
        set_from_batches(alone, [values])
        assert alone.scale is not None
        torch.testing.assert_close(quantizer.scale[index], alone.scale, rtol=1e-6, atol=0)
    quantizer.mode = "on"
    x = data[0]
    found = quantizer(x, kept[0])
    assert found.shape == x.shape
    for head in range(3) if heads else range(1):
        part, result = (x[:, head], found[:, head]) if heads else (x, found)
        assert torch.equal(result[:, 0], part[:, 0])
        for group in range(2):
            scale, zero = quantizer.scale[2 * head + group], quantizer.zero_point[2 * head + group]
            where = slice(4 * group, 4 * group + 4)
            expected = ops.fake_quant(part[:, 1:, where].contiguous(), scale, zero, grid=U4, granularity=PerTensor())
            assert torch.equal(result[:, 1:, where], expected)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 5, 8)])
def test_gradients_of_groups(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    quantizer = Quantizer(S4, PerTensor(), group_size=2)
    set_from_batches(quantizer, [x])
    quantizer.mode = "on"
    assert quantizer.scale is not None
    quantizer.scale.requires_grad_(True)
    weights = torch.arange(1.0, 9.0)
    (quantizer(x) * weights).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weights.expand(shape), rtol=1e-6, atol=0)  # min_max: nothing is cut off
    steps = (x / quantizer.scale.repeat_interleave(2) if len(shape) == 3 else _by_head(x, quantizer.scale)).detach()
    slope = (steps.round() - steps) * weights
    by_token = slope.transpose(1, 2).flatten(-2) if len(shape) == 4 else slope
    assert quantizer.scale.grad is not None
    expected = by_token.reshape(-1, len(quantizer.scale), 2).sum((0, 2))
    torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-4, atol=1e-4)


def _by_head(x: Tensor, scale: Tensor) -> Tensor:
    return x / scale.reshape(1, x.shape[1], 1, -1).repeat_interleave(2, dim=-1)


def test_groups_that_do_not_divide_are_refused() -> None:
    quantizer = Quantizer(U4, PerTensor(), group_size=3)
    quantizer.mode = "observe_range"
    with pytest.raises(UserError, match="group_size = 3 does not divide the 8 channels"):
        quantizer(torch.randn(2, 3, 8))
    assert "groups of 3 channels" in repr(quantizer)


def test_empty_input_passes() -> None:
    quantizer = Quantizer(U4, PerTensor())
    quantizer.mode = "on"
    assert quantizer(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranges_keep_their_dtype_when_the_model_is_narrowed(dtype: torch.dtype) -> None:
    quantizer = Quantizer(U4, PerChannel(0))
    quantizer.set_range_from(torch.randn(3, 100))
    before = copy.deepcopy(quantizer)
    model = nn.Sequential(quantizer).to(dtype)
    assert quantizer.scale is not None
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale, before.scale)
    assert torch.equal(quantizer.zero_point, before.zero_point)
    quantizer.mode = "on"
    assert model(torch.randn(3, 5, dtype=dtype)).dtype == dtype
    assert model.double()(torch.randn(3, 5, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("strict", [True, False])
def test_loading_brings_ranges_of_any_shape(strict: bool) -> None:
    source, target = Quantizer(U4, PerChannel(0)), Quantizer(U4, PerChannel(0))
    assert source.state_dict() == {}
    source.set_range_from(torch.randn(3, 100))
    target.load_state_dict(source.state_dict(), strict=strict)
    assert torch.equal(target.scale, source.scale)
    assert torch.equal(target.zero_point, source.zero_point)


def test_a_clip_multiplies_the_range_of_every_token() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    for symmetric in (True, False):
        plain, clipped = (
            Quantizer(IntegerGrid(4, symmetric=symmetric), PerToken(), dynamic=True, range_method=RangeMethod(clip_ratio=ratio))
            for ratio in (0.7, 1.0)
        )
        plain.mode = clipped.mode = "on"
        assert not torch.equal(plain(x), clipped(x))
        clipped.clip = torch.tensor(0.7)
        torch.testing.assert_close(clipped(x), plain(x), rtol=1e-5, atol=1e-5)
        assert clipped.to(torch.bfloat16).clip.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_channels_with_outliers_stay_in_full_precision_and_out_of_the_range(dynamic: bool) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    x[1, 3, 4], x[0, 2, 9] = 6.0, -40.0
    columns, rest = [4, 9], [c for c in range(16) if c not in (4, 9)]
    plain, decomposed = (
        Quantizer(IntegerGrid(4), PerTensor(), dynamic=dynamic, outlier_threshold=threshold) for threshold in (None, 6.0)
    )
    for quantizer, seen in ((plain, x[..., rest]), (decomposed, x)):
        quantizer.mode = "observe_range"
        assert torch.equal(quantizer(seen), seen)
        quantizer.finish_ranges()
        quantizer.mode = "on"
    y = decomposed(x)
    assert torch.equal(y[..., columns], x[..., columns])
    assert torch.equal(y[..., rest], plain(x[..., rest]))
    kept = torch.zeros(2, 5, 1, dtype=torch.bool)
    kept[0, 2], kept[1, 3] = True, True  # both outliers are of kept tokens: no channel is decomposed
    assert torch.equal(decomposed(x, kept)[~kept[..., 0]], plain(x)[~kept[..., 0]])
