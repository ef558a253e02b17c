"""Blocks are worked on in order, by one thread each, and the number of threads is restored."""

from __future__ import annotations

import threading

import pytest
import torch

from fptquant.stages.block_pool import map_blocks


def test_order_threads_and_restoration() -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=20)

    def work(item: int) -> tuple[int, int]:
        both.wait()  # passes only if two items are worked on at once
        return item * item, torch.get_num_threads()

    assert list(map_blocks(work, range(6))) == [(i * i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2
    assert list(map_blocks(work, [])) == []


def test_an_error_comes_through_and_threads_are_restored() -> None:
    torch.set_num_threads(2)

    def fail(item: int) -> int:
        if item == 1:
            raise ValueError("block 1")
        return item

    with pytest.raises(ValueError, match="block 1"):
        list(map_blocks(fail, range(4)))
    assert torch.get_num_threads() == 2


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    rows = torch.randn(4, 400, 300, generator=torch.Generator().manual_seed(0))

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        return list(map_blocks(lambda x: (x @ x.T).square().sum(), list(rows)))

    assert all(torch.equal(a, b) for a, b in zip(results(1), results(2), strict=True))
