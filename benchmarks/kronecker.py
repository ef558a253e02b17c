"""kronecker, plain and fused with fake_quant, forward and backward through autograd, against eager torch and torch.compile.

Every arm does the same work on [tokens, rows * columns] in float32: y, then the gradients of x, of both factors and of the scale
(static), or of what multiplies the scale of each token (dynamic). Arms take turns within each round, so that a change of the
machine's speed meets all of them; medians are reported.

    python benchmarks/kronecker.py [--rounds 15] [--tokens 512]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fptquant import ops
from fptquant._core import build_info
from fptquant.ops.reference_ranges import SCALE_STRETCH
from fptquant.quantizers.grid import IntegerGrid

SIZES = [(24, 24), (32, 48), (64, 64)]  # SmolLM2-135M's hidden and intermediate sizes; 4,096
ARMS = ("fptquant", "torch.compile", "eager")
Step = Callable[[], tuple[Tensor, ...]]


def product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rows = x.reshape(-1, left.shape[0], right.shape[0])
    return (left @ rows @ right.T).reshape(x.shape)


def rounded(y: Tensor, scale: Tensor) -> Tensor:
    """Straight-through for the values and LSQ for the scale, symmetric 4 bits."""
    ratio = y / scale
    return (ratio + (ratio.round() - ratio).detach()).clamp(-8, 7) * scale


def product_quantized(x: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    return rounded(product(x, left, right), scale)


def product_quantized_dynamic(x: Tensor, left: Tensor, right: Tensor, clip: Tensor) -> Tensor:
    """With the scale of each token's own range, times clip."""
    y = product(x, left, right)
    return rounded(y, y.detach().abs().amax(-1, keepdim=True) / 7 * SCALE_STRETCH * clip)


GRID = IntegerGrid(4)
OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kronecker": (ops.kronecker, product),
    "kronecker_fake_quant": (partial(ops.kronecker_fake_quant, grid=GRID), product_quantized),
    "kronecker_fake_quant_dynamic": (partial(ops.kronecker_fake_quant_dynamic, grid=GRID), product_quantized_dynamic),
}
"""Of each operator the fused form and the formula."""


def arms(operator: str, inputs: tuple[Tensor, ...], dy: Tensor) -> dict[str, Step]:
    """Each arm's step."""
    ours, formula = OPERATORS[operator]
    compiled = torch.compile(formula)

    def step(forward: Callable[..., Tensor]) -> Step:
        def run() -> tuple[Tensor, ...]:
            y = forward(*inputs)
            return (y.detach(), *torch.autograd.grad(y, inputs, dy))

        return run

    return dict(zip(ARMS, map(step, (ours, compiled, formula)), strict=True))


def measure(operator: str, size: tuple[int, int], tokens: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm."""
    torch.manual_seed(0)
    rows, columns = size
    x, left, right = (
        torch.randn(shape, requires_grad=True) for shape in ((tokens, rows * columns), (rows, rows), (columns, columns))
    )
    scales = {
        "kronecker": [],
        "kronecker_fake_quant": [torch.tensor(0.5 * (rows * columns) ** 0.5, requires_grad=True)],
        "kronecker_fake_quant_dynamic": [torch.tensor(0.8, requires_grad=True)],
    }
    inputs = (x, left, right, *scales[operator])
    chosen = arms(operator, inputs, torch.randn_like(x))
    expected = chosen["eager"]()
    for name, arm in chosen.items():  # warm up, and check that it is the same work
        for found, other in zip(arm(), expected, strict=True):
            # A value close to the middle of two steps may be rounded the other way: up to |dy| in the gradient of the scale.
            assert (found - other).norm() < 1e-2 * other.norm() + (5 if other.ndim == 0 else 0), name
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, arm in chosen.items():
            start = time.perf_counter()
            arm()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    table = Table(
        title=f"forward + backward, float32, {options.tokens} tokens; {torch.get_num_threads()} threads, {build_info()['isa']}; "
        "milliseconds (of fptquant's time)"
    )
    for column in ("operator", "size", *ARMS):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for operator in OPERATORS:
        for size in SIZES:
            found = measure(operator, size, options.tokens, options.rounds)
            cells = [f"{found[name]:.2f} ({found[name] / found['fptquant']:.2f}x)" for name in ARMS]
            table.add_row(operator, f"{size[0]} x {size[1]}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
