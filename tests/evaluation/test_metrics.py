"""Metrics against their definitions, in values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fptquant.errors import UserError
from fptquant.evaluation.metrics import relative_error, sqnr_db


def test_sqnr() -> None:
    x = torch.ones(100)
    assert sqnr_db(x, x * 0.99) == pytest.approx(40, abs=1e-3)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x * 0, x) == -math.inf
    with pytest.raises(UserError, match="shapes differ"):
        sqnr_db(x, x[:3])


def test_relative_error() -> None:
    assert relative_error(torch.tensor([4.0, -8.0]), torch.tensor([4.0, -7.0])) == 0.125
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
