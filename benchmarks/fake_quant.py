"""fake_quant, forward and backward through autograd, against torch's own operator and against torch.compile of the formula.

Every arm does the same work: y, then the gradients of x and of the scale, per output channel, float32, symmetric 4 bits.
Arms take turns within each round, so that a change of the machine's speed meets all of them; medians are reported.

    python benchmarks/fake_quant.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fptquant import ops
from fptquant._core import build_info
from fptquant.quantizers.grid import IntegerGrid, PerChannel

SHAPES = [(4096, 4096), (2048, 1536)]


def formula(x: Tensor, scale: Tensor) -> Tensor:
    """The same function in eager torch, straight-through for x and LSQ for the scale, for torch.compile."""
    ratio = x / scale[:, None]
    rounded = ratio + (ratio.round() - ratio).detach()
    return rounded.clamp(-8, 7) * scale[:, None]


def arms(x: Tensor, scale: Tensor, dy: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    zero_point = torch.zeros_like(scale)
    compiled = torch.compile(formula)

    def step(forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        x.grad = scale.grad = None
        forward().backward(dy)
        assert x.grad is not None
        assert scale.grad is not None
        return x.grad, scale.grad

    return {
        "fptquant": lambda: step(lambda: ops.fake_quant(x, scale, grid=IntegerGrid(4), granularity=PerChannel(0))),
        "torch, learnable per channel": lambda: step(
            lambda: torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, -8, 7)
        ),
        "torch.compile of the formula": lambda: step(lambda: compiled(x, scale)),
        "eager formula": lambda: step(lambda: formula(x, scale)),
    }


def measure(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    scale = (torch.rand(shape[0]) * 0.2 + 0.1).requires_grad_()
    chosen = arms(x, scale, torch.randn(shape))
    reference = [gradient.clone() for gradient in chosen["eager formula"]()]
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for name, arm in chosen.items():  # warm up, and check that it is the same work
        dx, dscale = arm()
        # torch's own operator multiplies by the reciprocal: an element at a tie may land on the other side.
        assert ((dx - reference[0]).abs() > 1e-5).float().mean() < 1e-4, name
        assert (dscale - reference[1]).abs().max() < 1e-2 * reference[1].abs().max(), name
    for _ in range(rounds):
        for name, arm in chosen.items():
            start = time.perf_counter()
            arm()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    info = build_info()
    table = Table(title=f"forward + backward, float32, per channel; {torch.get_num_threads()} threads, {info['isa']}")
    table.add_column("arm")
    results = [measure(shape, rounds) for shape in SHAPES]
    for shape in SHAPES:
        table.add_column(f"{list(shape)} ms", justify="right")
        table.add_column("of fptquant's time", justify="right")
    for name in results[0]:
        cells = [cell for result in results for cell in (f"{result[name]:.2f}", f"{result[name] / result['fptquant']:.2f}x")]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
