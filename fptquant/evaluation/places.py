"""Where in a block activations are looked at, and passes over a text that look at all of them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.instrument import quantizers_off
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Place:
    """Where in a block activations are looked at."""

    title: str
    module: str
    """Name in the adapter, or ``layer`` for the block itself."""
    side: Literal["input", "output"]


PLACES: dict[str, Place] = {
    "attn_in": Place("input of q, k, v", "q_proj", "input"),
    "k_out": Place("keys before RoPE", "k_proj", "output"),
    "v_out": Place("values", "v_proj", "output"),
    "o_in": Place("input of o_proj", "o_proj", "input"),
    "mlp_in": Place("input of gate, up", "gate_proj", "input"),
    "down_in": Place("input of down_proj", "down_proj", "input"),
    "residual_mlp": Place("residual", "layer", "output"),
}
"""Site points shown in reports, in the order of the data flow."""

Note = Callable[[str, int, Tensor], None]
"""``note(place, layer, activation)``, the activation [1, T, channels]."""

WindowNote = Callable[[int, str, int, Tensor], None]
"""``note(window, place, layer, activation)``"""


@contextmanager
def watching(model: PreTrainedModel, note: Note) -> Iterator[None]:
    """Calls ``note`` for every place of every block during the passes of the model.

    A linear is looked at where its quantizer is, after online transforms.
    """
    handles = []
    for block in view_model(model).blocks:
        for name, place in PLACES.items():
            module = block.layer if place.module == "layer" else block.get(place.module)
            handles.append(_hook(module, place, name, block.index, note))
    with hooked(handles):
        yield


def _hook(module: nn.Module, place: Place, name: str, index: int, note: Note) -> Any:
    if place.side == "output":

        def after(_: nn.Module, args: Any, output: Any) -> None:
            note(name, index, output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(after)
    # An online transform happens inside the linear: `prepare_input` is what the weight meets.
    prepare = getattr(module, "prepare_input", None)

    def before(_: nn.Module, args: Any) -> None:
        note(name, index, args[0] if prepare is None else prepare(args[0]))

    return module.register_forward_pre_hook(before)


@torch.inference_mode()
def run_window(model: PreTrainedModel, tokens: Tensor) -> None:
    """Runs the model on one window for what hooks see of it.

    Shape:
        tokens: [T], int64
    """
    model(input_ids=tokens[None].to(model.device), use_cache=False, logits_to_keep=1)


def look_at_windows(
    model: PreTrainedModel, windows: Tensor, *notes: WindowNote, what: str = "activations", progress: Progress = quiet
) -> None:
    """Shows every activation at every place to each of ``notes``, in one pass over the windows; none is kept.

    Quantizers are off meanwhile, so that only the transforms are seen: a quantizer cuts off what lies outside its range.

    Args:
        what: how the progress calls it.

    Shape:
        windows: [windows, window], int64
    """
    with quantizers_off(model):
        for index, tokens in enumerate(windows):
            progress(index, len(windows), what)

            def note(place: str, layer: int, x: Tensor, index: int = index) -> None:
                for each in notes:
                    each(index, place, layer, x)

            with watching(model, note):
                run_window(model, tokens)
    progress(len(windows), len(windows), what)
