"""Kronecker products: the merged weight undoes the online transform, no parameter makes a factor singular."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import UserError
from fptquant.transforms import AttentionInputKronecker, DownKronecker, Kronecker, OutKronecker, QueryKeyMixing
from fptquant.transforms.base import generator
from fptquant.transforms.kronecker import possible_start
from fptquant.transforms.value_mixing import CONDITION_LIMIT


def random(transform: Kronecker, spread: float = 0.3) -> Kronecker:
    transform.randomize_(generator(5), spread)
    return transform


MADE = [(AttentionInputKronecker, 3, 4), (DownKronecker, 24, 24), (DownKronecker, 1, 7), (OutKronecker, 9, 8), (OutKronecker, 1, 4)]


@pytest.mark.parametrize(("kind", "rows", "columns"), MADE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-5), (torch.float64, 1e-13)])
def test_the_product_is_unchanged(kind: type[Kronecker], rows: int, columns: int, dtype: torch.dtype, bound: float) -> None:
    rng, transform, size = generator(0), random(kind(rows, columns)), rows * columns
    x, weight = torch.randn(5, size, generator=rng, dtype=dtype), torch.randn(7, size, generator=rng, dtype=dtype)
    with torch.no_grad():
        difference = transform(x) @ transform.merge_into(weight, "read").T - x @ weight.T
        back = transform.inverse(transform(x)) - x
    assert float(difference.abs().max()) < bound * size
    assert float(back.abs().max()) < bound * size


def test_it_is_the_product_of_its_factors() -> None:
    transform = random(DownKronecker(3, 5))
    factors = transform.factors()
    x = torch.randn(2, 15, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ torch.kron(factors["left"], factors["right"]).T, rtol=1e-12, atol=1e-12)
    heads = random(OutKronecker(3, 5))
    mixed = torch.einsum("hk,tkd->thd", heads.factors()["left"], x.unflatten(-1, (3, 5))).flatten(-2)
    torch.testing.assert_close(heads(x), mixed, rtol=1e-12, atol=1e-12)
    assert set(heads.factors()) == {"left"}


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_no_parameter_makes_it_singular(spread: float) -> None:
    transform = random(DownKronecker(8, 12), spread)
    assert 1 < transform.describe()["largest_condition_number"] <= CONDITION_LIMIT * 1.001


def test_what_is_remembered_follows_the_parameters() -> None:
    transform, x = DownKronecker(2, 3), torch.randn(4, 6, generator=generator(1))
    with torch.no_grad():
        before = transform(x)
        assert torch.equal(transform(x), before)
        transform.log_left.add_(0.1)
        changed = transform(x)
        assert not torch.equal(changed, before)
        assert transform(x.double()).dtype == torch.float64
        transform.load_state_dict(DownKronecker(2, 3).state_dict())
        assert torch.equal(transform(x), before)
    transform(x).sum().backward()
    assert transform.log_left.grad is not None
    assert transform.log_right.grad is not None
    transform.hold()
    with torch.no_grad():
        transform.log_left.add_(0.1)
        assert torch.equal(transform(x), before)
        transform.release()
        assert not torch.equal(transform(x), before)


def test_what_an_evaluation_remembers_serves_a_gradient() -> None:
    transform, x = DownKronecker(2, 3).requires_grad_(False), torch.randn(4, 6, generator=generator(1), requires_grad=True)
    with torch.inference_mode():
        transform(x)
        transform.merge(torch.eye(6), "read")
    transform(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], transform(torch.eye(6)).sum(dim=1))
    transform.merge(x, "read").sum().backward()


def test_products_of_queries_and_keys_stay() -> None:
    mixing, rng = QueryKeyMixing(8), generator(1)
    mixing.randomize_(generator(2))
    queries, keys = torch.randn(2, 4, 5, 8, generator=rng).double(), torch.randn(2, 2, 5, 8, generator=rng).double()
    with torch.no_grad():
        products = mixing.forward_query(queries)[:, ::2] @ mixing(keys).mT
        assert float((mixing(keys) - keys).abs().max()) > 0.1
    torch.testing.assert_close(products, queries[:, ::2] @ keys.mT, rtol=1e-11, atol=1e-11)
    with pytest.raises(UserError, match="P_h comes after RoPE"):
        mixing.merge_into(torch.zeros(8, 8), "read")


def test_starts() -> None:
    assert possible_start("hadamard", 12, 24) == "hadamard"
    assert possible_start("random_hadamard", 9, 64) == "random_orthogonal"
    assert possible_start("identity", 9) == "identity"
    one, other = DownKronecker(4, 6, seed=1), DownKronecker(4, 6, seed=2)
    assert all(tensor.is_contiguous() for tensor in one.state_dict().values())
    assert not torch.equal(one.base_left, other.base_left)
    for factor in one.factors().values():
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"P_d of 3 x 4 channels does not fit a weight of \[5, 8\]"):
        DownKronecker(3, 4).merge_into(torch.zeros(5, 8), "read")
    with pytest.raises(UserError, match="P_o has no side 'out'"):
        OutKronecker(3, 4).merge_into(torch.zeros(5, 12), "out")
    with pytest.raises(UserError, match="Hadamard"):
        DownKronecker(3, 7, start="hadamard")
