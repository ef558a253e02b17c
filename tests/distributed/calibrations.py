"""Calibrates one tiny model by one and by two processes: python -m tests.distributed.calibrations FOLDER.

FOLDER/NAME/RANK.pt holds what came out in each process, FOLDER/NAME/metrics.jsonl the course of training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
import torch.nn.parallel
from torch import nn
from torch.distributed.tensor import DTensor

from fptquant.config.loading import load_config
from fptquant.models.architectures import view_model
from fptquant.reports.experiment import DTYPES
from fptquant.stages.calibrate import calibrate
from fptquant.stages.progress import quiet
from fptquant.training import shard_weights
from tests.distributed.forks import together
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

BATCH, STEPS, HELD_OUT = 4, 6, 3
TRAINING = f"training={{steps: {STEPS}, batch: {BATCH}, window: 24, text: topics, held_out_windows: {HELD_OUT}, evaluate_every: 2}}"
RANGES = TRAINING.replace("training=", "range_training=").replace(f"steps: {STEPS}", "steps: 4")
BLOCKS = [
    "training=null", "range_training=null",
    f"block_training={{steps: 4, batch: {BATCH}, windows: 6, window: 24, text: topics, held_out_windows: {HELD_OUT}}}",
]  # fmt: skip
QUANTIZATION = [
    "quantization=w4a4kv4-static",
    "quantization.activation.range={method: lp, candidates: 10}",
    "quantization.kv_cache.centered=true",
    "calibration.windows=3",
]
RATES = "query_key_rotation: 0.005, value_mixing: 0.005, up_scaling: 0.005, residual_rotation: 0.003, weight_range: 0.005"
RANGE_RATES = "range_training.lr={weight_range: 0.01, activation_range: 0.01, kv_cache_range: 0.01}"
"""High enough that four steps improve the held-out windows by several percent, more than last bits decide."""
SETTINGS = [
    TRAINING,
    f"training.lr={{{RATES}, activation_range: 0.005, kv_cache_range: 0.005}}",
    RANGES,
    RANGE_RATES,
    *QUANTIZATION,
]


def both(*settings: str) -> list[str]:
    """Settings of training and of range training."""
    return [f"{stage}.{setting}" for stage in ("training", "range_training") for setting in settings]


CASES: dict[str, tuple[int, list[str]]] = {
    "one, in parts": (1, both("micro_batch=2")),
    "two": (2, []),
    "two, sharded": (2, both("shard_weights=true")),
    "two, sharded and replayed": (2, both("shard_weights=true", "activation_checkpointing=true")),
    "one, double": (1, ["dtype=float64"]),
    "two, double": (2, ["dtype=float64", *both("micro_batch=1")]),
    "blocks, one, in parts": (1, [*BLOCKS, "block_training.micro_batch=2"]),
    "blocks, two": (2, BLOCKS),
}
"""Number of processes and settings."""


def calibrate_tiny(folder: Path, rank: int, options: list[str]) -> None:
    """Calibrates and writes down everything."""
    found: dict[str, Any] = {}
    measure_sharding(found)
    config = load_config("smoke", "model=none", *SETTINGS, *options)
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, num_hidden_layers=3, dtype=DTYPES[config.dtype])
    plain = type(view_model(model).decoder), type(view_model(model).layers[0])
    result = calibrate(model, tiny_tokenizer(), config, folder=folder, progress=quiet)
    view = view_model(result.model)
    found |= {
        "weights": result.model.state_dict(),
        "transforms": result.transforms.state_dict(),
        **{stage: result.metrics.get(stage) for stage in ("block_training", "training", "range_training")},
        "local": result.metrics["local"],
        "plain": plain == (type(view.decoder), type(view.layers[0])),
        "hooks": sum(len(module._state_dict_pre_hooks) + len(module._forward_pre_hooks) for module in view.layers.modules()),
    }
    torch.save(found, folder / f"{rank}.pt")


def measure_sharding(found: dict[str, Any]) -> None:
    """Notes the bytes of every layer before and after it is sharded, and how many layers are whole while one is at work."""
    shard, layers = shard_weights.fully_shard, set[nn.Module]()

    def count(module: nn.Module, args: Any) -> None:
        whole = sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers)
        found["most"] = max(found.get("most", 0), whole)

    def noted(module: nn.Module, **options: Any) -> None:
        if "ignored_params" not in options:  # a layer, not the decoder around them
            before = shard_weights.weight_bytes(module)
            layers.add(module)
            module.register_forward_pre_hook(count)
        shard(module, **options)
        if "ignored_params" not in options:
            found.setdefault("bytes", []).append((before, shard_weights.weight_bytes(module)))

    shard_weights.fully_shard = noted  # type: ignore[assignment]


def main(folder: Path) -> None:
    for name, (processes, options) in CASES.items():
        place = folder / name
        place.mkdir()
        together(processes, lambda rank, place=place, options=options: calibrate_tiny(place, rank, options))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
