"""Metrics against their definitions, in values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fptquant.errors import UserError
from fptquant.evaluation.metrics import jensen_shannon_divergence, negative_log_likelihood, relative_error, sqnr_db


def test_divergence_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 33, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(jensen_shannon_divergence(a, b), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jensen_shannon_divergence(a, b), jensen_shannon_divergence(b, a))
    torch.testing.assert_close(jensen_shannon_divergence(a.float(), b.float()), expected, rtol=1e-5, atol=1e-6)


def test_divergence_at_its_bounds() -> None:
    logits = torch.tensor([[0.0, -1e4, -1e4], [5.0, 1.0, 0.0]])
    assert jensen_shannon_divergence(logits, logits).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    other = torch.tensor([[-1e4, 0.0, -1e4], [5.0, 1.0, 0.0]])
    assert jensen_shannon_divergence(logits, other).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)


def test_likelihood_of_a_uniform_distribution() -> None:
    found = negative_log_likelihood(torch.zeros(4, 10), torch.tensor([0, 3, 9, 5]))
    assert found.tolist() == pytest.approx([math.log(10)] * 4, abs=1e-6)
    assert found.dtype == torch.float64


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
