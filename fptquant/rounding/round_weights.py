"""The rounding stage of the pipeline: its text, its method, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptquant.config.schema import Config
from fptquant.data.text import load_text
from fptquant.data.training import TrainingData, training_windows
from fptquant.data.windows import check_window
from fptquant.files import KeptFiles
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.quantizers.autoround import AutoRoundOptions
from fptquant.quantizers.gptq import GPTQOptions
from fptquant.rounding.clip_ranges import clip_ranges_
from fptquant.rounding.round_autoround import round_autoround_
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.rounding.token_weights import TokenWeights, find_token_weights
from fptquant.stages.distributed import is_main
from fptquant.stages.progress import Progress, quiet, say

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "checkpoint-rounding"
"""Folder of blocks that are rounded, while a run is unfinished."""
_NAMED = 5
"""Linears that are named of those whose Hessian was damped further."""


def check_rounding(model: PreTrainedModel, config: Config) -> None:
    """Refuses what rounding could not do, before any text is fetched.

    Raises:
        UserError: if a window is longer than the model's context.
    """
    if config.rounds:
        check_window(model.config, config.rounding.window, "rounding.window")


def rounding_bytes(model: PreTrainedModel, config: Config) -> int:
    """Disk space that rounding needs until it is finished: for all weights, and for the weights of tokens."""
    settings = config.rounding
    if not config.rounds:
        return 0
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tokens = settings.windows * settings.window if settings.token_weights == "fisher" else 0
    size = max(model.dtype.itemsize, 4)
    return parameters + tokens * size * len(LINEAR_NAMES) * int(model.config.num_hidden_layers)


def rounding_data(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, *, progress: Progress = quiet
) -> TrainingData | None:
    """The calibration windows of the rounding, free of passages of the evaluation text; None for rounding to nearest.

    Raises:
        UserError: if the text is too short or cannot be had, or a window is longer than the model's context.
    """
    rounding = config.rounding
    if not config.rounds:
        return None
    check_rounding(model, config)
    return training_windows(
        tokenizer,
        config.text_of(rounding),
        windows=rounding.windows,
        window=rounding.window,
        held_out=0,
        seed=config.seed,
        model=model,
        excluded=[load_text(config.evaluation.text, "evaluation")],
        progress=progress,
    )


def round_(
    model: PreTrainedModel,
    config: Config,
    data: TrainingData,
    *,
    belongs_to: str = "",
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Rounds the weights of a model whose transforms are merged and whose quantizers are on; returns the report.

    What `damping_note` says of it is shown by ``progress``.

    Args:
        belongs_to, resume: as in `fptquant.rounding.round_blocks.round_blocks_`.
        folder: where finished blocks are kept; nowhere by default.

    Raises:
        UserError: as `fptquant.rounding.round_gptq.round_gptq_` and `fptquant.rounding.round_autoround.round_autoround_`.
    """
    kept = None if folder is None else KeptFiles(folder / FOLDER)
    windows = data.train[: round(len(data.train) / max(data.epochs, 1.0))]  # a text that is too short repeats: once is enough
    belongs_to = f"{belongs_to} {config.rounding.token_weights} {config.seed}"
    method = {"nearest": _clip_, "gptq": _gptq_, "autoround": _autoround_}[config.rounding.method]
    found = method(model, windows, config, kept=kept, belongs_to=belongs_to, resume=resume, progress=progress)
    note = damping_note(found, config)
    if note and is_main():
        say(progress, note)
    return {
        "method": config.rounding.method,
        "text": data.source,
        "tokens": windows.numel(),
        "dropped_windows": data.dropped,
        **found,
    }


def damping_note(report: Mapping[str, Any], config: Config) -> str:
    """Which Hessians were not positive definite and got more damping than asked for, by what `round_` reports; empty for none."""
    names = report.get("damped_further", [])
    if not names:
        return ""
    linears, asked = report["linears"], config.rounding.damping
    worst = sorted(names, key=lambda name: -linears[name]["damping"])[:_NAMED]
    named = ", ".join(f"{name} {linears[name]['damping']:g}" for name in worst)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"GPTQ: the Hessians of {len(names)} of {len(linears)} linears were not positive definite with {asked:g} of their mean "
        f"diagonal added, and were damped further: {named}{more}; "
        "give more text (rounding.windows) or more damping (rounding.damping)"
    )


def _token_weights(model: PreTrainedModel, windows: Tensor, config: Config, **pass_: Any) -> tuple[TokenWeights | None, float]:
    """What they are, and the seconds that they took in all parts of the run."""
    if config.rounding.token_weights == "equal":
        return None, 0.0
    return find_token_weights(model, windows, seed=config.seed, **pass_)


def _gptq_(model: PreTrainedModel, windows: Tensor, config: Config, **pass_: Any) -> dict[str, Any]:
    settings = config.rounding
    options = GPTQOptions(
        act_order=settings.act_order,
        damping=settings.damping,
        static_groups=settings.static_groups,
        clip=settings.clip,
        search_ranges=settings.search_ranges,
        candidates=settings.candidates,
        descent_sweeps=settings.descent_sweeps,
    )
    token_weights, seconds = _token_weights(model, windows, config, **pass_)
    found = round_gptq_(model, windows, options, token_weights=token_weights, **pass_)
    return {
        "seconds": seconds + found.seconds,
        "damped_further": [name for name, report in found.linears.items() if report.damping > options.damping],
        "linears": {name: asdict(report) for name, report in found.linears.items()},
    }


def _clip_(model: PreTrainedModel, windows: Tensor, config: Config, **pass_: Any) -> dict[str, Any]:
    token_weights, seconds = _token_weights(model, windows, config, **pass_)
    found = clip_ranges_(model, windows, token_weights=token_weights, **pass_)
    return asdict(replace(found, seconds=seconds + found.seconds))


def _autoround_(model: PreTrainedModel, windows: Tensor, config: Config, **pass_: Any) -> dict[str, Any]:
    settings = config.rounding
    options = AutoRoundOptions(
        iterations=settings.iterations,
        batch=settings.batch,
        lr=settings.lr,
        learn_clipping=settings.learn_clipping,
        objective=settings.objective,
    )
    found = round_autoround_(model, windows, options, seed=config.seed, **pass_)
    return {"seconds": found.seconds, "blocks": {name: asdict(report) for name, report in found.blocks.items()}}
