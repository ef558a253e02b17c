"""Range setting: reference, streaming, the choice itself, instruction sets, NumPy twins, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fptquant.numpy as fnp
from fptquant import ops
from fptquant._core import build_info, select_isa
from fptquant.errors import UserError
from fptquant.ops import reference_ranges
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor, channel_layout
from fptquant.quantizers.ranges import RangeMethod, RangeSetter

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = [
    RangeMethod("min_max"),
    RangeMethod("mse"),
    RangeMethod("lp", p=2.4),
    RangeMethod("lp", p=4),
    RangeMethod("percentile", percentile=95),
]
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(8)]


@pytest.mark.parametrize("p", [2, 2.4, 3, 3.7, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_equal_reference(dtype: torch.dtype, p: float) -> None:
    x = torch.randn(3, 5, 77).to(dtype)
    x[0, 0, 0] = float("nan")
    for symmetric in (True, False):
        grid = IntegerGrid(4, symmetric)
        lo, hi = ops.range_minmax(x, granularity=PerChannel(1))
        ratios = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
        mine = ops.range_errors(x, lo, hi, ratios, p=p, grid=grid, granularity=PerChannel(1))
        wanted = reference_ranges.range_errors(x, lo, hi, ratios, 77, p, symmetric, 0, grid.qmin, grid.qmax)
        # The error of |e|^p in float32 is 1e-7 (2 + p |log2 e|) relative; log2 e is above -20 for all that counts.
        torch.testing.assert_close(mine, wanted, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-12)


def test_minmax_and_histogram_equal_reference() -> None:
    for dtype in DTYPES:
        x = torch.randn(2, 3, 41).to(dtype)
        x[0, 1, :2] = torch.tensor([float("nan"), float("inf")])
        lo, hi = ops.range_minmax(x, granularity=PerChannel(1))
        for mine, wanted in zip((lo, hi), reference_ranges.range_minmax(x, 3, 41), strict=True):
            assert torch.equal(mine, wanted)
        counts = ops.range_histogram(x, lo, hi, bins=16, granularity=PerChannel(1))
        assert torch.equal(counts, reference_ranges.range_histogram(x, lo, hi, 41, 16))
        assert counts.sum(1).tolist() == [82, 80, 82]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_compiled_choice_equals_the_reference(method: RangeMethod) -> None:
    x, grid = torch.randn(6, 500, dtype=torch.float64), IntegerGrid(4, symmetric=False)
    lo, hi = ops.range_minmax(x, granularity=PerChannel(0))
    ratios = torch.tensor(method.ratios(), dtype=torch.float64)
    evidence = torch.empty(6, 0, dtype=torch.float64)
    if method.method == "percentile":
        evidence = ops.range_histogram(x, lo, hi, bins=128, granularity=PerChannel(0))
    elif method.method != "min_max":
        evidence = ops.range_errors(x, lo, hi, ratios, p=method.exponent, grid=grid, granularity=PerChannel(0))
    rule = {"min_max": 0, "mse": 1, "lp": 1, "percentile": 2}[method.method]
    wanted = reference_ranges.range_qparams(lo, hi, evidence, ratios, rule, method.percentile, False, 0, grid.qmin, grid.qmax)
    for mine, reference in zip(ops.range_qparams(lo, hi, evidence, method=method, grid=grid), wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [2.0, 3.0, 4.0])
def test_lp_is_never_worse_than_min_max_and_clips_outliers(p: float) -> None:
    x = torch.randn(8, 4096, dtype=torch.float64)
    x[:, 0] = 20
    grid = IntegerGrid(4)

    def error(method: RangeMethod) -> torch.Tensor:
        scale, _ = ops.set_range(x, grid=grid, granularity=PerChannel(0), method=method)
        return (ops.fake_quant(x, scale, grid=grid, granularity=PerChannel(0)) - x).abs().pow(p).sum(1)

    searched, covering = error(RangeMethod("lp", p=p, lowest_ratio=0.05)), error(RangeMethod("min_max"))
    assert (searched <= covering).all()
    assert (searched < 0.7 * covering).all() or p == 4


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_numpy_twin_and_every_instruction_set_agree(granularity: Granularity, method: RangeMethod) -> None:
    x, grid = torch.randn(6, 48), IntegerGrid(4)
    results = []
    try:
        for isa in build_info()["isas_built"].split(", "):
            try:
                select_isa(isa)
            except ValueError:
                continue
            results.append(ops.set_range(x, grid=grid, granularity=granularity, method=method))
    finally:
        select_isa(None)
    results.append(
        tuple(torch.from_numpy(np.asarray(a)) for a in fnp.set_range(x.numpy(), grid=grid, granularity=granularity, method=method))
    )
    for scale, zero in results:
        assert tuple(scale.shape) == channel_layout(granularity, x.shape).scale_shape
        assert torch.equal(scale, results[0][0])
        assert torch.equal(zero, results[0][1])


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)], ids=str)
def test_streaming_equals_all_at_once(granularity: Granularity, method: RangeMethod) -> None:
    x, grid = torch.randn(12, 3, 50, dtype=torch.float64), IntegerGrid(8, symmetric=False)
    setter = RangeSetter(grid, granularity, method)
    for batch in x.split(5):
        setter.observe_range(batch)
    if setter.needs_errors:
        for batch in x.split(5):
            setter.observe_errors(batch)
    for mine, wanted in zip(setter.finish(), ops.set_range(x, grid=grid, granularity=granularity, method=method), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=0)


def test_numpy_fake_quant_is_the_same() -> None:
    for dtype in (np.float32, np.float64, np.float16):
        x = np.random.default_rng(0).normal(size=(5, 33)).astype(dtype)
        scale = np.linspace(0.1, 0.4, 5)
        mine = fnp.fake_quant(x, scale, np.full(5, 3.0), grid=IntegerGrid(4, False), granularity=PerChannel(0))
        wanted = ops.fake_quant(
            torch.from_numpy(x),
            torch.from_numpy(scale),
            torch.full((5,), 3.0),
            grid=IntegerGrid(4, False),
            granularity=PerChannel(0),
        )
        assert np.array_equal(mine, wanted.numpy())
    with pytest.raises(UserError, match=r"scale\[1\] = 0"):
        fnp.fake_quant(np.ones((2, 2)), np.array([1.0, 0.0]), grid=IntegerGrid(4), granularity=PerChannel(0))
    with pytest.raises(UserError, match="int64"):
        fnp.fake_quant(np.ones(2, np.int64), np.array(1.0), grid=IntegerGrid(4))


def test_opcheck() -> None:
    x = torch.randn(4, 6)
    lo, hi = ops.range_minmax(x, granularity=PerChannel(0))
    ratios = torch.tensor([0.5, 1.0], dtype=torch.float64)
    errors = torch.rand(4, 2, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fptquant.range_minmax.default, (x, 4, 6))
    torch.library.opcheck(torch.ops.fptquant.range_errors.default, (x, lo, hi, ratios, 6, 2.4, True, 0, -8, 7))
    torch.library.opcheck(torch.ops.fptquant.range_histogram.default, (x, lo, hi, 6, 8))
    torch.library.opcheck(torch.ops.fptquant.range_qparams.default, (lo, hi, errors, ratios, 1, 99.0, True, 0, -8, 7))


def test_errors_name_the_cause() -> None:
    with pytest.raises(UserError, match=r"p = 5\.0 must lie in 2\.\.4; candidates = 0"):
        RangeMethod("lp", p=5.0, candidates=0)
    with pytest.raises(UserError, match="no values were observed"):
        RangeSetter(IntegerGrid(4), PerTensor(), RangeMethod()).finish()
    setter = RangeSetter(IntegerGrid(4), PerChannel(0), RangeMethod("mse"))
    with pytest.raises(UserError, match="after observe_range"):
        setter.observe_errors(torch.ones(2, 2))
    setter.observe_range(torch.ones(2, 2))
    with pytest.raises(UserError, match="3 channels follows batches with 2"):
        setter.observe_range(torch.ones(3, 2))
