"""T_r: orthogonal at every parameter, the fast transform equals its matrix, merged is online."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fptquant.errors import UserError
from fptquant.transforms import ModelSizes, ResidualRotation, Start, TransformOptions, check_transforms
from fptquant.transforms.base import generator
from fptquant.transforms.residual_rotation import cayley


def rotation(start: Start, *, size: int = 36, learned: bool = False) -> ResidualRotation:
    transform = ResidualRotation(size, start=start, seed=4)
    if learned:
        transform.randomize_(generator(1), spread=1.0)
    return transform.requires_grad_(False)


@pytest.mark.parametrize("start", get_args(Start))
@pytest.mark.parametrize("learned", [False, True])
def test_orthogonal_and_equal_to_its_matrix(start: Start, learned: bool) -> None:
    transform = rotation(start, learned=learned)
    matrix = transform.matrix()
    assert float((matrix @ matrix.T - torch.eye(36)).abs().max()) < 1e-13
    assert transform.is_fast == (not learned and start.endswith("hadamard"))
    x = torch.randn(3, 5, 36, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ matrix.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("learned", [False, True])
def test_merged_is_online(learned: bool) -> None:
    rng, transform = generator(3), rotation("random_hadamard", learned=learned)
    residual, branch = (torch.randn(4, width, generator=rng, dtype=torch.float64) for width in (36, 9))
    read, write = torch.randn(7, 36, generator=rng).double(), torch.randn(36, 9, generator=rng).double()
    embedding, bias = torch.randn(11, 36, generator=rng).double(), torch.randn(36, generator=rng).double()
    merged_read, merged_write = transform.merge_into(read, "read"), transform.merge_into(write, "write")
    assert merged_write.is_contiguous()
    torch.testing.assert_close(transform(residual) @ merged_read.T, residual @ read.T, rtol=0, atol=1e-12)
    written = branch @ merged_write.T + transform.merge_into(bias, "write")
    torch.testing.assert_close(written, transform(branch @ write.T + bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.merge_into(embedding, "embedding"), transform(embedding), rtol=0, atol=1e-12)


def test_many_rows_are_merged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, transform = torch.randn(23, 36), rotation("hadamard", learned=True)
    whole = transform.merge_into(weight, "read")
    monkeypatch.setattr("fptquant.transforms.residual_rotation.ROWS_AT_ONCE", 5)
    torch.testing.assert_close(transform.merge_into(weight, "read"), whole, rtol=0, atol=1e-5)


def test_sizes_without_a_hadamard_matrix_are_refused_and_random_orthogonal_serves_them() -> None:
    for start in ("hadamard", "random_hadamard"):
        with pytest.raises(UserError, match=r"38.*36.*40.*random_orthogonal"):
            ResidualRotation(38, start=start)
    sizes = ModelSizes(1, hidden_size=38, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=19)
    with pytest.raises(UserError, match="38"):
        check_transforms(sizes, TransformOptions(residual_rotation="random_hadamard"))
    matrix = ResidualRotation(38, start="random_orthogonal").matrix().detach()
    assert float((matrix @ matrix.T - torch.eye(38)).abs().max()) < 1e-13


def test_a_matrix_can_be_set_and_is_made_orthogonal_to_float64() -> None:
    transform, matrix = rotation("hadamard", learned=True), rotation("random_orthogonal").matrix()
    transform.set_matrix_(matrix.float())
    result = transform.matrix()
    assert float((result - matrix).abs().max()) < 1e-7
    assert float((result @ result.T - torch.eye(36)).abs().max()) < 1e-13
    with pytest.raises(UserError, match="orthogonal matrix"):
        transform.set_matrix_(2 * matrix)
    with pytest.raises(UserError, match=r"\[36, 36\], not \[3, 3\]"):
        transform.set_matrix_(torch.eye(3))


@pytest.mark.parametrize("start", get_args(Start))
@pytest.mark.parametrize("learned", [False, True])
def test_the_state_can_be_saved_and_loaded_whatever_a_rotation_began_with(start: Start, learned: bool) -> None:
    source = rotation("random_hadamard")
    if learned:
        source.set_matrix_(rotation("random_orthogonal").matrix())
    fresh = ResidualRotation(36, start=start, seed=9)
    fresh.load_state_dict(source.state_dict())
    assert torch.equal(fresh.matrix(), source.matrix())
    assert fresh.is_fast != learned
    with pytest.raises(RuntimeError, match="size mismatch"):
        ResidualRotation(12, start=start).load_state_dict(source.state_dict())


def test_cayley_is_first_order_identity() -> None:
    skew = torch.randn(6, 6, generator=generator(0), dtype=torch.float64)
    skew = 1e-4 * (skew - skew.T)
    assert float((cayley(skew) - torch.eye(6) - skew).abs().max()) < 1e-6


def test_shapes_are_checked() -> None:
    with pytest.raises(UserError, match=r"T_r of size 36 does not fit a weight of shape \[36, 9\] on side read"):
        rotation("identity").merge_into(torch.zeros(36, 9), "read")
