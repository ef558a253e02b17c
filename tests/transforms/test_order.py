"""The transforms of a model: built from options, in order, described, refused early."""

from __future__ import annotations

import json

import pytest
import torch

from fptquant.errors import UserError
from fptquant.transforms import ModelSizes, TransformOptions, build_transforms
from fptquant.transforms.base import generator

SIZES = ModelSizes(2, hidden_size=36, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8)
ALL = TransformOptions(
    query_key_rotation=True,
    value_mixing="random_orthogonal",
    up_scaling=True,
    residual_rotation="random_hadamard",
    down_hadamard=True,
    residual_scaling="input",
)


def test_condition_numbers_are_the_largest_of_all_blocks() -> None:
    sizes = ModelSizes(2, hidden_size=24, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8)
    options = TransformOptions(up_scaling=True, value_mixing="hadamard", kronecker="random_orthogonal")
    transforms = build_transforms(sizes, options)
    assert transforms.largest_condition_numbers() == pytest.approx(dict.fromkeys(("T_v", "P_a", "P_ug", "P_o", "P_d"), 1.0))
    transforms.block(1).value_mixing.randomize_(generator(1), 3.0)
    numbers = transforms.largest_condition_numbers()
    assert numbers["T_v"] == transforms.block(1).value_mixing.describe()["largest_condition_number"] > 2
    assert numbers["P_a"] == pytest.approx(1.0)


def test_all_six_in_the_order_of_merging() -> None:
    transforms = build_transforms(SIZES, ALL)
    assert [t.symbol for t in transforms.used()] == ["T_r", "S_n"] + 2 * ["T_k", "T_v", "T_u", "T_d"]
    assert not transforms.fully_mergeable
    described = transforms.describe()
    assert [entry.get("block") for entry in described] == [None, None, 0, 0, 0, 0, 1, 1, 1, 1]
    assert json.loads(json.dumps(described)) == described
    assert "T_v" not in repr(transforms.block(0).value_mixing)


def test_none_of_them() -> None:
    transforms = build_transforms(SIZES, TransformOptions())
    assert list(transforms.used()) == []
    assert transforms.fully_mergeable


def test_seeds_decide_everything_random() -> None:
    first, again, other = (build_transforms(SIZES, ALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["residual_rotation.signs"], other["residual_rotation.signs"])
    assert not torch.equal(first["blocks.0.value_mixing.base"], first["blocks.1.value_mixing.base"])


def test_randomize_changes_every_parameter_and_is_seeded() -> None:
    first, again = build_transforms(SIZES, ALL), build_transforms(SIZES, ALL)
    first.randomize_(generator(3))
    again.randomize_(generator(3))
    for (name, parameter), (_, same) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert bool(parameter.ne(0).any()), name
        assert torch.equal(parameter, same)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"Remove transforms\.query_key_rotation"):
        build_transforms(ModelSizes(1, 36, 48, 4, 2, 8, has_qk_norm=True), ALL)
    with pytest.raises(UserError, match="46"):
        build_transforms(ModelSizes(1, 36, 46, 4, 2, 8), ALL)
    with pytest.raises(UserError, match="14"):
        build_transforms(ModelSizes(1, 36, 48, 4, 2, 14), TransformOptions(value_mixing="hadamard"))
