"""What a step of end-to-end training costs beyond the same step without quantizers, operator by operator.

The step: the teacher's pass, the student's pass with T_k, T_v, T_u and T_d merged anew and every quantizer on, the divergence
of the two, and the gradients of all transforms and ranges. Arms:

- plain: the same model with quantizers off, transforms left out and the sum of the hidden states as its loss, down to the
  gradient of every weight, which the student needs too: what would remain if quantization, merging and loss were free;
- fptquant: the step itself;
- eager: its operators written in plain PyTorch (eager_operators.py);
- torch.compile: the eager step, compiled whole; that takes a minute or more per layer, so take all arms on few layers then.

The last three are shown to compute the same loss and the same gradients before anything is timed. Arms take turns within
each round, so that a change of the machine's speed meets all of them; medians are reported. The shares of the operators are
those of a profiled step; what no operator accounts for (Python, small operations) is listed as the rest.

    python benchmarks/training_step.py [--layers 4] [--tokens 512] [--rounds 5] [--threads 2]
    python benchmarks/training_step.py --layers 2 --arms eager torch.compile
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import eager_operators
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fptquant import ops
from fptquant.config.loading import load_config
from fptquant.config.training import TrainingConfig
from fptquant.data.text import load_text
from fptquant.data.windows import token_windows
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.instrument import instrument_for, set_modes
from fptquant.models.loading import load_model
from fptquant.stages import student as student_module
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.merge_transforms import model_sizes
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from fptquant.stages.untie import untie_
from fptquant.training.student import Student, attach_transforms_
from fptquant.transforms import TransformOptions, build_transforms

ARMS = ("plain", "fptquant", "eager", "torch.compile")
QUICK = [f"quantization.{part}.range.method=min_max" for part in ("weight", "activation", "kv_cache")]
"""Ranges that are found quickly: their values do not change what a step costs."""
ROWS = {
    "linear_divergence": "loss (linear_divergence)",
    "_MixColumns": "T_v (merge_value, exponentials)",
    "merge_value": "T_v (merge_value, exponentials)",
    "hold_mixings": "T_v (merge_value, exponentials)",
    "Bmm": "T_v (merge_value, exponentials)",
    "LinalgInv": "T_v (merge_value, exponentials)",
    "merge_query_key_fake_quant": "merge_query_key_fake_quant (T_k: q, k)",
    "merge_scale_fake_quant": "merge_scale_fake_quant (T_u: up)",
    "MergeScaleHadamard": "merge_scale_hadamard (T_u and T_d: down)",
    "merge_scale_hadamard": "merge_scale_hadamard (T_u and T_d: down)",
    "hadamard": "hadamard (T_d: activations)",
    "fake_quant": "fake_quant (gate, v, o, down; activations; cache)",
    "apply_ranges": "ranges from their parameters",
}
"""Rows of the breakdown by the names of profiled events; the first that fits counts."""


def build_student(layers: int | None, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Student, Tensor]:
    """SmolLM2-135M in w4a8kv8-static with fptquant-local's transforms, a little off their starts; and one window of text."""
    model, tokenizer = load_model("smollm2-135m")
    config = load_config("fptquant-local", "quantization=w4a8kv8-static", "quantization.prefix=null", *QUICK)
    if layers is not None:
        view_model(model).decoder.layers = view_model(model).layers[:layers]
        model.config.num_hidden_layers = layers
    model.requires_grad_(False)
    untie_(model)
    fuse_norms_(model)
    transforms = build_transforms(model_sizes(view_model(model)), TransformOptions.of(config.transforms), seed=0)
    for index in range(len(transforms.blocks)):
        for transform in transforms.block(index).used():
            transform.randomize_(torch.Generator().manual_seed(index), spread=0.02)
    instrument_for(model, config)
    attach_transforms_(model, transforms)
    model.to(dtype)
    window = token_windows(tokenizer, load_text("topics", "calibration"), 1, tokens, seed=0)
    set_weight_ranges_(model)
    set_activation_ranges_(model, window)
    return Student(model, transforms, TrainingConfig()), window


def step_of(student: Student, window: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> Callable[[], Tensor]:
    """The step: loss and gradients; afterwards the gradients are those of this step alone."""

    def step() -> Tensor:
        student.zero_grad()
        value = (student if loss is None else loss)(window)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return step


def plain_step_of(student: Student, window: Tensor) -> Callable[[], Tensor]:
    """The same passes with quantizers off, without transforms and loss, with the gradients of the weights."""
    blocks = student.view.blocks
    weights = [block.linear(name).weight for block in blocks for name in LINEAR_NAMES]

    def step() -> Tensor:
        set_modes(student.model, "off")
        student.context.full_precision = True
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.no_grad():
                student._hidden(window)
            value = student._hidden(window).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
            student.context.full_precision = False
            set_modes(student.model, "on")

    return step


def arms_of(student: Student, window: Tensor, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """The steps by name."""
    ours = step_of(student, window)
    compiled = torch.compile(student)

    def eager() -> Tensor:
        with eager_operators.eager_operators():
            return ours()

    def inductor() -> Tensor:
        with eager_operators.eager_operators():
            return step_of(student, window, compiled)()

    every = {"plain": plain_step_of(student, window), "fptquant": ours, "eager": eager, "torch.compile": inductor}
    return {name: every[name] for name in names}


def gradients_of(student: Student) -> dict[str, Tensor]:
    """The gradients of each group in one tensor."""
    groups = student.parameter_groups()
    return {name: torch.cat([p.grad.flatten() for _, p in group if p.grad is not None]) for name, group in groups.items()}


def differences(student: Student, arms: dict[str, Callable[[], Tensor]], console: Console) -> dict[str, tuple[float, float]]:
    """How far loss and gradients of each arm are from those of ``fptquant``, relative; the worst group of gradients counts."""
    expected_loss, expected = arms["fptquant"](), gradients_of(student)
    found = {}
    for name in [name for name in arms if name not in ("plain", "fptquant")]:
        began = time.perf_counter()
        loss, gradients = arms[name](), gradients_of(student)
        errors = {group: float((gradients[group] - expected[group]).norm() / expected[group].norm()) for group in expected}
        which, worst = max(errors.items(), key=lambda item: item[1])
        found[name] = (abs(float(loss / expected_loss) - 1), worst)
        console.print(
            f"{name}, {next(student.model.parameters()).dtype}: loss {found[name][0]:.1e} and gradients {worst:.1e} ({which}) "
            f"from those of fptquant; first step {time.perf_counter() - began:.1f} s"
        )
    return found


def check_agreement(student: Student, arms: dict[str, Callable[[], Tensor]], console: Console) -> None:
    """Asserts that the arms compute the same: exactly in float64, on two layers and a short window. Where they are timed, in
    float32 and through many layers, a value between two steps that is rounded the other way moves all that follow it."""
    exact, window = build_student(2, 64, torch.float64)
    for name, (loss, gradient) in differences(exact, arms_of(exact, window, ["fptquant", "eager"]), console).items():
        assert max(loss, gradient) < 1e-6, name
    for name, (loss, _) in differences(student, arms, console).items():
        assert loss < 0.1, name


def measure(arms: dict[str, Callable[[], Tensor]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each arm."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(rounds):
        for name, arm in arms.items():
            start = clock()
            arm()
            times[name].append(clock() - start)
    return {name: median(values) for name, values in times.items()}


@contextmanager
def named_parts() -> Iterator[None]:
    """Gives names, for the profiler, to parts of the step that are no operators of the library."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(name):
                return function(*args, **options)

        return call

    parts = [(ops, "merge_value"), (ops, "merge_scale_hadamard"), (student_module, "hold_mixings")]
    with ExitStack() as stack:
        for owner, name in parts:
            stack.enter_context(mock.patch.object(owner, name, named(name, getattr(owner, name))))
        apply_ = named("apply_ranges", student_module.TrainedRange.apply_)
        stack.enter_context(mock.patch.object(student_module.TrainedRange, "apply_", lambda trained: apply_(trained)))
        yield


def profiled(step: Callable[[], Tensor]) -> tuple[dict[str, list[float]], float]:
    """Seconds (forward, backward) of each row of the breakdown, and of the whole step."""
    with profile(activities=[ProfilerActivity.CPU]) as run, record_function("whole step"):
        step()
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    events = sorted(run.events(), key=lambda event: event.time_range.start)
    whole = next(event.time_range for event in events if event.name == "whole step")
    covered = 0
    for event in events:
        name = event.name
        if event.time_range.start < covered or not _is_operator(name):
            continue
        row = next((row for part, row in ROWS.items() if part in name), None)
        if row is not None:
            covered = event.time_range.end
            rows[row]["ackward" in name] += event.time_range.elapsed_us() / 1e6
    products = sum(e.time_range.elapsed_us() for e in events if e.name == "aten::mm" and _inside(e, "linear_divergence")) / 1e6
    rows["  of which the matrix products of the head"][0] = products
    return dict(rows), whole.elapsed_us() / 1e6


def _is_operator(name: str) -> bool:
    return name.startswith(("fptquant::", "autograd::engine::evaluate_function")) or name in ROWS


def _inside(event: Any, name: str) -> bool:
    parent = event.cpu_parent
    return parent is not None and (name in parent.name or _inside(parent, name))


def breakdown(student: Student, arms: dict[str, Callable[[], Tensor]], seconds: dict[str, float]) -> Table:
    """Where the seconds beyond the plain step go, as shares of it."""
    with named_parts():
        rows, whole = profiled(arms["fptquant"])
    plain, step = seconds["plain"], seconds["fptquant"]
    table = Table(title="where the step's time goes (seconds of a profiled step; shares are applied to the medians)")
    for heading in ("part", "forward, s", "backward, s", "share of the step", "on top of plain"):
        table.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    known = 0.0
    for name, parts in sorted(rows.items(), key=lambda item: (not item[0].lstrip().startswith(("loss", "of")), -sum(item[1]))):
        share = sum(parts) / whole
        known += 0 if name.startswith(" ") else share
        table.add_row(name, *(f"{part:.3f}" for part in parts), f"{share:.1%}", f"{share * step / plain:.1%}")
    rest = step - plain - known * step
    table.add_row("the rest (Python, small operations)", "", "", f"{rest / step:.1%}", f"{rest / plain:.1%}")
    table.add_row("the plain step", "", "", f"{plain / step:.1%}", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="the first layers only; all 30 by default")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="all by default")
    parser.add_argument("--cpu-time", action="store_true", help="of the process: a busy machine disturbs it less; one thread only")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["eager"], help="beside plain and fptquant")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time needs --threads 1: threads that wait for each other use CPU time too")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    student_module.REMEMBERED_BYTES = 0  # every step reads the same window, as training does not
    student, window = build_student(arguments.layers, arguments.tokens)
    arms = arms_of(student, window, list(dict.fromkeys(["plain", "fptquant", *arguments.arms])))
    check_agreement(student, arms, console)
    seconds = measure(arms, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
    what = f"SmolLM2-135M, {len(student.view.blocks)} layers, {arguments.tokens} tokens, w4a8kv8-static, float32"
    console.print(f"\n{what}, threads: {torch.get_num_threads()}")
    table = Table()
    for heading in ("step", "CPU seconds" if arguments.cpu_time else "seconds", "of the plain step", "on top of it"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, value in seconds.items():
        ratio = value / seconds["plain"]
        table.add_row(name, f"{value:.3f}", f"{ratio:.2f}x", "" if name == "plain" else f"{ratio - 1:.1%}")
    console.print(table)
    console.print(breakdown(student, arms, seconds))


if __name__ == "__main__":
    main()
