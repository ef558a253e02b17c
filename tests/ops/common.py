"""What the operators' tests share: random input, bounds, every instruction set, leaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fptquant._core import build_info, select_isa
from tests.memory import STATUS, memory
from tests.tolerances import BOUNDS, DTYPES

LENGTHS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 1023]
__all__ = ["DTYPES", "LENGTHS", "assert_no_growth", "assert_same_on_every_isa", "assert_within", "random"]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers that depend on shape and seed only; every dtype rounds the same numbers."""
    generator = torch.Generator().manual_seed(1000 * seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_within(operator: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """|actual - expected| <= bound * max |expected|, the bound of tests/tolerances.py for ``dtype`` of storage."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        bound = factor * BOUNDS[operator, dtype] * expected.double().abs().max().item()
        error = (actual.double() - expected.double()).abs().max().item()
        assert error <= bound, f"{operator}: error {error:.3g} above {bound:.3g}"


def isas() -> list[str]:
    """The instruction sets built that this processor runs."""
    names = []
    try:
        for name in build_info()["isas_built"].split(", "):
            try:
                select_isa(name)
            except ValueError:  # this processor lacks it
                continue
            names.append(name)
    finally:
        select_isa(None)
    return names


def assert_same_on_every_isa(function: Callable[[], Sequence[Tensor] | Tensor]) -> None:
    """Every instruction set gives the same bits; with 1, 2 and 3 threads too."""
    threads, results = torch.get_num_threads(), []
    try:
        for isa in isas():
            for count in (1, 2, 3) if isa == isas()[0] else (1,):
                torch.set_num_threads(count)
                select_isa(isa)
                result = function()
                results.append([result] if isinstance(result, Tensor) else list(result))
    finally:
        select_isa(None)
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(77) if a.is_floating_point() else a, b.nan_to_num(77) if b.is_floating_point() else b)


def assert_no_growth(function: Callable[[], object], match: str, calls: int = 300) -> None:
    """``function`` raises RuntimeError every time and keeps nothing of the megabytes it was given or allocated."""

    def fail() -> None:
        with pytest.raises(RuntimeError, match=match):
            function()

    for _ in range(20):
        fail()
    if not STATUS.exists():
        pytest.skip("memory is read from /proc")
    before = memory("VmRSS")
    for _ in range(calls):
        fail()
    assert memory("VmRSS") - before < 3 * 4 * 2**20  # three results of 4 MiB
