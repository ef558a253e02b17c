"""The Jensen-Shannon divergence per token and its gradient, from logits and from hidden states, against torch.

Logits: every arm computes the loss of each token and the gradient of the student's logits, float32, one thread by default.
Hidden states: every arm multiplies student and teacher by the head, computes the losses and the gradient of the student's hidden
states; its memory is the rise of the process's peak over what it held before, each arm in a process of its own.
Arms take turns within each round, so that a change of the machine's speed meets all of them; the first call of a turn is not
counted, so that no arm pays for pages that another one gave back; medians are reported.

    python benchmarks/divergence.py [--rounds 5] [--threads 1] [--vocabulary 49152] [--hidden 576] [--memory-tokens 2048]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from fptquant import ops
from fptquant._core import build_info
from fptquant.memory import peak_bytes, reset_peak
from fptquant.ops.reference_divergence import divergence as in_float64

LOGITS_SHAPE = (128, 128256)
TOKENS = (64, 256, 1024, 4096)
MEMORY_VOCABULARY = 128256
EAGER, OURS = "eager formula", "fptquant"


def formula(student: Tensor, teacher: Tensor) -> Tensor:
    """The same function in eager torch, for torch.compile too."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


def gradient_of(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum) at the leaf."""
    leaf.grad = None
    losses = loss(leaf)
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def logits_arms(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    compiled, detached = torch.compile(formula), student.detach()
    return {
        OURS: lambda: gradient_of(lambda z: ops.divergence(z, teacher), student),
        "fptquant, the operator alone": lambda: torch.ops.fptquant.divergence(detached, teacher, 0, 1.0, True),
        "torch.compile of the formula": lambda: gradient_of(lambda z: compiled(z, teacher), student),
        EAGER: lambda: gradient_of(lambda z: formula(z, teacher), student),
    }


def hidden_arms(student: Tensor, teacher: Tensor, weight: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    def eager(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            target = linear(teacher, weight)
        return formula(linear(hidden, weight), target)

    return {
        OURS: lambda: gradient_of(lambda h: ops.linear_jsd(h, teacher, weight), student),
        EAGER: lambda: gradient_of(eager, student),
    }


def hidden_inputs(tokens: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of student and teacher, and a head that makes logits of size 2 of them."""
    torch.manual_seed(0)
    teacher = torch.randn(tokens, hidden)
    student = (teacher + 0.1 * torch.randn(tokens, hidden)).requires_grad_()
    return student, teacher, torch.randn(vocabulary, hidden) * (2 / math.sqrt(hidden))


def medians(arms: dict[str, Callable[[], tuple[Tensor, Tensor]]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm, whose turn begins with a call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            arm()
            start = time.perf_counter()
            arm()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def measure_logits(rounds: int) -> Table:
    torch.manual_seed(0)
    teacher = torch.randn(LOGITS_SHAPE) * 3
    student = (teacher + 0.5 * torch.randn(LOGITS_SHAPE)).requires_grad_()
    exact_loss, exact = in_float64(student.detach().double(), teacher.double(), 0, 1.0, True)
    arms, errors = logits_arms(student, teacher), {}
    for name, arm in arms.items():  # warm up, and check that it is the same work
        loss, gradient = arm()
        slope = (gradient - exact).abs().amax(-1) / exact.abs().amax(-1)
        errors[name] = (((loss - exact_loss).abs() / exact_loss).max().item(), slope.max().item())
        assert max(errors[name]) < 1e-3, name
    times = medians(arms, rounds)
    table = Table(
        title=f"{list(LOGITS_SHAPE)} float32, loss and gradient; {torch.get_num_threads()} threads, {build_info()['isa']}"
    )
    for column in ("arm", "ms", "of fptquant's time", "error of the loss", "of the gradient"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, value in times.items():
        table.add_row(name, f"{value:.1f}", f"{value / times[OURS]:.1f}x", *(f"{error:.1e}" for error in errors[name]))
    return table


def measure_hidden(rounds: int, hidden: int, vocabulary: int) -> Table:
    table = Table(title=f"From hidden states of {hidden}, vocabulary {vocabulary}, float32; {torch.get_num_threads()} threads")
    for column in ("tokens", f"{OURS} ms", f"{EAGER} ms", "of eager's time"):
        table.add_column(column, justify="right")
    for tokens in TOKENS:
        arms = hidden_arms(*hidden_inputs(tokens, hidden, vocabulary))
        results = [arm() for arm in arms.values()]
        assert (results[0][1] - results[1][1]).abs().max() < 1e-3 * results[1][1].abs().max()
        del results
        times = medians(arms, rounds)
        table.add_row(str(tokens), f"{times[OURS]:.0f}", f"{times[EAGER]:.0f}", f"{times[OURS] / times[EAGER]:.2f}")
    return table


def memory_of(arm: str, tokens: int, hidden: int) -> int:
    """Bytes by which one call raises the peak of this process."""
    chosen = hidden_arms(*hidden_inputs(tokens, hidden, MEMORY_VOCABULARY))[arm]
    hidden_arms(*hidden_inputs(8, 8, 16))[arm]()  # what is loaded with the first call is not the call's
    reset_peak()
    before = peak_bytes()
    chosen()
    return peak_bytes() - before


def measure_memory(tokens: int, hidden: int) -> Table:
    table = Table(title=f"Extra memory at {tokens} tokens, hidden states of {hidden}, vocabulary {MEMORY_VOCABULARY}, float32")
    extra = {}
    for arm in (OURS, EAGER):
        command = [sys.executable, __file__, "--hidden", str(hidden), "--memory-tokens", str(tokens), "--memory-of", arm]
        extra[arm] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for column in ("arm", "MiB", "of eager's"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, size in extra.items():
        table.add_row(arm, f"{size / 2**20:.0f}", f"{100 * size / extra[EAGER]:.1f} %")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--memory-tokens", type=int, default=2048, help="eager needs about 7 GiB for 2,048; 0 leaves this part out")
    parser.add_argument("--memory-of", choices=(OURS, EAGER), help="print the extra bytes of one arm alone, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, options.memory_tokens, options.hidden)))
        return
    console = Console()
    console.print(measure_logits(options.rounds))
    console.print(measure_hidden(options.rounds, options.hidden, options.vocabulary))
    if options.memory_tokens:
        console.print(measure_memory(options.memory_tokens, options.hidden))


if __name__ == "__main__":
    main()
