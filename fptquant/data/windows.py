"""Windows of tokens: a text cut into pieces of equal length that do not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fptquant.data.text import Text
from fptquant.errors import UserError
from fptquant.fingerprint import tensors_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: Text, windows: int | Literal["all"], window: int, *, seed: int | None = None
) -> Tensor:
    """The first windows of a text, or with a seed a random choice of them, in the order of the text; or ``"all"`` whole ones.

    The whole text is tokenized at once and cut every ``window`` tokens. Its first token is the BOS where the tokenizer puts one (as
    Llama's does) and the text asks for it (`fptquant.data.text.Text`); the windows after the first begin with words.

    Shape:
        result: [windows, window], int64

    Raises:
        UserError: if the text has fewer tokens than asked for, or no window is asked for.
    """
    if isinstance(windows, int) and windows < 1:
        raise UserError(f"{windows} windows of the text {text.name} were asked for; ask for at least one")
    ids: list[int] = tokenizer(text.content, add_special_tokens=text.add_bos_token, verbose=False)["input_ids"]
    if text.add_bos_token and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers also put an end
    available = len(ids) // window
    wanted = max(1, available) if windows == "all" else windows
    if available < wanted:
        raise UserError(
            f"the text {text.name} has {len(ids):,} tokens, but {wanted} windows of {window:,} tokens need "
            f"{wanted * window:,}; ask for fewer or shorter windows, or give a longer text"
        )
    cut = torch.tensor(ids[: available * window], dtype=torch.int64).view(available, window)
    if seed is None:
        return cut[:wanted].clone()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:wanted]
    return cut[chosen.sort().values]


def own_position(window: Tensor, context: int | None) -> int:
    """Where a window of tokens [T] begins among ``context`` positions: anywhere, but equal ones at one place; at 0 without a
    context.
    """
    free = 0 if context is None else context - len(window)
    return 0 if free <= 0 else int(tensors_digest(window), 16) % (free + 1)


def check_window(model_config: Any, window: int, what: str) -> None:
    """Refuses a window that the model cannot read at once, or that holds nothing to predict.

    Raises:
        UserError: names the lengths and the setting (``what``) to change.
    """
    if window < 2:
        raise UserError(f"{what} = {window} has no token that follows another; choose at least 2")
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and window > context:
        raise UserError(f"{what} = {window:,} is longer than the model's context of {context:,} tokens; choose at most that")
