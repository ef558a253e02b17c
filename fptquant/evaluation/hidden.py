"""Last hidden states of a causal language model, from which logits are computed a few tokens at a time.

Logits of 1,024 tokens over a vocabulary of 128,000 take half a gigabyte in fp32; the hidden states take a hundredth of
that. So a model runs without its head (but for one token), and the head is applied chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.hooks import hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_BYTES = 128 * 2**20
"""Temporary memory for logits, all copies together."""

_COPIES = 2
"""Tensors of the size of the logits that live at once: the model's and its reference's."""


@torch.inference_mode()
def last_hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head reads, for one window.

    The whole model is called, not its decoder alone, so that hooks on the model run as they do in use.

    Shape:
        tokens: [T], int64
        result: [T, hidden_size]
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0])

    with hooked([model.base_model.register_forward_hook(catch)]):
        model(input_ids=tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
    return caught[0][0]


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module that turns last hidden states into logits."""
    head: nn.Module = cast(Any, model).get_output_embeddings()
    return head


def chunk_length(vocabulary: int) -> int:
    """Tokens whose logits may be held at once.

    >>> chunk_length(49_152)
    341
    """
    return max(1, _CHUNK_BYTES // (_COPIES * 4 * vocabulary))


def logit_chunks(head: nn.Module, vocabulary: int, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits in fp32 or wider, with the positions they belong to.

    Shape:
        hidden: [T, hidden_size]
        result: pairs of a slice of T and [chunk, vocabulary]
    """
    step = chunk_length(vocabulary)
    for start in range(0, len(hidden), step):
        where = slice(start, min(start + step, len(hidden)))
        logits = head(hidden[where])
        yield where, logits if logits.dtype == torch.float64 else logits.float()


def check_finite(model: PreTrainedModel, tokens: Tensor, nll: Tensor, first_position: int, window: int) -> None:
    """Refuses what logits that are not finite lead to.

    Shape:
        tokens: [T], int64; nll: [chunk], the negative log-likelihood of some of them

    Raises:
        UserError: names the window, the position and the first module whose output was not finite.
    """
    if bool(nll.isfinite().all()):
        return
    row = int((~nll.isfinite()).nonzero()[0])
    source = first_nonfinite_module(model, tokens[None])
    where = f"; the first module with such an output is {source}" if source else ""
    raise UserError(
        f"the logits are not finite in window {window}, position {first_position + row}{where}. "
        "Check the weights, or use a wider dtype (dtype=float32)"
    )


@torch.inference_mode()
def first_nonfinite_module(model: PreTrainedModel, tokens: Tensor, **inputs: Tensor) -> str | None:
    """Name of the first module, in the order of execution, whose output holds NaN or infinity; None if there is none.

    Args:
        inputs: of the pass, besides the tokens.

    Shape:
        tokens: [B, T], int64
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                found.append(name)

        return hook

    with hooked(module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name):
        model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=1, **inputs)
    return found[0] if found else None
