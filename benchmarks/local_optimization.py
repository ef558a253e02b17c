"""Local optimization of the whole of SmolLM2-135M in closed form, against AdamW's 200 steps on some of its blocks.

Norm gains are folded first, T_r is left out. The closed form works on every block (its seconds and its memory are the
figures); AdamW on a few, spread over the depth, with the same starts, the same objective (p = 4) and the paper's
learning rate. Peak memory is the process's resident set while the optimization runs, reported with and without what Python and
its libraries hold before a model is loaded.

    python benchmarks/local_optimization.py [--blocks 2] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from fptquant.memory import peak_bytes, reset_peak
from fptquant.models.architectures import view_model
from fptquant.models.loading import load_model
from fptquant.stages.block_pool import map_blocks
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.merge_transforms import model_sizes
from fptquant.stages.optimize_local import LocalOptions, LocalReport, optimize_block_, optimize_local_
from fptquant.stages.untie import untie_
from fptquant.transforms import ModelTransforms, TransformOptions, build_transforms

ALL = TransformOptions(query_key_rotation=True, value_mixing="hadamard", up_scaling=True)
NAMES = {"query_key_rotation": "T_k", "value_mixing": "T_v", "up_scaling": "T_u"}
MIB = 1 << 20


def fresh(model: PreTrainedModel) -> ModelTransforms:
    """Transforms at their starts."""
    return build_transforms(model_sizes(view_model(model)), ALL)


def measure_closed_form(model: PreTrainedModel, repeats: int, libraries: int) -> tuple[LocalReport, dict[str, Any]]:
    """The last report; the seconds of every repeat, and the peak of memory."""
    seconds, cpu_seconds = [], []
    gc.collect()
    since_reset = reset_peak()
    resident = peak_bytes()
    for _ in range(repeats):
        transforms, cpu = fresh(model), time.process_time()
        report = optimize_local_(model, transforms)
        seconds.append(report.seconds)
        cpu_seconds.append(time.process_time() - cpu)
    peak = peak_bytes()
    size = sum(p.numel() for p in model.parameters()) * 4
    tied_size = size - view_model(model).lm_head.weight.numel() * 4
    return report, {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": peak / MIB,
        "libraries_mib": libraries / MIB,
        "resident_before_mib": resident / MIB,
        "peak_is_of_the_optimization_alone": since_reset,
        "model_fp32_mib": tied_size / MIB,
        "untied_model_fp32_mib": size / MIB,
        "peak_over_model": (peak - libraries) / tied_size,
    }


def measure_adamw(model: PreTrainedModel, indices: list[int]) -> LocalReport:
    """AdamW on some blocks; the report's blocks are those of ``indices``."""
    transforms, blocks = fresh(model), view_model(model).blocks
    report, began = LocalReport("adamw"), time.perf_counter()
    options = LocalOptions(method="adamw")
    report.blocks.extend(map_blocks(lambda i: optimize_block_(blocks[i], transforms.block(i), options), indices))
    report.seconds = time.perf_counter() - began
    return report


def comparison(closed: LocalReport, adamw: LocalReport, indices: list[int]) -> Table:
    """One line for each block and term."""
    table = Table(title="objective sum |w'|^4: closed form against AdamW, 200 steps", title_justify="left")
    for heading in ("block", "term", "start", "AdamW", "closed form", "ratio", "closed form, s", "AdamW, s (block)"):
        table.add_column(heading, justify="right")
    for position, index in enumerate(indices):
        for name, symbol in NAMES.items():
            ours, theirs = closed.blocks[index][name], adamw.blocks[position][name]
            numbers = (ours.before, theirs.after, ours.after)
            ratio, seconds = ours.after / theirs.after, (ours.seconds, theirs.seconds)
            table.add_row(
                str(index), symbol, *(f"{x:.6g}" for x in numbers), f"{ratio:.4f}", f"{seconds[0]:.3f}", f"{seconds[1]:.2f}"
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="blocks that AdamW works on (0: none)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the closed form")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    libraries = peak_bytes()
    model = load_model("smollm2-135m")[0]
    untie_(model)
    fuse_norms_(model)
    closed, figures = measure_closed_form(model, arguments.repeats, libraries)
    figures |= {"threads": arguments.threads, "closed_form": closed.as_dict()}
    console = Console(soft_wrap=True)
    console.print(
        f"closed form, {len(closed.blocks)} blocks, {arguments.threads} threads: "
        f"{', '.join(f'{s:.2f}' for s in figures['seconds'])} s "
        f"(CPU {', '.join(f'{s:.2f}' for s in figures['cpu_seconds'])})\n"
        f"peak {figures['peak_mib']:.0f} MiB, {figures['peak_mib'] - figures['resident_before_mib']:.0f} of them added by the "
        f"optimization and {figures['libraries_mib']:.0f} Python and its libraries; without these "
        f"{figures['peak_over_model']:.2f} times the model in fp32 ({figures['model_fp32_mib']:.0f} MiB; untied, as it is "
        f"optimized, {figures['untied_model_fp32_mib']:.0f})"
    )
    value = closed.total("value_mixing")
    console.print(f"T_v: {value.steps} steps in all, largest condition number {value.condition_number:.1f}")
    if arguments.blocks:
        count = len(closed.blocks)
        indices = sorted({round(i * (count - 1) / max(1, arguments.blocks - 1)) for i in range(arguments.blocks)})
        adamw = measure_adamw(model, indices)
        figures |= {"adamw_blocks": indices, "adamw": adamw.as_dict()}
        console.print(comparison(closed, adamw, indices))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
