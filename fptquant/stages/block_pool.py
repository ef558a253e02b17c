"""Works on independent blocks at once, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_blocks(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``work`` of every item, in order, on as many items at once as PyTorch may use threads.

    Each item is worked on by a single thread, PyTorch's own operators included. Many small matrix products gain little
    from threads that wait for each other after every one of them, and lose much where the processor is shared; and the
    order of every sum, hence the result, does not depend on the number of threads. That number is restored afterwards.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The setting belongs to each thread, so workers make their own.
    pool = ThreadPoolExecutor(max_workers=max(1, min(threads, len(items))), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
